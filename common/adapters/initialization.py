"""Initial values of adapters and heads, and the initial shared state S_0."""

from __future__ import annotations

import math
import re

import numpy as np
import torch
from torch import nn

from ..config.schema import AdapterSettings, Plan
from ..methods import PRIVATE, SHARED
from ..models.architecture import skeleton
from ..models.base_model import BaseModel
from ..models.sources import Fingerprint
from ..seeds import seed_from
from .core import CORE_FORMS
from .inject import Layout, attach, layout_of


def initial_values(layout: Layout, settings: AdapterSettings, seed: int) -> dict[str, torch.Tensor]:
    """Return the values of all parameters in a layout at step 0, where ΔW = 0.

    A is Kaiming-uniform (a = √5), B is zero, and Λ = I, so that the first step equals that of plain LoRA. With
    MultiLoRA, the scales are zero and every B_i is Kaiming-uniform. ``settings.init`` changes the shared adapter:
    ``gaussian`` draws A from N(0, 1/r²), ``orthogonal`` draws A and B with BA = 0, and ``spectral`` takes Λ = 0 and a
    Kaiming-uniform B; the coordinator then replaces A and B before round 1. Each tensor has its own generator, seeded
    by (seed, name), so that its values depend on nothing else.
    """
    return {key: _initial(key, layout, settings, seed) for key in layout}


def _initial(key: str, layout: Layout, settings: AdapterSettings, seed: int) -> torch.Tensor:
    leaf = next((part for part in reversed(key.split(".")) if part in _INITIAL), "head")
    return _INITIAL[leaf](key, layout, settings, seed)


def _a(key: str, layout: Layout, settings: AdapterSettings, seed: int) -> torch.Tensor:
    rank, width = layout[key]
    if key.startswith(PRIVATE) or settings.init in ("kaiming", "spectral"):
        return _kaiming(key, (rank, width), width, seed)
    if settings.init == "gaussian":
        return _normal(key, (rank, width), seed) / rank
    return (_normal(key, (width, rank // 2), seed) @ _rotation(key, rank, seed)[0::2]).T.contiguous() / 10


def _b(key: str, layout: Layout, settings: AdapterSettings, seed: int) -> torch.Tensor:
    scale = layout.get(f"{key.rpartition('lora_B')[0]}lora_scale")
    height, rank = layout[key]
    if scale is not None:
        return _kaiming(key, (height, rank), rank // scale[0], seed)  # fan-in of one module
    if key.startswith(PRIVATE) or settings.init in ("kaiming", "gaussian"):
        return torch.zeros(height, rank)
    if settings.init == "spectral":
        return _kaiming(key, (height, rank), rank, seed)
    return _normal(key, (height, rank // 2), seed) @ _rotation(key, rank, seed)[1::2] / 10


def _rotation(key: str, rank: int, seed: int) -> torch.Tensor:
    """A random orthogonal matrix of a layer: A has its odd rows as a factor and B its even rows, so BA = 0."""
    layer = re.split(r"\.lora_[AB]\.", key)[0]
    return torch.linalg.qr(_normal(f"{layer}.rotation", (rank, rank), seed))[0]


def _normal(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed_from(seed, key)))


def _core(key: str, layout: Layout, settings: AdapterSettings, seed: int) -> torch.Tensor:
    form = CORE_FORMS[settings.core]
    return (form.zero if settings.init == "spectral" else form.initial)(layout[key][0])


def _scale(key: str, layout: Layout, settings: AdapterSettings, seed: int) -> torch.Tensor:
    return torch.zeros(layout[key])


def _head(key: str, layout: Layout, settings: AdapterSettings, seed: int) -> torch.Tensor:
    """Initialize as BERT does: matrices N(0, 0.02²), biases zero, normalization weights one."""
    shape = layout[key]
    if len(shape) < 2:
        return torch.zeros(shape) if key.endswith("bias") else torch.ones(shape)
    generator = torch.Generator().manual_seed(seed_from(seed, key))
    return torch.empty(shape).normal_(0, 0.02, generator=generator)


def _kaiming(key: str, shape: tuple[int, ...], fan_in: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed_from(seed, key))
    bound = 1 / math.sqrt(fan_in)  # √(6 / ((1 + a²) · fan_in)) with a = √5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


_INITIAL = {"lora_A": _a, "lora_B": _b, "lora_core": _core, "lora_scale": _scale, "head": _head}


def initial_shared_state(plan: Plan, classes: int = 0) -> dict[str, np.ndarray]:
    """Return the shared arrays before round 1, by name. ``classes`` is the size of a shared head.

    Only the architecture is built, on the meta device: no weights are loaded.
    """
    row = plan.row()
    backbone = skeleton(plan.model)
    layout = layout_of(attach(backbone, plan.adapter, row))
    if row.head is SHARED and classes:
        layout |= head_layout(backbone, classes)
    values = initial_values(row.having(layout, SHARED), plan.adapter, plan.seed)
    return {key: value.numpy() for key, value in values.items()}


def head_layout(backbone: nn.Module, classes: int) -> Layout:
    """Return names and shapes of a classification head on a backbone without weights.

    Raises ModelError if the architecture has no classification head.
    """
    meta = BaseModel(backbone, backbone.config, None, Fingerprint("", "", ""), torch.device("meta"))
    return layout_of(meta.head_parameters(meta.classifier(classes)[1]))
