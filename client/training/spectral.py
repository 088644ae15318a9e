"""A site's part in the spectral start: one step of a power iteration on the gradients of all sites.

G is the gradient of a site's mean loss with respect to the weight of an adapted layer, at ΔW = 0. The spectral start
wants the top-r left singular vectors U of [G_1 … G_K] and the top-r right ones V, and then B = U, A = Vᵀ, Λ = 0. A
power iteration finds them without a gradient leaving its site: the coordinator sends an orthonormal (B, A), each site
returns (G Gᵀ B, A Gᵀ G), and the coordinator adds and orthonormalizes them (``server/rounds/spectral.py``). G is scaled
to Frobenius norm 1, so every site counts the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...common.errors import ModelError
from ...common.protocol.types import Arrays
from ...common.tasks.base import Task

A_LEAF = ".lora_A.weight"


def power_step(task: Task, backbone: nn.Module, shared: Arrays) -> tuple[Arrays, int]:
    """Return (G Gᵀ B, A Gᵀ G) for every adapted layer by the names of B and A, and the number of loss terms.

    The adapter in the model must have ΔW = 0. Raises ModelError for a layer whose weight is quantized.
    """
    layers = {key.removesuffix(A_LEAF): key for key in shared if key.endswith(A_LEAF)}
    gradients, terms = _gradients(task, {name: _base_layer(backbone, name) for name in layers})
    arrays = dict(shared)  # a shared head returns as it came
    for name, a_key in layers.items():
        g, b_key = gradients[name], f"{name}.lora_B.weight"
        a, b = torch.as_tensor(shared[a_key]).double(), torch.as_tensor(shared[b_key]).double()
        arrays[b_key] = (g @ (g.T @ b)).float().numpy()
        arrays[a_key] = ((a @ g.T) @ g).float().numpy()
    return arrays, terms


def _base_layer(backbone: nn.Module, name: str) -> Any:
    layer: Any = backbone.get_submodule(name)
    base = layer.get_base_layer()
    if not base.weight.is_floating_point():
        raise ModelError(
            "adapter.init",
            "kaiming, for a quantized base model",
            "spectral",
            message=f"The spectral start needs the gradient of {name}, whose weight is quantized.",
            hint='Use adapter.init = "kaiming", or a base model that is not quantized.',
        )
    return layer


def _gradients(task: Task, layers: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], int]:
    """G of every layer, shape (d_out, d_in), in double precision and with norm 1 (0 if it vanishes)."""
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    task.module.eval()
    terms = 0
    try:
        for batch in task.batches(task.train.examples):
            loss, count = task.loss(batch)
            (loss * count).backward()
            terms += count
        found = {name: weight.grad.detach().to("cpu", torch.float64) for name, weight in weights.items()}
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
    upright = {name: g.T if layers[name].fan_in_fan_out else g for name, g in found.items()}
    return {name: g / g.norm().clamp(min=torch.finfo(g.dtype).tiny) for name, g in upright.items()}, terms
