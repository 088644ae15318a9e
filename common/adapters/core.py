"""The CoLoRA core: h = W0 x + s · B Λ_k A x, with A and B shared and Λ_k personal.

The form is reconstructed from the abstract of arXiv 2602.07218 and its stated complexity O(d r + k r²).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .stacked import linear, scale
from .variant import Variant


@dataclass(frozen=True)
class CoreForm:
    """A parametrization of Λ."""

    initial: Callable[[int], torch.Tensor]  # rank → the parameter for which Λ = I
    zero: Callable[[int], torch.Tensor]  # rank → the parameter for which Λ = 0
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (z = A x, parameter, maybe of each site) → Λ z
    matrix: Callable[[torch.Tensor], torch.Tensor]  # parameter → Λ (r, r)


CORE_FORMS: dict[str, CoreForm] = {
    "full": CoreForm(torch.eye, lambda r: torch.zeros(r, r), linear, lambda core: core),
    "diagonal": CoreForm(torch.ones, torch.zeros, scale, torch.diag),
    "residual": CoreForm(
        lambda r: torch.zeros(r, r),
        lambda r: -torch.eye(r),
        lambda z, core: z + linear(z, core),
        lambda core: torch.eye(core.shape[0], dtype=core.dtype, device=core.device) + core,
    ),
}


class CoreVariant(Variant):
    """h = W0 x + s · B Λ A x, with the parameter of Λ as ``lora_core``."""

    leaf = "lora_core"

    def __init__(self, form: CoreForm) -> None:
        self.form = form

    def initial(self, module: Any, adapter: str) -> torch.Tensor:
        """Return the parameter for which Λ = I."""
        return self.form.initial(module.r[adapter])

    def factor(self, module: Any, adapter: str) -> torch.Tensor:
        """Return s · B Λ, shape (d_out, r)."""
        return module.scaling[adapter] * (module.lora_B[adapter].weight @ self.form.matrix(module.lora_core[adapter]))

    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Return ``result`` + s · B Λ A dropout(x)."""
        z = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        z = self.form.apply(z, module.lora_core[active_adapter])
        return result + module.lora_B[active_adapter](z) * module.scaling[active_adapter]
