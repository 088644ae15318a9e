"""MultiLoRA (arXiv 2311.11501): h = W0 x + s · Σ_{i=1..n} s_i ⊙ B_i A_i x, with s_i ∈ R^{d_out} learnt.

The n modules lie side by side in one LoRA of rank n·r: A (n·r, d_in) has A_i in rows i·r to (i+1)·r, B (d_out, n·r)
has B_i in the columns of the same numbers, and ``lora_scale`` (n, d_out) holds the s_i. With the scales folded into B
that is one pass, not n. Dropout is one mask for all modules: one a module, which no single pass equals, is not offered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .variant import Variant


def fold(b: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[diag(s_1) B_1, …, diag(s_n) B_n]: the scales (n, d_out) in the factor (d_out, n·r)."""
    n, d_out = scale.shape
    return (b.view(d_out, n, -1) * scale.T.unsqueeze(-1)).view_as(b)


class MultiVariant(Variant):
    """n modules in one LoRA layer of rank n·r."""

    leaf = "lora_scale"

    def __init__(self, modules: int) -> None:
        self.modules = modules

    def initial(self, module: Any, adapter: str) -> torch.Tensor:
        """Every s_i zero, so that ΔW = 0."""
        return torch.zeros(self.modules, module.out_features)

    def factor(self, module: Any, adapter: str) -> torch.Tensor:
        """s · [diag(s_i) B_i], shape (d_out, n·r)."""
        return fold(module.lora_B[adapter].weight, module.scaling[adapter] * module.lora_scale[adapter])

    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """``result`` + s · Σ_i s_i ⊙ B_i A_i dropout(x)."""
        z = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        return result + F.linear(z, self.factor(module, active_adapter))
