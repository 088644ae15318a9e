"""Attach adapters to a backbone, select them and detach them.

Parameter names are PEFT's, relative to the backbone and without the adapter's name:
``encoder.layer.0.attention.self.query.lora_A.weight`` (r, d_in), ``….lora_B.weight`` (d_out, r), ``….lora_core``,
``….lora_scale``. Names of a private adapter begin with ``private.``
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ..config.schema import AdapterSettings, PrivateSettings
from ..errors import ModelError
from ..methods import ABSENT, PRIVATE, PRIVATE_KINDS, Method
from .core import CORE_FORMS, CoreVariant
from .multilora import MultiVariant
from .targets import Targets, check_patterns, layers_of, pattern_value, width
from .variant import Variant

ADAPTER = "shared"  # name of the shared adapter in PEFT's layers
Layout = dict[str, tuple[int, ...]]  # parameter name → shape


@dataclass(frozen=True)
class AdapterSpec:
    """Specification of an adapter for PEFT's layers. ``field`` is the settings table that errors name.

    ``rank`` (of all modules together, n·r) and ``scaling`` are functions of a layer's name.
    """

    field: str
    rank: Callable[[str], int]
    scaling: Callable[[str], float]
    dropout: float
    targets: Targets
    variant: Variant | None = None
    patterns: Mapping[str, Mapping[str, Any] | None] = dataclasses.field(default_factory=dict)  # by key, to be checked


def shared_spec(settings: AdapterSettings, method: Method) -> AdapterSpec:
    """Return the specification of the shared adapter, with the core or scales of the method's row."""
    variant: Variant | None = None
    if method.core is not ABSENT:
        variant = CoreVariant(CORE_FORMS[settings.core])
    modules = settings.modules if method.scale is not ABSENT else 1
    if method.scale is not ABSENT:
        variant = MultiVariant(modules)
    return AdapterSpec(
        "adapter",
        lambda layer: rank_of(settings, layer) * modules,
        lambda layer: scaling_of(settings, layer),
        settings.dropout,
        _targets(settings),
        variant,
        {"rank_pattern": settings.rank_pattern, "alpha_pattern": settings.alpha_pattern},
    )


def private_spec(settings: PrivateSettings, shared: AdapterSettings) -> AdapterSpec:
    """Return the specification of a private adapter. Its layers default to those of the shared adapter."""
    variant = MultiVariant(settings.slices) if PRIVATE_KINDS[settings.kind] else None
    own = settings.target_modules
    targets = _targets(shared, "private") if own is None else Targets("private.target_modules", own)
    scaling = scaling_of(settings)
    return AdapterSpec(
        "private", lambda layer: settings.total_rank, lambda layer: scaling, settings.dropout, targets, variant
    )


def rank_of(settings: AdapterSettings | PrivateSettings, layer: str) -> int:
    """Return the rank of one module on a layer: that of ``rank_pattern`` where it names the layer."""
    patterns = settings.rank_pattern if isinstance(settings, AdapterSettings) else None
    return pattern_value(patterns, layer, settings.rank)


def scaling_of(settings: AdapterSettings | PrivateSettings, layer: str = "") -> float:
    """Return s = alpha/rank, or alpha/√rank with ``rslora``, with alpha and the rank of one module on this layer."""
    patterns = settings.alpha_pattern if isinstance(settings, AdapterSettings) else None
    rank = rank_of(settings, layer)
    return pattern_value(patterns, layer, settings.alpha) / (math.sqrt(rank) if settings.rslora else rank)


def _targets(settings: AdapterSettings, table: str = "adapter") -> Targets:
    blocks = settings.layers_to_transform
    blocks = (blocks,) if isinstance(blocks, int) else blocks
    return Targets(f"{table}.target_modules", settings.target_modules, settings.exclude_modules or (), blocks)


def attach(backbone: nn.Module, settings: AdapterSettings, method: Method) -> dict[str, nn.Parameter]:
    """Inject the shared adapter into ``backbone`` in place, and return its parameters by name.

    Raises ModelError if no module matches, a target is not a linear layer, or the rank exceeds a layer.
    """
    return inject(backbone, shared_spec(settings, method), ADAPTER)


def inject(backbone: nn.Module, spec: AdapterSpec, adapter: str) -> dict[str, nn.Parameter]:
    """Inject an adapter under the name ``adapter``, in fp32 for every precision of the base model.

    Returns its parameters by name. Raises ModelError as ``attach`` does.
    """
    layers = layers_of(backbone, spec.targets, spec.rank)
    for key, patterns in spec.patterns.items():
        check_patterns(f"{spec.field}.{key}", patterns, layers)
    modules = dict(backbone.named_modules())
    for name in layers:
        _check_rank(name, modules[name], spec)
    config = LoraConfig(
        r=1,
        lora_dropout=spec.dropout,
        target_modules=[],  # the names in ``state_dict`` count; PEFT would rewrite names of layers beside experts
        rank_pattern={f"^{re.escape(name)}": spec.rank(name) for name in layers},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about its own file formats
        names = {f"{name}.lora_A.weight": torch.empty(0) for name in layers}
        inject_adapter_in_model(config, backbone, adapter_name=adapter, state_dict=names)
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in backbone.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.r:
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
    layer.scaling[adapter] = spec.scaling(name)
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


def _check_rank(name: str, module: nn.Module, spec: AdapterSpec) -> None:
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    limit, rank = width(base), spec.rank(name)
    if rank > limit:
        key = f"{spec.field}.rank"
        message = f"{key} must be at most {limit} for the layer {name}, not {rank}."
        raise ModelError(key, f"at most {limit} for {name}", rank, message=message)
