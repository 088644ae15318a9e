"""Linear regression on matrices: the setting of the theory, with the same trainer, messages and aggregation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..config.schema import DataSettings
from ..dataset import Row
from ..errors import DataError
from .base import Batch, Encoded, Metrics, Task
from .columns import RawRow


class Regression(Task):
    """Predicts numbers from matrices. Metrics: ``relative_error`` √(Σ(ŷ−y)²/Σy²) and ``loss`` (mean square)."""

    @staticmethod
    def parse_row(raw: RawRow, data: DataSettings) -> Row | None:
        """``{"x", "y"}`` of fp32 arrays."""
        return {name: raw.array(name, name) for name in ("x", "y")}

    @classmethod
    def check_rows(cls, data: DataSettings, train: Sequence[Row], test: Sequence[Row]) -> tuple[str, ...]:
        """All x have one shape, and all y have one shape."""
        for name in ("x", "y"):
            shapes = sorted({np.shape(row[name]) for row in (*train, *test)})
            if len(shapes) > 1:
                raise DataError(f"data.{name}", f"one shape in every row, {shapes[0]}", str(shapes[1]))
        return ()

    def _build(self) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        return self.base.backbone, {}

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Pairs (x, y) of tensors."""
        return Encoded(tuple((torch.as_tensor(row["x"]), torch.as_tensor(row["y"])) for row in rows))

    def collate(self, examples: Sequence[Any]) -> Batch:
        """``x`` (n, D, D) and ``y`` (n,)."""
        x, y = zip(*examples, strict=True)
        return {"x": torch.stack(x), "y": torch.stack(y)}

    def made_up(self) -> tuple[Any, Any]:
        """Two random matrices."""
        x, y = self.train.examples[0]
        generator = torch.Generator().manual_seed(0)
        first, second = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(2))
        return (first, torch.zeros_like(y)), (second, torch.zeros_like(y))

    def outputs(self, batch: Batch) -> torch.Tensor:
        """The predictions (n,)."""
        return self.module(batch["x"])

    def loss_of(self, outputs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, int]:
        """Mean squared error; one term an example."""
        return F.mse_loss(outputs, batch["y"]), len(batch["y"])

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
