"""Linear regression on matrices: the theory's setting, through the same trainer, messages and aggregation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..dataset import Row
from .base import Batch, Encoded, Metrics, Task


class Regression(Task):
    """Matrices → numbers; metrics ``relative_error`` √(Σ(ŷ−y)²/Σy²) and ``loss`` (mean square)."""

    def _build(self) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        return self.base.backbone, {}

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Pairs (x, y) of tensors."""
        return Encoded(tuple((torch.as_tensor(row["x"]), torch.as_tensor(row["y"])) for row in rows))

    def collate(self, examples: Sequence[Any]) -> Batch:
        """``x`` (n, D, D) and ``y`` (n,)."""
        x, y = zip(*examples, strict=True)
        return {"x": torch.stack(x), "y": torch.stack(y)}

    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """Mean squared error; one term an example."""
        return F.mse_loss(self.module(batch["x"]), batch["y"]), len(batch["y"])

    @torch.no_grad()
    def measure(self, *, generate: bool) -> Metrics:
        """For Gaussian x and noiseless y the relative error estimates ‖Ŵ − W*‖_F / ‖W*‖_F."""
        self.module.eval()
        if not self.test.examples:
            return {}
        batch = self.collate(self.test.examples)
        residual = self.module(batch["x"]) - batch["y"]
        return {
            "relative_error": float(residual.norm() / batch["y"].norm()),
            "loss": float(residual.square().mean()),
        }
