"""Sequence classification with the architecture's own head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..dataset import Row
from .base import Batch, Encoded, Metrics, Prediction, Task, pad

Label = int | list[float]  # a class, or the probabilities of all
UNSEEN = -10.0  # the logit of a class without an example, where a head has offsets
NEGLIGIBLE = 0.01  # a probability below which a class is no label of an example: not to copy it for every class


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
        """A logistic regression on what the head would see, fitted on the site's training texts.

        The same data and features give the same head, so two backbones can be compared where heads are personal.
        """
        if not self.test.examples:
            return {}
        weights, offsets = _regression(*self._features(self.train.examples), len(self.rows.labels))
        x, labels = self._features(self.test.examples)
        return self._scores(list(map(_likeliest, labels)), (x @ weights.T + offsets).argmax(1))

    @torch.no_grad()
    def fit_head(self) -> bool:
        """Sets the head to the regression of :meth:`probe`; False where it is more than one linear layer.

        Features are of one text at a time, and so of no batch's padding: the same texts give the same bits.
        """
        (head,) = self._head.values() if len(self._head) == 1 else (None,)
        if not isinstance(head, nn.Linear):
            return False
        alone = [self._features([example]) for example in self.train.examples]
        x, labels = np.concatenate([features for features, _ in alone]), [label for _, (label,) in alone]
        weights, offsets = _regression(x, labels, len(self.rows.labels), with_offset=head.bias is not None)
        head.weight.copy_(torch.as_tensor(weights))
        if head.bias is not None:
            head.bias.copy_(torch.as_tensor(offsets))
        return True

    def _logits(self, batch: Batch) -> torch.Tensor:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return self.module(**inputs).logits

    def _features(self, examples: Sequence[Any]) -> tuple[np.ndarray, list[Label]]:
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
        return pooled.cpu().double().numpy(), [label for _, label in examples]

    def _scores(self, labels: Any, predicted: Any) -> Metrics:
        from sklearn.metrics import accuracy_score, f1_score

        classes = list(range(len(self.rows.labels)))
        f1 = f1_score(labels, predicted, labels=classes, average="macro", zero_division=0)  # type: ignore[arg-type]
        return {"accuracy": float(accuracy_score(labels, predicted)), "macro_f1": float(f1)}


def _regression(
    x: np.ndarray, labels: Sequence[Label], classes: int, *, with_offset: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (classes, d) and offsets (classes,) of a multinomial logistic regression on features x (n, d).

    The penalty is L2 on weights of scaled features (C = 0.1); probabilities weigh an example's classes. On one thread,
    so that the bits do not hang on how many there are.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    shares = np.array([np.eye(classes)[label] if isinstance(label, int) else label for label in labels])
    example, label = np.nonzero(shares >= NEGLIGIBLE)
    weights, offsets = np.zeros((classes, x.shape[1])), np.full(classes, UNSEEN)
    seen = np.unique(label)
    offsets[seen] = 0.0
    if len(seen) == 1:
        return weights, offsets
    with threadpool_limits(1):
        scaler = StandardScaler(with_mean=with_offset).fit(x)
        fitted = LogisticRegression(C=0.1, max_iter=500, fit_intercept=with_offset)
        fitted.fit(scaler.transform(x)[example], label, shares[example, label])
        rows = fitted.coef_ / scaler.scale_
        cuts = fitted.intercept_ - (rows @ scaler.mean_ if with_offset else 0.0)
    if len(seen) == 2:  # sklearn tells the second's against the first
        rows, cuts = np.concatenate([-rows, rows]) / 2, np.concatenate([-cuts, cuts]) / 2
    weights[seen], offsets[seen] = rows, cuts
    return weights, offsets


def _likeliest(label: Label) -> int:
    """The class of an example whose label may be probabilities."""
    return label if isinstance(label, int) else max(range(len(label)), key=label.__getitem__)
