"""Layers of a backbone on which stock Transformers and PEFT load no adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..models.hf_logging import quiet_transformers

try:  # private names, read in PEFT 0.21
    from peft.utils.transformers_weight_conversion import (
        _MODEL_TO_CONVERSION_PATTERN as FAMILIES,  # pyright: ignore[reportPrivateImportUsage]
    )
    from peft.utils.transformers_weight_conversion import (
        _MOE_TARGET_MODULE_MAPPING as EXPERTS,
    )
except ImportError:  # a version without this conversion
    FAMILIES, EXPERTS = {}, {}

POOLER = "pooler"
_with_pooler: dict[type, bool] = {}  # by class of configuration


def is_taken_for_experts(name: str, model_type: str) -> bool:
    """Whether PEFT mistakes a layer for a part of fused experts.

    Transformers 5 fuses the experts of a mixture into one tensor. PEFT converts adapters of older versions by the names
    of their layers: in these families it takes every ``gate_proj``, ``up_proj`` and ``down_proj`` for experts, those of
    dense and shared blocks too, and loads no adapter there.
    """
    return name.rpartition(".")[2] in EXPERTS.get(FAMILIES.get(model_type, ""), {})


def is_unused_pooler(name: str, backbone: nn.Module) -> bool:
    """Whether a layer is in a pooler that the architecture's classifier leaves out, as RoBERTa's does."""
    config: Any = getattr(backbone, "config", None)
    if config is None or not name.startswith(f"{POOLER}."):
        return False
    if type(config) not in _with_pooler:
        _with_pooler[type(config)] = _classifier_has_pooler(config)
    return not _with_pooler[type(config)]


def _classifier_has_pooler(config: Any) -> bool:
    from transformers import AutoModelForSequenceClassification

    try:
        with quiet_transformers(), torch.device("meta"):
            model: Any = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except (ValueError, AttributeError):  # no classifier of this architecture
        return False
    return getattr(model.base_model, POOLER, None) is not None
