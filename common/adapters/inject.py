"""Attaching adapters to a backbone, and the values that every party starts from.

Parameter names are PEFT's own, relative to the backbone and without the adapter's name:
``encoder.layer.0.attention.self.query.lora_A.weight`` (r, d_in), ``….lora_B.weight`` (d_out, r), ``….lora_core``,
``….lora_scale``. Those of a private adapter begin with ``private.``
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import nn

from ..config.schema import AdapterSettings, PrivateSettings
from ..errors import ModelError
from ..methods import ABSENT, PRIVATE, PRIVATE_KINDS, Method
from .core import CORE_FORMS, CoreVariant
from .multilora import MultiVariant
from .variant import Variant

ADAPTER = "shared"
Layout = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter as PEFT's layers need to know it. ``field`` is the settings table that errors name."""

    field: str
    rank: int  # of the whole: n·r for n modules
    scaling: float
    dropout: float
    targets: tuple[str, ...] | str
    variant: Variant | None = None


def shared_spec(settings: AdapterSettings, method: Method) -> AdapterSpec:
    """The form of the shared adapter by the method's row."""
    variant: Variant | None = None
    if method.core is not ABSENT:
        variant = CoreVariant(CORE_FORMS[settings.core])
    modules = settings.modules if method.scale is not ABSENT else 1
    if method.scale is not ABSENT:
        variant = MultiVariant(modules)
    targets = settings.target_modules
    return AdapterSpec("adapter", settings.rank * modules, scaling_of(settings), settings.dropout, targets, variant)


def private_spec(settings: PrivateSettings, usual: AdapterSettings) -> AdapterSpec:
    """The form of a private adapter, with the shared one's target modules unless it has its own."""
    variant = MultiVariant(settings.slices) if PRIVATE_KINDS[settings.kind] else None
    targets = settings.target_modules or usual.target_modules
    return AdapterSpec("private", settings.total_rank, scaling_of(settings), settings.dropout, targets, variant)


def scaling_of(settings: AdapterSettings | PrivateSettings) -> float:
    """s = alpha/rank, or alpha/√rank with ``rslora``; the rank is that of one module."""
    return settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)


def attach(backbone: nn.Module, settings: AdapterSettings, method: Method) -> dict[str, nn.Parameter]:
    """Injects the shared adapter into ``backbone`` in place and returns its parameters by name.

    Raises ModelError when no module matches or the rank exceeds a layer.
    """
    return inject(backbone, shared_spec(settings, method), ADAPTER)


def inject(backbone: nn.Module, form: AdapterSpec, adapter: str) -> dict[str, nn.Parameter]:
    """Injects an adapter of any form under a name of its own, in fp32 whatever the base model's precision."""
    config = LoraConfig(
        r=form.rank,
        lora_alpha=form.rank,
        lora_dropout=form.dropout,
        target_modules=form.targets if isinstance(form.targets, str) else list(form.targets),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's hints are about its own saving formats
        try:
            inject_adapter_in_model(config, backbone, adapter_name=adapter)
        except (ValueError, re.error):
            raise ModelError(f"{form.field}.target_modules", _linear_names(backbone), form.targets) from None
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in backbone.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.r:
            _check_layer(name, layer, form)
            parameters |= _parameters_of(name, layer, form, adapter)
    return parameters


def activate(backbone: nn.Module, adapters: Sequence[str]) -> None:
    """Lets these adapters, and no others, act on every layer that has them; none of their parameters is trained yet."""
    for layer in backbone.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter([adapter for adapter in adapters if adapter in layer.r], inference_mode=True)


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


def _parameters_of(name: str, layer: Any, form: AdapterSpec, adapter: str) -> dict[str, nn.Parameter]:
    layer.scaling[adapter] = form.scaling
    for leaf in (layer.lora_A, layer.lora_B):
        leaf[adapter].float()
    place = f"{name}." if adapter == ADAPTER else f"{PRIVATE}{name}."
    parameters = {
        f"{place}lora_A.weight": layer.lora_A[adapter].weight,
        f"{place}lora_B.weight": layer.lora_B[adapter].weight,
    }
    if form.variant:
        parameters[f"{place}{form.variant.leaf}"] = form.variant.install(layer, adapter)
    return parameters


def _check_layer(name: str, layer: Any, form: AdapterSpec) -> None:
    base = layer.get_base_layer()
    if not isinstance(layer, Linear) and not isinstance(base, nn.Linear):  # bitsandbytes' are nn.Linear, too
        found = f"{name}, which is of kind {type(base).__name__}"
        raise ModelError(f"{form.field}.target_modules", "names of linear layers", found)
    limit = min(layer.in_features, layer.out_features)  # type: ignore[type-var]
    if form.rank > limit:
        raise ModelError(f"{form.field}.rank", f"at most {limit} for {name}", form.rank)


def _linear_names(backbone: nn.Module) -> str:
    """Of the model itself, whether or not it has an adapter already."""
    linear = (name for name, module in backbone.named_modules() if isinstance(module, nn.Linear))
    names = {name.removesuffix(".base_layer").rsplit(".", 1)[-1] for name in linear if ".lora_" not in name}
    return f"names of linear layers of this model, such as {', '.join(sorted(names)[:8])}"
