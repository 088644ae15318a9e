"""Heterogeneous linear regression, the theory setting of the CoLoRA paper (arXiv 2602.07218), as a model source.

``synthetic:bilinear-D`` is one D×D linear layer W, initially zero, that predicts ⟨X, W⟩ for a D×D matrix X. The
adapter's ΔW then estimates W_k*.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import nn

from ..errors import ModelError
from ..foreign_text import clean

PREFIX = "synthetic:"
MAX_SIZE = 4096  # of D: W has 64 MiB
_FORM = re.compile(r"synthetic:bilinear-([1-9][0-9]{0,3})")  # ASCII digits only, which int() reads


class Bilinear(nn.Module):
    """y = ⟨X, W⟩ = Σ_ij X_ij W_ij, written as the trace of X Wᵀ so that W is an ordinary ``nn.Linear``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(size, size, bias=False)
        nn.init.zeros_(self.proj.weight)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, D, D) → (n,)."""
        return self.proj(x).diagonal(dim1=-2, dim2=-1).sum(-1)


def model_of(source: str) -> Bilinear:
    """Build the model of a ``synthetic:bilinear-D`` source. Raises ModelError for any other source, or a larger D."""
    form = _FORM.fullmatch(source)
    if form is None or int(form[1]) > MAX_SIZE:
        shown = clean(source)
        message = f"There is no synthetic model {shown!r}."
        hint = f"Use synthetic:bilinear-D with a number D from 1 to {MAX_SIZE}."
        raise ModelError("model.source", "synthetic:bilinear-D", shown, message=message, hint=hint)
    return Bilinear(int(form[1]))


def regression_truth(seed: int, tasks: int, *, mixed: bool = False, size: int = 20, rank: int = 3) -> np.ndarray:
    """Draw W_k* = U* Λ_k* V*ᵀ with orthonormal U*, V* and Gaussian Λ_k*, shape (tasks, size, size).

    With ``mixed``, every second task has its own U* and V*; the first task and those between have common ones.
    """
    rng = np.random.default_rng(seed)

    def subspaces() -> tuple[np.ndarray, np.ndarray]:
        u, v = (np.linalg.qr(rng.standard_normal((size, rank)))[0] for _ in range(2))
        return u, v

    common, truths = subspaces(), []
    for k in range(tasks):
        u, v = subspaces() if mixed and k % 2 else common
        truths.append(u @ rng.standard_normal((rank, rank)) @ v.T)
    return np.stack(truths)


def regression_rows(truth: np.ndarray, rows: int, noise: float, seed: int) -> dict[str, np.ndarray]:
    """Draw Gaussian ``x`` (rows, D, D) and ``y`` = ⟨x, truth⟩ + noise (rows,), in fp32."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, *truth.shape))
    y = np.einsum("nij,ij->n", x, truth) + noise * rng.standard_normal(rows)
    return {"x": x.astype(np.float32), "y": y.astype(np.float32)}
