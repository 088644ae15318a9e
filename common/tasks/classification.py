"""Sequence classification with the architecture's own head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..rows import Row
from .task import Batch, Encoded, Metrics, Prediction, Task, pad


class Classification(Task):
    """Texts → labels; metrics ``accuracy``, ``macro_f1`` and ``loss``."""

    def _build(self) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        module, self._head = self.base.classifier(len(self.rows.labels))
        return module, self.base.head_parameters(self._head)

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Token ids and class indices; texts without a token are dropped."""
        index = {label: i for i, label in enumerate(self.rows.labels)}
        kept = [row for row in rows if row["text"].strip()]
        if not kept:
            return Encoded((), dropped=len(rows))
        limit = self.plan.model.max_length
        ids = self.base.tokenizer([row["text"] for row in kept], verbose=False)["input_ids"]
        cut = self.base.tokenizer([row["text"] for row in kept], truncation=True, max_length=limit)["input_ids"]
        targets = [row.get("probabilities") or index[row["label"]] for row in kept]
        examples = tuple(zip(cut, targets, strict=True))
        return Encoded(examples, sum(len(i) > limit for i in ids), len(rows) - len(kept))

    def collate(self, examples: Sequence[Any]) -> Batch:
        """``input_ids`` and ``attention_mask`` (n, longest), ``labels`` (n,), or (n, classes) of probabilities."""
        ids = [tokens for tokens, _ in examples]
        batch = {
            "input_ids": pad(ids, self.base.tokenizer.pad_token_id),
            "attention_mask": pad([[1] * len(i) for i in ids], 0),
            "labels": torch.tensor([label for _, label in examples]),
        }
        return {key: value.to(self.base.device) for key, value in batch.items()}

    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """Cross-entropy; one term an example."""
        labels = batch["labels"]
        return F.cross_entropy(self._logits(batch), labels), len(labels)

    @torch.no_grad()
    def measure(self, *, generate: bool) -> Metrics:
        """Accuracy, macro-F1 over the site's labels, and loss on the test texts."""
        self.module.eval()
        if not self.test.examples:
            return {}
        pairs = [(self._logits(batch), batch["labels"]) for batch in self.batches(self.test.examples)]
        logits, labels = (torch.cat(part).cpu() for part in zip(*pairs, strict=True))
        return self._scores([_likeliest(label) for label in labels.tolist()], logits.argmax(-1)) | {
            "loss": F.cross_entropy(logits, labels).item()
        }

    @torch.no_grad()
    def predict(self, rows: Sequence[Row]) -> Iterator[Prediction]:
        """The likeliest label, and the probabilities of all labels."""
        self.module.eval()
        size, limit = self.plan.evaluation.batch_size, self.plan.model.max_length
        for start in range(0, len(rows), size):
            whole = self.base.tokenizer([row["text"] for row in rows[start : start + size]], verbose=False)["input_ids"]
            encoded = self.base.tokenizer(
                [row["text"] for row in rows[start : start + size]], truncation=True, max_length=limit
            )["input_ids"]
            logits = self._logits(self.collate([(ids, 0) for ids in encoded]))
            for ids, given in zip(whole, logits.float().softmax(-1).tolist(), strict=True):
                found = dict(zip(self.rows.labels, given, strict=True))
                yield {
                    "label": max(found, key=found.__getitem__),
                    "probabilities": found,
                    "truncated": len(ids) > limit,
                }

    @torch.no_grad()
    def probe(self) -> Metrics | None:
        """A multinomial logistic regression on what the head would see, fitted on the site's training texts.

        The same data and features give the same head, so two backbones can be compared where heads are personal.
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if not self.test.examples:
            return {}
        (x, y), (x_test, y_test) = self._features(self.train.examples), self._features(self.test.examples)
        if len(set(y)) < 2:
            return self._scores(y_test, y[:1] * len(y_test))
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500)).fit(x, y)
        return self._scores(y_test, fitted.predict(x_test))

    def _logits(self, batch: Batch) -> torch.Tensor:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return self.module(**inputs).logits

    def _features(self, examples: Sequence[Any]) -> tuple[Any, Any]:
        self.module.eval()
        for name in self._head:
            setattr(self.module, name, nn.Identity())
        try:
            found = [self._logits(batch) for batch in self.batches(examples)]
        finally:
            for name, module in self._head.items():
                setattr(self.module, name, module)
        # a head that pools by itself (RoBERTa's) is handed the whole sequence and reads its first token
        pooled = torch.cat([f[:, 0] if f.dim() == 3 else f for f in found])
        return pooled.cpu().double().numpy(), [_likeliest(label) for _, label in examples]

    def _scores(self, labels: Any, predicted: Any) -> Metrics:
        from sklearn.metrics import accuracy_score, f1_score

        classes = list(range(len(self.rows.labels)))
        f1 = f1_score(labels, predicted, labels=classes, average="macro", zero_division=0)  # type: ignore[arg-type]
        return {"accuracy": float(accuracy_score(labels, predicted)), "macro_f1": float(f1)}


def _likeliest(label: int | list[float]) -> int:
    """The class of an example whose label may be probabilities."""
    return label if isinstance(label, int) else max(range(len(label)), key=label.__getitem__)
