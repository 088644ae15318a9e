"""Layers that PEFT mistakes for parts of fused experts when it loads an adapter.

Transformers 5 fuses the experts of a mixture into one tensor. PEFT converts adapters of older versions by the names of
their layers: in these families it takes every ``gate_proj``, ``up_proj`` and ``down_proj`` for experts, those of dense
and shared blocks too, and loads no adapter there. Read in PEFT 0.21, ``peft/utils/transformers_weight_conversion.py``.
"""

from __future__ import annotations

try:
    from peft.utils.transformers_weight_conversion import (
        _MODEL_TO_CONVERSION_PATTERN as FAMILIES,  # pyright: ignore[reportPrivateImportUsage]
    )
    from peft.utils.transformers_weight_conversion import (
        _MOE_TARGET_MODULE_MAPPING as EXPERTS,
    )
except ImportError:  # a version without this conversion
    FAMILIES, EXPERTS = {}, {}


def is_taken_for_experts(name: str, model_type: str) -> bool:
    """Whether PEFT would load no adapter for this layer."""
    return name.rpartition(".")[2] in EXPERTS.get(FAMILIES.get(model_type, ""), {})
