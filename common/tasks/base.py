"""The interface of all tasks."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config.schema import DataSettings, Plan
from ..dataset import TASKS, Row, SiteDataset
from ..errors import DataError
from ..models.base_model import BaseModel
from .columns import RawRow, listed

logger = logging.getLogger("colora.data")

Batch = dict[str, torch.Tensor]
Metrics = dict[str, float]
Prediction = dict[str, Any]  # ``label`` and ``probabilities`` by label, or ``completion``; and ``truncated`` (bool)


@dataclass(frozen=True)
class Encoded:
    """Rows as tensors. ``truncated`` of them were longer than ``max_length``; ``dropped`` had no text to learn from.

    ``refused`` are the positions of dropped rows that the tokenizer's chat template does not accept, with reasons.
    """

    examples: tuple[Any, ...]
    truncated: int = 0
    dropped: int = 0
    refused: tuple[tuple[int, str], ...] = ()


class Task(ABC):
    """One site's task: its model around the shared backbone, its examples, loss and metrics.

    ``module`` is the model that is trained. ``head`` holds the parameters of the head group by name
    (``head.classifier.weight``); it is empty for a task without a head. What processes without torch need to know of a
    task is in its row of ``TASKS``.
    """

    module: nn.Module
    head: dict[str, nn.Parameter]
    row_scores: Sequence[float] = ()
    """The score of each test row in the last ``measure``. Their mean is the primary metric; empty if it is no mean."""

    def __init__(self, rows: SiteDataset, base: BaseModel, plan: Plan) -> None:
        self.rows, self.base, self.plan = rows, base, plan
        self.module, self.head = self._build()
        self.train, self.test = self.encode(rows.train), self.encode(rows.test)
        self.validation = self.encode(rows.validation)
        self._tell_refused("training", self.train, rows.train_numbers)
        self._tell_refused("validation", self.validation, rows.validation_numbers)
        self._tell_refused("test", self.test, rows.test_numbers)

    def _tell_refused(self, kind: str, encoded: Encoded, numbers: Sequence[int]) -> None:
        """Log the rows that were left out since the chat template refuses them. The log stays at the site."""
        if encoded.refused:
            where = listed([numbers[i] if numbers else i + 1 for i, _ in encoded.refused])
            reason = encoded.refused[0][1]
            logger.warning("site %s: %s %s left out: %s", self.rows.site, kind, where, reason)

    @staticmethod
    def parse_row(raw: RawRow, data: DataSettings) -> Row | None:
        """Convert a row of a source to the form of ``encode``; None leaves the row out. Raises DataError.

        Every task of the table overrides this. Tasks that only train an auxiliary model do not read sources.
        """
        raise NotImplementedError

    @staticmethod
    def parse_input(raw: RawRow, data: DataSettings) -> Row | None:
        """Convert a row to the form of ``predict``, without its label or answer; None for one without an input.

        Raises DataError. Tasks with an ``input_column`` override this.
        """
        raise NotImplementedError

    @classmethod
    def check_rows(cls, data: DataSettings, train: Sequence[Row], test: Sequence[Row]) -> tuple[str, ...]:
        """Check the rules that need all rows, and return the site's labels, in order (empty without labels).

        ``train`` and ``test`` are not empty. Raises DataError.
        """
        return ()

    @abstractmethod
    def _build(self) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """The module to train and its head's parameters."""

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Convert rows to examples."""

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> Batch:
        """Make one batch of examples, padded to its longest example, on the model's device."""

    @abstractmethod
    def made_up(self) -> tuple[Any, Any]:
        """Two examples of different lengths that come from no row. Their labels have no meaning."""

    @abstractmethod
    def outputs(self, batch: Batch) -> torch.Tensor:
        """The module's outputs for the rows of a batch, shape (n, …)."""

    @abstractmethod
    def loss_of(self, outputs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, int]:
        """The mean loss over the batch's loss terms, and the number of terms, from the outputs for the same rows."""

    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """The mean loss over the batch's loss terms, and the number of terms."""
        return self.loss_of(self.outputs(batch), batch)

    @abstractmethod
    def measure(self, *, generate: bool) -> Metrics:
        """Metrics of the module on the test examples. ``generate`` includes those that need generated text."""

    def predict(self, rows: Sequence[Row]) -> Iterator[Prediction]:
        """Predict each row, in order; rows need inputs only. Raises DataError for a task without predictions."""
        predictable = " or ".join(name for name, spec in TASKS.items() if spec.input_column)
        raise DataError("task", predictable, self.rows.task)

    def probe(self) -> Metrics | None:
        """Metrics with a head fitted to the frozen features; None for a task without a head."""
        return None

    def fit_head(self) -> bool:
        """Set the head to a fit on the frozen features of the training examples. Returns whether it was set."""
        return False

    def batches(self, examples: Sequence[Any]) -> Iterator[Batch]:
        """Yield evaluation batches in order."""
        size = self.plan.evaluation.batch_size
        for start in range(0, len(examples), size):
            yield self.collate(examples[start : start + size])

    def mean_loss(self, examples: Sequence[Any]) -> float:
        """The mean loss per term over examples; NaN for no terms."""
        total, terms = 0.0, 0
        for batch in self.batches(examples):
            loss, n = self.loss(batch)
            total, terms = total + float(loss) * n, terms + n
        return total / terms if terms else float("nan")


def hash_examples(value: Any) -> str:
    """Return a SHA-256 of examples of any task: the same in every process."""
    state = hashlib.sha256()
    _feed(state, value)
    return state.hexdigest()


def _feed(state: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        state.update(
            f"tensor|{value.dtype}|{tuple(value.shape)}|".encode() + value.cpu().contiguous().numpy().tobytes()
        )
    elif isinstance(value, list | tuple):
        state.update(f"list|{len(value)}|".encode())
        for inner in value:
            _feed(state, inner)
    else:
        state.update(f"{type(value).__name__}|{value!r}|".encode())
    for name, inner in sorted(getattr(value, "__dict__", {}).items()):
        state.update(f"{name}=".encode())
        _feed(state, inner)


def pad(sequences: Sequence[Sequence[int]], value: int, *, left: bool = False) -> torch.Tensor:
    """Pad integer sequences to one (n, longest) tensor."""
    longest = max(map(len, sequences))
    rows = [
        [value] * (longest - len(s)) + list(s) if left else list(s) + [value] * (longest - len(s)) for s in sequences
    ]
    return torch.tensor(rows, dtype=torch.long)
