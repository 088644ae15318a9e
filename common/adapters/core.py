"""The CoLoRA core: h = W0 x + s · B Λ_k A x, with A and B shared and Λ_k personal.

Reconstructed from the abstract of arXiv 2602.07218 and its stated complexity O(d r + k r²); not the paper's own text.
This is the only file that touches PEFT's private ``LoraVariant`` seam.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import nn


@dataclass(frozen=True)
class CoreForm:
    """A parametrisation of Λ: its initial value (Λ = I), how it acts on z = A x, and the matrix it stands for."""

    initial: Callable[[int], torch.Tensor]
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    matrix: Callable[[torch.Tensor], torch.Tensor]


CORE_FORMS: dict[str, CoreForm] = {
    "full": CoreForm(torch.eye, F.linear, lambda core: core),
    "diagonal": CoreForm(torch.ones, lambda z, core: z * core, torch.diag),
    "residual": CoreForm(
        lambda r: torch.zeros(r, r),
        lambda z, core: z + F.linear(z, core),
        lambda core: torch.eye(core.shape[0], dtype=core.dtype, device=core.device) + core,
    ),
}


class CoreVariant(LoraVariant):
    """PEFT's seam for a LoRA form, with the core as one more parameter of the layer (``lora_core``)."""

    def __init__(self, form: CoreForm) -> None:
        self.form = form

    def install(self, layer: LoraLayer, adapter: str) -> nn.Parameter:
        """Adds the identity core to a LoRA layer and routes its forward and merge through it."""
        module: Any = layer
        core = nn.Parameter(self.form.initial(layer.r[adapter]).to(module.lora_A[adapter].weight.device))
        if not hasattr(module, "lora_core"):
            module.lora_core = nn.ParameterDict()
        module.lora_core[adapter] = core
        layer.lora_variant[adapter] = self
        return core

    def delta(self, module: Any, adapter: str) -> torch.Tensor:
        """ΔW = s · B Λ A, shape (d_out, d_in)."""
        core = self.form.matrix(module.lora_core[adapter])
        return module.scaling[adapter] * (module.lora_B[adapter].weight @ core @ module.lora_A[adapter].weight)

    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """``result`` + s · B Λ A dropout(x)."""
        z = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        z = self.form.apply(z, module.lora_core[active_adapter])
        return result + module.lora_B[active_adapter](z) * module.scaling[active_adapter]

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """A new tensor with ΔW added."""
        return orig_weight + self.delta(module, active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:  # type: ignore[override]
        """Adds ΔW in place."""
        orig_weight.data += self.delta(module, active_adapter).to(orig_weight.dtype)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """A tensor with ΔW taken off again."""
        return orig_weight - self.delta(module, active_adapter).to(orig_weight.dtype)
