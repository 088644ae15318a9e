"""MultiLoRA (arXiv 2311.11501): h = W0 x + s · Σ_{i=1..n} s_i ⊙ B_i A_i x, with learned s_i ∈ R^{d_out}.

The n modules are stored in one LoRA of rank n·r: A (n·r, d_in) has A_i in rows i·r to (i+1)·r, B (d_out, n·r) has B_i
in the same columns, and ``lora_scale`` (n, d_out) holds the s_i. With the scales folded into B, one pass computes all
modules. They share one dropout mask, since a mask per module cannot be computed in one pass.
"""

from __future__ import annotations

from typing import Any

import torch

from .stacked import linear
from .variant import Variant


def fold(b: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Fold scales (n, d_out) into B (d_out, n·r): [diag(s_1) B_1, …, diag(s_n) B_n]. Both may be those of each site."""
    n = scale.shape[-2]
    return (b.unflatten(-1, (n, -1)) * scale.transpose(-1, -2).unsqueeze(-1)).reshape(b.shape)


class MultiVariant(Variant):
    """n modules in one LoRA layer of rank n·r."""

    leaf = "lora_scale"

    def __init__(self, modules: int) -> None:
        self.modules = modules

    def initial(self, module: Any, adapter: str) -> torch.Tensor:
        """Return zeros (n, d_out), so that ΔW = 0."""
        return torch.zeros(self.modules, module.out_features)

    def factor(self, module: Any, adapter: str) -> torch.Tensor:
        """Return s · [diag(s_i) B_i], shape (d_out, n·r)."""
        return fold(module.lora_B[adapter].weight, module.scaling[adapter] * module.lora_scale[adapter])

    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Return ``result`` + s · Σ_i s_i ⊙ B_i A_i dropout(x)."""
        z = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        return result + linear(z, self.factor(module, active_adapter))
