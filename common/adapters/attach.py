"""Attaching the adapter to a backbone, and the values that every party starts from.

Parameter names are PEFT's own, relative to the backbone and without the adapter's name:
``encoder.layer.0.attention.self.query.lora_A.weight`` (r, d_in), ``….lora_B.weight`` (d_out, r), ``….lora_core``.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import nn

from ..errors import ModelError
from ..methods import ABSENT, Method, group_of
from ..seeds import seed_from
from ..settings import AdapterSettings
from .core import CORE_FORMS, CoreVariant

ADAPTER = "shared"
Layout = dict[str, tuple[int, ...]]


def attach(backbone: nn.Module, settings: AdapterSettings, method: Method) -> dict[str, nn.Parameter]:
    """Injects the adapter into ``backbone`` in place and returns its parameters by name.

    Raises ModelError when no module matches or the rank exceeds a layer.
    """
    targets = settings.target_modules
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  (any number is used as one)
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's hints are about its own saving formats
        try:
            inject_adapter_in_model(config, backbone, adapter_name=ADAPTER)
        except (ValueError, re.error):
            raise ModelError("adapter.target_modules", _linear_names(backbone), targets) from None
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in backbone.named_modules():
        if isinstance(layer, LoraLayer):
            _check_layer(name, layer, settings.rank)
            parameters |= _parameters_of(name, layer, settings, method)
    return parameters


def detach(backbone: nn.Module) -> None:
    """Takes every adapter out again, in place: the backbone is as it was before :func:`attach`."""
    for name, layer in list(backbone.named_modules()):
        if isinstance(layer, LoraLayer):
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, layer.get_base_layer())
    vars(backbone).pop("peft_config", None)


def layout_of(parameters: Mapping[str, torch.Tensor]) -> Layout:
    """Name → shape, in name order."""
    return {key: tuple(parameters[key].shape) for key in sorted(parameters)}


def initial_values(layout: Layout, settings: AdapterSettings, seed: int) -> dict[str, torch.Tensor]:
    """Values at step 0: A Kaiming-uniform(a=√5), B zero, Λ = I, so that ΔW = 0 and a step equals plain LoRA's.

    Every tensor has its own generator seeded by (seed, name): the values depend on nothing else.
    """
    return {key: _INITIAL[group_of(key)](key, shape, settings, seed) for key, shape in layout.items()}


def _kaiming(key: str, shape: tuple[int, ...], settings: AdapterSettings, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed_from(seed, key))
    bound = 1 / math.sqrt(shape[1])  # √(6 / ((1 + a²) · fan_in)) with a = √5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _zeros(key: str, shape: tuple[int, ...], settings: AdapterSettings, seed: int) -> torch.Tensor:
    return torch.zeros(shape)


def _identity(key: str, shape: tuple[int, ...], settings: AdapterSettings, seed: int) -> torch.Tensor:
    return CORE_FORMS[settings.core].initial(shape[0])


def _head(key: str, shape: tuple[int, ...], settings: AdapterSettings, seed: int) -> torch.Tensor:
    """As BERT's: matrices N(0, 0.02²), biases zero, the scales of normalisations one."""
    if len(shape) < 2:
        return torch.zeros(shape) if key.endswith("bias") else torch.ones(shape)
    generator = torch.Generator().manual_seed(seed_from(seed, key))
    return torch.empty(shape).normal_(0, 0.02, generator=generator)


_INITIAL = {"A": _kaiming, "B": _zeros, "core": _identity, "head": _head}


def _parameters_of(name: str, layer: Any, settings: AdapterSettings, method: Method) -> dict[str, nn.Parameter]:
    parameters = {
        f"{name}.lora_A.weight": layer.lora_A[ADAPTER].weight,
        f"{name}.lora_B.weight": layer.lora_B[ADAPTER].weight,
    }
    if method.core is not ABSENT:
        parameters[f"{name}.lora_core"] = CoreVariant(CORE_FORMS[settings.core]).install(layer, ADAPTER)
    return parameters


def _check_layer(name: str, layer: Any, rank: int) -> None:
    if not isinstance(layer, Linear):
        kind = type(layer.get_base_layer()).__name__
        raise ModelError("adapter.target_modules", "names of linear layers", f"{name}, which is of kind {kind}")
    limit = min(layer.in_features, layer.out_features)  # type: ignore[type-var]
    if rank > limit:
        raise ModelError("adapter.rank", f"at most {limit} for {name}", rank)


def _linear_names(backbone: nn.Module) -> str:
    names = {name.rsplit(".", 1)[-1] for name, module in backbone.named_modules() if isinstance(module, nn.Linear)}
    return f"names of linear layers of this model, such as {', '.join(sorted(names)[:8])}"
