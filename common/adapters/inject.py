"""Attach adapters to a backbone, select them and detach them.

Parameter names are PEFT's, relative to the backbone and without the adapter's name:
``encoder.layer.0.attention.self.query.lora_A.weight`` (r, d_in), ``….lora_B.weight`` (d_out, r), ``….lora_core``,
``….lora_scale``. Names of a private adapter begin with ``private.``
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

ADAPTER = "shared"  # name of the shared adapter in PEFT's layers
Layout = dict[str, tuple[int, ...]]  # parameter name → shape


@dataclass(frozen=True)
class AdapterSpec:
    """Specification of an adapter for PEFT's layers. ``field`` is the settings table that errors name."""

    field: str
    rank: int  # of all modules together, n·r
    scaling: float
    dropout: float
    targets: tuple[str, ...] | str
    variant: Variant | None = None


def shared_spec(settings: AdapterSettings, method: Method) -> AdapterSpec:
    """Return the specification of the shared adapter, with the core or scales of the method's row."""
    variant: Variant | None = None
    if method.core is not ABSENT:
        variant = CoreVariant(CORE_FORMS[settings.core])
    modules = settings.modules if method.scale is not ABSENT else 1
    if method.scale is not ABSENT:
        variant = MultiVariant(modules)
    targets = settings.target_modules
    return AdapterSpec("adapter", settings.rank * modules, scaling_of(settings), settings.dropout, targets, variant)


def private_spec(settings: PrivateSettings, shared: AdapterSettings) -> AdapterSpec:
    """Return the specification of a private adapter. Its target modules default to those of the shared adapter."""
    variant = MultiVariant(settings.slices) if PRIVATE_KINDS[settings.kind] else None
    targets = settings.target_modules or shared.target_modules
    return AdapterSpec("private", settings.total_rank, scaling_of(settings), settings.dropout, targets, variant)


def scaling_of(settings: AdapterSettings | PrivateSettings) -> float:
    """Return s = alpha/rank, or alpha/√rank with ``rslora``, with the rank of one module."""
    return settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)


def attach(backbone: nn.Module, settings: AdapterSettings, method: Method) -> dict[str, nn.Parameter]:
    """Inject the shared adapter into ``backbone`` in place, and return its parameters by name.

    Raises ModelError if no module matches, a target is not a linear layer, or the rank exceeds a layer.
    """
    return inject(backbone, shared_spec(settings, method), ADAPTER)


def inject(backbone: nn.Module, spec: AdapterSpec, adapter: str) -> dict[str, nn.Parameter]:
    """Inject an adapter under the name ``adapter``, in fp32 for every precision of the base model.

    Returns its parameters by name. Raises ModelError as ``attach`` does.
    """
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.rank,
        lora_dropout=spec.dropout,
        target_modules=spec.targets if isinstance(spec.targets, str) else list(spec.targets),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about its own file formats
        try:
            inject_adapter_in_model(config, backbone, adapter_name=adapter)
        except (ValueError, re.error):
            raise _no_target(backbone, spec) from None
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in backbone.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.r:
            _check_layer(name, layer, spec)
            parameters |= _install(name, layer, spec, adapter)
    return parameters


def activate(backbone: nn.Module, adapters: Sequence[str]) -> None:
    """Make these adapters, and no others, active on every layer that has them. Their parameters stay frozen."""
    for layer in backbone.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter([adapter for adapter in adapters if adapter in layer.r], inference_mode=True)


def detach(backbone: nn.Module) -> None:
    """Remove every adapter in place, which undoes ``attach`` and ``inject``."""
    for name, layer in list(backbone.named_modules()):
        if isinstance(layer, LoraLayer):
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, layer.get_base_layer())
    vars(backbone).pop("peft_config", None)


def layout_of(parameters: Mapping[str, torch.Tensor]) -> Layout:
    """Return name → shape, in name order."""
    return {key: tuple(parameters[key].shape) for key in sorted(parameters)}


def _install(name: str, layer: Any, spec: AdapterSpec, adapter: str) -> dict[str, nn.Parameter]:
    """Set scaling and form of the adapter on one layer, and return its parameters by name."""
    layer.scaling[adapter] = spec.scaling
    for leaf in (layer.lora_A, layer.lora_B):
        leaf[adapter].float()
    prefix = f"{name}." if adapter == ADAPTER else f"{PRIVATE}{name}."
    parameters = {
        f"{prefix}lora_A.weight": layer.lora_A[adapter].weight,
        f"{prefix}lora_B.weight": layer.lora_B[adapter].weight,
    }
    if spec.variant:
        parameters[f"{prefix}{spec.variant.leaf}"] = spec.variant.install(layer, adapter)
    return parameters


def _check_layer(name: str, layer: Any, spec: AdapterSpec) -> None:
    base = layer.get_base_layer()
    if not isinstance(layer, Linear) and not isinstance(base, nn.Linear):  # bitsandbytes layers are nn.Linear, too
        kind, key = type(base).__name__, f"{spec.field}.target_modules"
        message = f"{key} must name linear layers, but {name} is of type {kind}."
        raise ModelError(key, "names of linear layers", f"{name} of type {kind}", message=message)
    limit = min(layer.in_features, layer.out_features)  # type: ignore[type-var]
    if spec.rank > limit:
        key = f"{spec.field}.rank"
        message = f"{key} must be at most {limit} for the layer {name}, not {spec.rank}."
        raise ModelError(key, f"at most {limit} for {name}", spec.rank, message=message)


def _no_target(backbone: nn.Module, spec: AdapterSpec) -> ModelError:
    """Return the error for targets that match no linear layer, with layer names of the base model as examples."""
    linear = (name for name, module in backbone.named_modules() if isinstance(module, nn.Linear))
    names = {name.removesuffix(".base_layer").rsplit(".", 1)[-1] for name in linear if ".lora_" not in name}
    examples, key = ", ".join(sorted(names)[:8]), f"{spec.field}.target_modules"
    targets = spec.targets if isinstance(spec.targets, str) else list(spec.targets)
    return ModelError(
        key,
        f"names of linear layers, such as {examples}",
        repr(targets),
        message=f"{key} = {targets!r} matches no linear layer of the base model.",
        hint=f"Linear layers of this model are {examples}.",
    )
