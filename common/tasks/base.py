"""What every task offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config.schema import Plan
from ..dataset import Row, SiteDataset
from ..errors import DataError
from ..models.base_model import BaseModel

Batch = dict[str, torch.Tensor]
Metrics = dict[str, float]
Prediction = dict[str, Any]  # ``label`` and ``probabilities`` by label, or ``completion``; ``truncated`` where it was


@dataclass(frozen=True)
class Encoded:
    """Rows as tensors. ``truncated`` were longer than ``max_length``; ``dropped`` had nothing to learn from."""

    examples: tuple[Any, ...]
    truncated: int = 0
    dropped: int = 0


class Task(ABC):
    """One site's task: its model around the shared backbone, its examples, loss and metrics.

    ``module`` is the model that is trained; ``head`` holds the parameters
    of the head group by name (``head.classifier.weight``), empty where a task has none.
    """

    module: nn.Module
    head: dict[str, nn.Parameter]

    def __init__(self, rows: SiteDataset, base: BaseModel, plan: Plan) -> None:
        self.rows, self.base, self.plan = rows, base, plan
        self.module, self.head = self._build()
        self.train, self.test = self.encode(rows.train), self.encode(rows.test)

    @abstractmethod
    def _build(self) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """The module to train and its head's parameters."""

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Rows → examples."""

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> Batch:
        """Examples → one batch, padded to its longest example, on the model's device."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """The mean loss over the batch's loss terms, and how many terms it has."""

    @abstractmethod
    def measure(self, *, generate: bool) -> Metrics:
        """Metrics of the module as it stands on the test examples. ``generate`` also asks for the dear ones."""

    def predict(self, rows: Sequence[Row]) -> Iterator[Prediction]:
        """What the module as it stands says to each row, in order, for rows with inputs only. Raises DataError."""
        raise DataError("task", "classification or generation", self.rows.task)

    def probe(self) -> Metrics | None:
        """Metrics with a head fitted to the frozen features; None where the head is no part of the question."""
        return None

    def fit_head(self) -> bool:
        """Sets the head to what fits the frozen features of the training examples; False where nothing was set."""
        return False

    def batches(self, examples: Sequence[Any]) -> Iterator[Batch]:
        """Evaluation batches in order."""
        size = self.plan.evaluation.batch_size
        for start in range(0, len(examples), size):
            yield self.collate(examples[start : start + size])

    def mean_loss(self, examples: Sequence[Any]) -> float:
        """The loss per term over examples; NaN for none."""
        total, terms = 0.0, 0
        for batch in self.batches(examples):
            loss, n = self.loss(batch)
            total, terms = total + float(loss) * n, terms + n
        return total / terms if terms else float("nan")


def pad(sequences: Sequence[Sequence[int]], value: int, *, left: bool = False) -> torch.Tensor:
    """Integer sequences as one (n, longest) tensor."""
    longest = max(map(len, sequences))
    rows = [
        [value] * (longest - len(s)) + list(s) if left else list(s) + [value] * (longest - len(s)) for s in sequences
    ]
    return torch.tensor(rows, dtype=torch.long)
