"""Sequence classification with the classification head of the base model's architecture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..config.schema import DataSettings
from ..dataset import Row
from ..errors import DataError
from ..models.tokenizer import padding_side
from .base import Batch, Encoded, Metrics, Prediction, Task, pad
from .columns import RawRow, abbreviated, sorted_labels
from .tokens import TextEncoder, Tokens

Label = int | list[float]  # the index of a class, or one number for each class
Linear = tuple[np.ndarray, np.ndarray]  # weights (classes, d) and offsets (classes,)
UNSEEN = -10.0  # the offset (logit) of a class without an example
PADDED, SAME = 16, 1e-4  # length of a text that pads another, and the relative difference of logits that is rounding
NEGLIGIBLE = 0.01  # probabilities below it are ignored in the fit, which copies an example for each of its classes


def parse_texts(raw: RawRow, data: DataSettings) -> Row:
    """``{"text"}`` of a row or, with ``data.text_pair``, ``{"text", "text_pair"}``."""
    pair = {"text_pair": raw.text(data.text_pair, "text_pair")} if data.text_pair else {}
    return {"text": raw.text(data.text, "text"), **pair}


class Classification(Task):
    """Predicts one label for each text. Metrics: ``accuracy``, ``macro_f1`` and ``loss``."""

    @staticmethod
    def parse_row(raw: RawRow, data: DataSettings) -> Row | None:
        """``{"text", "label"}``, perhaps with ``"text_pair"``; None where ``data.labels`` lacks the label."""
        raw.column(data.text, "text")  # the first to be named where both are missing
        label = raw.column(data.label, "label")
        if data.labels is not None and isinstance(label, str) and not label.strip():
            return None
        row = {**parse_texts(raw, data), "label": raw.label(label)}
        return row if data.labels is None or row["label"] in data.labels else None

    @staticmethod
    def parse_input(raw: RawRow, data: DataSettings) -> Row | None:
        """``{"text"}``, perhaps with ``"text_pair"``; None for a blank text."""
        keys = [key for key in ("text", "text_pair") if getattr(data, key)]
        values = {key: raw.column(getattr(data, key), key) for key in keys}
        texts = {key: "" if value is None else str(value) for key, value in values.items()}
        return texts if texts["text"].strip() else None

    @classmethod
    def check_rows(cls, data: DataSettings, train: Sequence[Row], test: Sequence[Row]) -> tuple[str, ...]:
        """At least two labels in training, and no test label that training lacks."""
        seen = {row["label"] for row in train}
        unseen = sorted({row["label"] for row in test} - seen)
        if unseen:
            raise DataError("data.label", f"a label seen in training ({abbreviated(seen)})", repr(unseen[0]))
        if len(seen) < 2:
            raise DataError("data.label", "at least two classes", f"only {abbreviated(seen)}")
        return data.labels or sorted_labels(seen)

    def _build(self) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        module, self._head = self.base.classifier(len(self.rows.labels))
        config: Any = module.config
        end = config.eos_token_id if config.is_encoder_decoder else None
        self.encoder = TextEncoder(self.base.tokenizer, self.plan.model.max_length, end)
        self.encoder.check_end(config.model_type)
        return module, self.base.head_parameters(self._head)

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Token ids and targets; blank texts are dropped."""
        kept = [row for row in rows if row["text"].strip()]
        if not kept:
            return Encoded((), dropped=len(rows))
        encoded = self.encoder(kept)
        examples = tuple(zip(encoded, self._targets(kept), strict=True))
        return Encoded(examples, sum(tokens.truncated for tokens in encoded), len(rows) - len(kept))

    def collate(self, examples: Sequence[Any]) -> Batch:
        """``input_ids`` and ``attention_mask`` (n, longest); ``labels`` (n,), or (n, classes) of probabilities.

        Pairs of texts have ``token_type_ids`` (n, longest), too, where the tokenizer makes them.
        """
        ids = [tokens for tokens, _ in examples]
        left = padding_side(self.base.config, generates=False) == "left"
        batch = {
            "input_ids": pad(ids, self.base.tokenizer.pad_token_id, left=left),
            "attention_mask": pad([[1] * len(i) for i in ids], 0, left=left),
            "labels": torch.tensor([label for _, label in examples]),
        }
        if any(tokens.types for tokens in ids):
            batch["token_type_ids"] = pad([tokens.types for tokens in ids], 0, left=left)
        return {key: value.to(self.base.device) for key, value in batch.items()}

    def made_up(self) -> tuple[Any, Any]:
        """Texts of one word and of many."""
        short, long = self.encoder([{"text": "a"}, {"text": "a " * PADDED}])
        return (short, self._no_target), (long, self._no_target)

    def outputs(self, batch: Batch) -> torch.Tensor:
        """The logits (n, classes)."""
        return self._logits(batch)

    def loss_of(self, outputs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, int]:
        """The mean training loss over the examples; one term per example."""
        return self._training_loss(outputs, batch["labels"]), len(batch["labels"])

    @torch.no_grad()
    def measure(self, *, generate: bool) -> Metrics:
        """The task's scores over the site's labels, and the loss on the test texts."""
        self.module.eval()
        if not self.test.examples:
            return {}
        logits = self._in_batches(self.test.examples).cpu()
        labels = self.collate(self.test.examples)["labels"].cpu()
        scores, self.row_scores = logits.float().numpy(), self._row_scores(labels.tolist(), logits.argmax(1).tolist())
        return self._scores(labels.tolist(), scores) | {"loss": self._loss(logits, labels).item()}

    @torch.no_grad()
    def predict(self, rows: Sequence[Row]) -> Iterator[Prediction]:
        """The most probable label, and the probabilities of all labels."""
        self.module.eval()
        size = self.plan.evaluation.batch_size
        for start in range(0, len(rows), size):
            encoded = self.encoder(rows[start : start + size])
            logits = self._logits_alone(encoded)
            for tokens, given in zip(encoded, self._probabilities(logits.float()).tolist(), strict=True):
                probabilities = dict(zip(self.rows.labels, given, strict=True))
                yield {**self._decide(probabilities), "probabilities": probabilities, "truncated": tokens.truncated}

    def _logits_alone(self, tokens: Sequence[Tokens]) -> torch.Tensor:
        """The logits of texts as if each were alone in its batch."""
        groups = [list(range(len(tokens)))]
        if not self._ignores_padding:
            groups = [[i for i, each in enumerate(tokens) if len(each) == n] for n in sorted(set(map(len, tokens)))]
        logits = torch.cat([self._logits(self.collate([(tokens[i], 0) for i in group])) for group in groups])
        order = [i for group in groups for i in group]
        return logits[torch.tensor(order).argsort().to(logits.device)]

    @cached_property
    def _ignores_padding(self) -> bool:
        """Whether padding leaves a text's logits as they are. Convolutions and some approximate attentions read it."""
        short, long = self.encoder([{"text": "a"}, {"text": "a " * PADDED}])
        alone = self._logits(self.collate([(short, 0)]))[0].float()
        beside = self._logits(self.collate([(short, 0), (long, 0)]))[0].float()
        return bool((alone - beside).abs().max() <= SAME * alone.abs().max())

    @torch.no_grad()
    def probe(self) -> Metrics | None:
        """Metrics of a logistic regression on the head's inputs, fitted on the site's training texts.

        The same data and features give the same head, so backbones can be compared where heads are personal.
        """
        if not self.test.examples:
            return {}
        weights, offsets = self._fit(*self._features(self.train.examples))
        x, labels = self._features(self.test.examples)
        return self._scores(labels, x @ weights.T + offsets)

    @torch.no_grad()
    def fit_head(self) -> bool:
        """Set the head to the regression of ``probe``. Returns False for a head of more than one linear layer.

        Features are computed one text at a time, without padding: the same texts give bit-identical features.
        """
        (head,) = self._head.values() if len(self._head) == 1 else (None,)
        if not isinstance(head, nn.Linear):
            return False
        single = [self._features([example]) for example in self.train.examples]
        x, labels = np.concatenate([features for features, _ in single]), [label for _, (label,) in single]
        weights, offsets = self._fit(x, labels, with_offset=head.bias is not None)
        head.weight.copy_(torch.as_tensor(weights))
        if head.bias is not None:
            head.bias.copy_(torch.as_tensor(offsets))
        return True

    # What follows is all that depends on how many labels a text has.

    @property
    def _no_target(self) -> Label:
        """A target that no row gave."""
        return 0

    def _targets(self, rows: Sequence[Row]) -> list[Label]:
        """The target of each row: the index of its class, or probabilities of all classes where the row has them."""
        index = {label: i for i, label in enumerate(self.rows.labels)}
        return [row.get("probabilities") or index[row["label"]] for row in rows]

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy."""
        return F.cross_entropy(logits, labels)

    def _training_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy with ``train.label_smoothing`` and ``train.class_weights``.

        With balanced weights an example counts n / (K · n_k), for n training examples, K labels with examples and n_k
        examples of its own label. The weights of all training examples have the mean 1, so that the loss of a batch is
        the mean of the losses of its parts.
        """
        train = self.plan.train
        if train.class_weights is None and not train.label_smoothing:
            return self._loss(logits, labels)
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=train.label_smoothing)
        if train.class_weights == "balanced":
            weights = self._class_weights.to(logits)
            losses = losses * (weights[labels] if labels.dim() == 1 else labels.to(weights) @ weights)
        return losses.mean()

    @cached_property
    def _class_weights(self) -> torch.Tensor:
        """The weight (classes,) of an example of each class; 0 for a class without training examples."""
        counts = torch.zeros(len(self.rows.labels))
        for _, label in self.train.examples:
            counts += torch.eye(len(counts))[label] if isinstance(label, int) else torch.tensor(label)
        return torch.where(counts > 0, counts.sum() / (counts > 0).sum() / counts.clamp(min=1e-12), 0.0)

    def _probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(-1)

    def _decide(self, probabilities: Mapping[str, float]) -> Prediction:
        """The prediction from the probabilities of the labels."""
        return {"label": max(probabilities, key=probabilities.__getitem__)}

    def _fit(self, x: np.ndarray, labels: Sequence[Label], *, with_offset: bool = True) -> Linear:
        """Weights (classes, d) and offsets (classes,) fitted on features x (n, d)."""
        return logistic_regression(x, labels, len(self.rows.labels), with_offset=with_offset)

    def _scores(self, labels: Sequence[Label], logits: np.ndarray) -> Metrics:
        """Accuracy and macro-F1 of logits (n, classes)."""
        from sklearn.metrics import accuracy_score, f1_score

        expected, predicted = list(map(_most_probable, labels)), logits.argmax(1)
        classes = list(range(len(self.rows.labels)))
        f1 = f1_score(expected, predicted, labels=classes, average="macro", zero_division=0)  # type: ignore[arg-type]
        return {"accuracy": float(accuracy_score(expected, predicted)), "macro_f1": float(f1)}

    def _row_scores(self, labels: Sequence[Label], predicted: Sequence[int]) -> list[float]:
        """1.0 for each text whose label is predicted, else 0.0."""
        return [float(_most_probable(label) == p) for label, p in zip(labels, predicted, strict=True)]

    # The module and its features.

    def _logits(self, batch: Batch) -> torch.Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return self.module(**inputs).logits

    def _in_batches(self, examples: Sequence[Any]) -> torch.Tensor:
        """The outputs (n, …) for examples, in their order. Texts of similar length share a batch: less padding."""

        def length(i: int) -> int:
            return len(examples[i][0])

        order = sorted(range(len(examples)), key=length)
        groups = [order] if self._ignores_padding else [list(group) for _, group in groupby(order, length)]
        outputs = [self._logits(batch) for group in groups for batch in self.batches([examples[i] for i in group])]
        # a head that pools by itself receives the whole sequence: RoBERTa's reads its first token, XLNet's its last
        read = -1 if padding_side(self.base.config, generates=False) == "left" else 0
        ordered = torch.cat([output[:, read] if output.dim() == 3 else output for output in outputs])
        return ordered[torch.tensor(order).argsort().to(ordered.device)]

    def _features(self, examples: Sequence[Any]) -> tuple[np.ndarray, list[Label]]:
        self.module.eval()
        _ = self._ignores_padding  # found with the head
        for name in self._head:
            setattr(self.module, name, nn.Identity())
        try:
            pooled = self._in_batches(examples)
        finally:
            for name, module in self._head.items():
                setattr(self.module, name, module)
        return pooled.cpu().double().numpy(), [label for _, label in examples]


def logistic_regression(x: np.ndarray, labels: Sequence[Label], classes: int, *, with_offset: bool = True) -> Linear:
    """Weights (classes, d) and offsets (classes,) of a multinomial logistic regression on features x (n, d).

    The penalty is L2 on the weights of standardized features (C = 0.1). Probabilities weight an example's classes. The
    fit uses one thread, so that its bits do not depend on the number of threads.
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
    if len(seen) == 2:  # scikit-learn returns the weights of the second class against the first
        rows, cuts = np.concatenate([-rows, rows]) / 2, np.concatenate([-cuts, cuts]) / 2
    weights[seen], offsets[seen] = rows, cuts
    return weights, offsets


def _most_probable(label: Label) -> int:
    """The class of an example, whose label may be probabilities."""
    return label if isinstance(label, int) else max(range(len(label)), key=label.__getitem__)
