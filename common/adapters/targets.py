"""Which layers of a backbone get an adapter: ``target_modules`` and the keys beside it, read as PEFT reads them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config.diagnostics import did_you_mean
from ..errors import ModelError
from .stock_layers import is_taken_for_experts, is_unused_pooler

logger = logging.getLogger("colora.adapters")

ALL_LINEAR = "all-linear"
# Layers whose weight a fused kernel of the parent module reads, so that an adapter on them would not take part. PEFT
# refuses out_proj in some of these model types only.
FUSED = {
    **dict.fromkeys(("mamba", "falcon_mamba"), ("x_proj", "dt_proj", "out_proj")),
    **dict.fromkeys(
        ("mamba2", "falcon_h1", "nemotron_h", "bamba", "granitemoehybrid", "zamba2"),
        ("out_proj",),
    ),
}
ROUTERS = ("gate", "router")  # names of a linear layer that chooses experts, beside a module ``experts``
NOT_MATRICES = (nn.Embedding, nn.modules.conv._ConvNd)  # not named in the log line about layers that are left out
MAX_NAMED = 8  # layers that an error lists


@dataclass(frozen=True)
class Targets:
    """The layers of an adapter: names, one regular expression, ``all-linear``, or None for the model type's default.

    ``excluded`` are names or one regular expression. ``blocks`` are the numbers of the blocks that get an adapter; None
    for all of them. ``field`` is the key that errors name.
    """

    field: str
    names: tuple[str, ...] | str | None
    excluded: tuple[str, ...] | str = ()
    blocks: tuple[int, ...] | None = None


def layers_of(backbone: nn.Module, targets: Targets, rank: Callable[[str], int]) -> list[str]:
    """Return the names of the layers that get an adapter, in the order of the model.

    ``all-linear`` leaves out routers, layers of other types, layers narrower than ``rank`` (by layer), and layers whose
    adapter would have no effect, and logs what it leaves out. Raises ModelError for a name that matches nothing, for
    one of a layer that cannot have an adapter, and where no layer is left.
    """
    modules = _modules(backbone)
    chosen = _chosen(backbone, modules, targets, rank)
    _check_used(_beside(targets, "exclude_modules"), targets.excluded, chosen)
    kept = [name for name in chosen if not _matches(name, targets.excluded)]
    if targets.blocks is not None:
        _check_blocks(_beside(targets, "layers_to_transform"), targets.blocks, kept)
        kept = [name for name in kept if _block(name) in targets.blocks]
    if not kept:
        raise _none_left(targets)
    return kept


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter fits on a layer; GPT-2's ``Conv1D`` is a linear layer with a transposed weight."""
    return isinstance(module, nn.Linear | Conv1D)  # bitsandbytes layers are nn.Linear, too


def width(module: Any) -> int:
    """The smaller dimension of a linear layer, which bounds the rank of an adapter."""
    return min(module.weight.shape) if isinstance(module, Conv1D) else min(module.in_features, module.out_features)


def pattern_value(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """Return the value of a layer in PEFT's ``rank_pattern`` or ``alpha_pattern``, or the default."""
    patterns = patterns or {}
    return patterns.get(get_pattern_key(list(patterns), layer), default)  # type: ignore[arg-type]


def _modules(backbone: nn.Module) -> dict[str, nn.Module]:
    """The modules by name, without the inside of layers that carry an adapter already; these are their base layers."""
    modules: dict[str, nn.Module] = {}
    inside: list[str] = []
    for name, module in backbone.named_modules():
        if not name or any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, LoraLayer):
            inside.append(f"{name}.")
            module = module.get_base_layer()
        modules[name] = module
    return modules


def _chosen(
    backbone: nn.Module, modules: Mapping[str, nn.Module], targets: Targets, rank: Callable[[str], int]
) -> list[str]:
    linear = [name for name, module in modules.items() if is_linear(module)]
    model_type = getattr(getattr(backbone, "config", None), "model_type", "")
    if targets.names is None:
        default = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type, ())
        default = default if isinstance(default, str) else tuple(default)
        by_default = [name for name in linear if _matches(name, default) and not _why_not(name, backbone)]
        return by_default or _all_linear(backbone, modules, targets.field, rank)
    if isinstance(targets.names, str) and targets.names.lower() == ALL_LINEAR:
        return _all_linear(backbone, modules, targets.field, rank)
    matched = _by_name(modules, linear, targets)
    for name in matched:
        if name not in linear:
            kind = type(modules[name]).__name__
            message = f"{targets.field} must name linear layers, but {name} is of type {kind}."
            raise ModelError(targets.field, "names of linear layers", f"{name} of type {kind}", message=message)
        if _is_fused(name, model_type):
            message = f"{targets.field}: an adapter on {name} has no effect in a {model_type} model."
            hint = "A fused kernel reads the weight of this layer directly. Choose other layers, such as in_proj."
            raise ModelError(targets.field, "layers that can be adapted", name, message=message, hint=hint)
        if is_taken_for_experts(name, model_type):
            message = (
                f"{targets.field}: PEFT takes {name} of a {model_type} model for fused experts and loads no adapter."
            )
            hint = "Choose other layers, such as attention layers. PEFT would not load an adapter on these."
            raise ModelError(targets.field, "layers that an export can have", name, message=message, hint=hint)
    return matched


def _by_name(modules: Mapping[str, nn.Module], linear: list[str], targets: Targets) -> list[str]:
    names = targets.names or ()
    try:
        matched = [name for name in modules if _matches(name, names)]
    except re.error:
        raise _no_target(linear, targets, names) from None
    if not matched:
        raise _no_target(linear, targets, names)
    for name in () if isinstance(names, str) else names:
        if not any(_matches(module, (name,)) for module in matched):
            raise _no_target(linear, targets, name)
    return matched


def _all_linear(
    backbone: nn.Module, modules: Mapping[str, nn.Module], field: str, rank: Callable[[str], int]
) -> list[str]:
    left_out: dict[str, list[str]] = {}  # by reason
    kept: list[str] = []
    for name, module in modules.items():
        if not is_linear(module):
            if _has_matrix(module):
                left_out.setdefault(f"of type {type(module).__name__}", []).append(name)
        elif _is_router(name, modules):
            left_out.setdefault("a router", []).append(name)
        elif reason := _why_not(name, backbone):
            left_out.setdefault(reason, []).append(name)
        elif rank(name) > width(module):
            left_out.setdefault("narrower than the rank", []).append(name)
        else:
            kept.append(name)
    if left_out and kept:
        parts = "; ".join(f"{_listed(names)} ({reason})" for reason, names in left_out.items())
        _log_once(f"{field} = '{ALL_LINEAR}' leaves out {parts}.")
    return kept or left_out.get("narrower than the rank", [])  # the caller refuses the rank


def _matches(name: str, patterns: tuple[str, ...] | str) -> bool:
    """Whether a layer is meant: by its whole name or an ending of it, or by a regular expression for whole names."""
    if isinstance(patterns, str):
        return bool(patterns) and re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _block(name: str) -> int | None:
    """The number of a layer's block: the first number in its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _is_router(name: str, modules: Mapping[str, nn.Module]) -> bool:
    parent, _, leaf = name.rpartition(".")
    return leaf in ROUTERS and f"{parent}.experts".lstrip(".") in modules


def _is_fused(name: str, model_type: str) -> bool:
    return name.rpartition(".")[2] in FUSED.get(model_type, ())


def _why_not(name: str, backbone: nn.Module) -> str:
    """Why an adapter on a linear layer would be lost; empty where it is not."""
    model_type = getattr(getattr(backbone, "config", None), "model_type", "")
    if _is_fused(name, model_type):
        return "a fused kernel reads its weight"
    if is_taken_for_experts(name, model_type):
        return "PEFT takes it for fused experts"
    return "the classifier has no pooler" if is_unused_pooler(name, backbone) else ""


def _has_matrix(module: nn.Module) -> bool:
    """Whether a module has a matrix of its own, as linear layers do, and no linear layers inside."""
    if isinstance(module, NOT_MATRICES) or any(is_linear(inner) for inner in module.modules()):
        return False
    return any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))


def _check_used(field: str, patterns: tuple[str, ...] | str, layers: list[str]) -> None:
    """Refuse a name or expression that matches no target layer, and so has no effect."""
    for pattern in (patterns or ()) if isinstance(patterns, tuple) else [patterns] if patterns else []:
        single = pattern if isinstance(patterns, str) else (pattern,)
        if not _any_match(lambda name, single=single: _matches(name, single), layers):
            raise _unused(field, pattern, layers)


def check_patterns(field: str, patterns: Mapping[str, Any] | None, layers: list[str]) -> None:
    """Refuse a key of ``rank_pattern`` or ``alpha_pattern`` that matches no layer. Raises ModelError."""
    for pattern in patterns or {}:
        if not _any_match(lambda name, pattern=pattern: pattern_value({pattern: True}, name, False), layers):
            raise _unused(field, pattern, layers)


def _any_match(matches: Callable[[str], bool], layers: list[str]) -> bool:
    try:
        return any(matches(name) for name in layers)
    except re.error:
        return False


def _unused(field: str, pattern: str, layers: list[str]) -> ModelError:
    message = f"{field} has {pattern!r}, which matches no target layer."
    return ModelError(field, "names of target layers", repr(pattern), message=message, hint=_examples(layers))


def _check_blocks(field: str, blocks: tuple[int, ...], layers: list[str]) -> None:
    known = sorted({number for name in layers if (number := _block(name)) is not None})
    for block in blocks:
        if block not in known:
            message = f"{field} has {block}, but no target layer is in a block of this number."
            hint = f"The target layers are in blocks {known[0]} to {known[-1]}." if known else None
            raise ModelError(field, "numbers of blocks", block, message=message, hint=hint)


def _beside(targets: Targets, key: str) -> str:
    return f"{targets.field.rpartition('.')[0]}.{key}"


def _no_target(linear: list[str], targets: Targets, names: tuple[str, ...] | str) -> ModelError:
    """Return the error for names that match no linear layer, with layer names of the base model as examples."""
    found = repr(list(names)) if isinstance(names, tuple) else repr(names)
    whole = names == targets.names
    what = f"{targets.field} = {found} matches" if whole else f"{targets.field} has {found}, which matches"
    near = "" if isinstance(names, tuple) else did_you_mean(names, _endings(linear))
    return ModelError(
        targets.field,
        f"names of linear layers, such as {', '.join(_endings(linear)[:MAX_NAMED])}",
        found,
        message=f"{what} no linear layer of the base model.",
        hint=f"{near}{_examples(linear)}",
    )


def _none_left(targets: Targets) -> ModelError:
    message = f"{targets.field} and the keys beside it leave no layer of the base model."
    hint = "Remove names from exclude_modules, or name layers in target_modules."
    return ModelError(targets.field, "at least one layer", "none", message=message, hint=hint)


def _endings(layers: list[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in layers})


def _examples(layers: list[str]) -> str:
    return f"Linear layers of this model are {', '.join(_endings(layers)[:MAX_NAMED])}."


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


@cache
def _log_once(line: str) -> None:
    logger.warning("%s", line)
