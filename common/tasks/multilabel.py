"""Multi-label classification: any number of labels for each text, with the classification head of the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..config.schema import DataSettings
from ..dataset import Row, labels_of
from ..errors import DataError
from .base import Metrics, Prediction
from .classification import Classification, Label, Linear, logistic_regression, parse_texts
from .columns import RawRow, abbreviated, sorted_labels

THRESHOLD = 0.5  # a label is predicted where its probability is above
FLAGS: dict[Any, bool] = {0: False, 1: True, "0": False, "1": True}  # values of a column that stands for one label


class MultiLabel(Classification):
    """Predicts the labels of each text. Metrics: ``micro_f1``, ``macro_f1``, ``subset_accuracy`` and ``loss``.

    The loss is the binary cross-entropy of a sigmoid for each label, averaged over labels.
    """

    @staticmethod
    def parse_row(raw: RawRow, data: DataSettings) -> Row | None:
        """``{"text", "label"}`` with a tuple of labels, possibly empty; labels that ``data.labels`` lacks are left out.

        They come from a column with a list (``data.label``) or from columns of 0 and 1 (``data.label_columns``).
        """
        texts = parse_texts(raw, data)
        if data.label_columns:
            labels = [name for name in data.label_columns if _flag(raw, name)]
        else:
            labels = raw.column(data.label, "label")
            if not isinstance(labels, list | tuple) or not all(isinstance(label, str | int) for label in labels):
                raise raw.error("label", "a list of labels", type(labels).__name__)
            labels = [raw.label(label) for label in labels]
        kept = [label for label in labels if data.labels is None or label in data.labels]
        return {**texts, "label": tuple(dict.fromkeys(kept))}

    @classmethod
    def check_rows(cls, data: DataSettings, train: Sequence[Row], test: Sequence[Row]) -> tuple[str, ...]:
        """At least one label in training, and no test label that neither training nor the settings have."""
        seen = {label for row in train for label in row["label"]}
        if not seen:
            raise DataError("data.label", "at least one label", "none in the training rows")
        labels = data.labels or data.label_columns or sorted_labels(seen)
        unseen = sorted({label for row in test for label in row["label"]} - set(labels))
        if unseen:
            raise DataError("data.label", f"a label seen in training ({abbreviated(seen)})", repr(unseen[0]))
        return labels

    @property
    def _no_target(self) -> Label:
        """No label."""
        return [0.0] * len(self.rows.labels)

    def _targets(self, rows: Sequence[Row]) -> list[Label]:
        """One number for each label: 1.0 where the row has it, else 0.0."""
        return [[float(label in labels_of(row)) for label in self.rows.labels] for row in rows]

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean binary cross-entropy over labels and examples."""
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))

    def _training_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean binary cross-entropy with ``train.label_smoothing`` and ``train.class_weights``.

        Smoothing by ε takes 1 − ε/2 for 1 and ε/2 for 0. With balanced weights, the texts with a label have the same
        total weight as those without it, for every label: n / (2 · n₁) and n / (2 · n₀) for n training examples.
        """
        train, labels = self.plan.train, labels.to(logits.dtype)
        smooth = labels * (1 - train.label_smoothing) + train.label_smoothing / 2
        if train.class_weights is None:
            return F.binary_cross_entropy_with_logits(logits, smooth)
        without, with_label = self._balance.to(logits)
        return F.binary_cross_entropy_with_logits(logits, smooth, torch.where(labels > 0, with_label, without))

    @cached_property
    def _balance(self) -> torch.Tensor:
        """Weights (2, labels) of the texts without and with each label; 1 where all or none have it."""
        ones = torch.tensor([label for _, label in self.train.examples])
        counts = torch.stack([(ones == 0).sum(0), (ones > 0).sum(0)])
        return torch.where((counts > 0).all(0), len(ones) / 2 / counts.clamp(min=1), 1.0)

    def _probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid()

    def _decide(self, probabilities: Mapping[str, float]) -> Prediction:
        return {"labels": [label for label, p in probabilities.items() if p > THRESHOLD]}

    def _fit(self, x: np.ndarray, labels: Sequence[Label], *, with_offset: bool = True) -> Linear:
        """One logistic regression for each label: the logit of 1 minus the logit of 0."""
        columns = np.array(labels).astype(int).T
        fits = [logistic_regression(x, column.tolist(), 2, with_offset=with_offset) for column in columns]
        return np.stack([w[1] - w[0] for w, _ in fits]), np.stack([b[1] - b[0] for _, b in fits])

    def _scores(self, labels: Sequence[Label], logits: np.ndarray) -> Metrics:
        """Micro-F1, macro-F1 (a label without examples counts 0) and the fraction of label sets that match exactly."""
        expected, predicted = np.array(labels) > 0.5, logits > 0
        hits, decided = (expected & predicted).sum(0), expected.sum(0) + predicted.sum(0)
        return {
            "micro_f1": float(2 * hits.sum() / max(decided.sum(), 1)),
            "macro_f1": float(np.mean(2 * hits / np.maximum(decided, 1))),
            "subset_accuracy": float(np.mean((expected == predicted).all(1))),
        }

    def _row_scores(self, labels: Sequence[Label], predicted: Sequence[int]) -> list[float]:
        """Nothing: micro-F1 is not a mean over texts."""
        return []


def _flag(raw: RawRow, name: str) -> bool:
    value = raw.column(name, "label_columns")
    if not isinstance(value, int | float | str) or value not in FLAGS:
        raise raw.error("label_columns", "0 or 1", repr(value)[:40])
    return FLAGS[value]
