"""The discriminator φ: a LoRA on a causal model that says whether a text is of the site's kind (paper, section 3.1).

It maximises log p("yes" | t(x)) for real inputs and log p("no" | t(x)) for written ones, with
t(x) = ``x \\n Is the above question from NAME dataset?``; a text is kept iff p(yes) > p(no). It sees inputs only, never
a label or an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..common.config.schema import ModelSettings, Plan, TransferSettings
from ..common.dataset import Row, SiteDataset
from ..common.errors import ModelError
from ..common.models.base_model import BaseModel
from ..common.tasks.base import Batch, Encoded, Metrics, Task, pad
from ..common.training.loop import StepCallback
from .auxiliary_lora import AuxiliaryLora

BATCH = 8
ANSWERS = ("no", "yes")


def question(text: str, about: str) -> str:
    """t(x)."""
    return f"{text}\nIs the above question from {about} dataset?"


def answer_ids(tokenizer: Any, source: str, field: str = "transfer.generator.model") -> tuple[int, int]:
    """The tokens of ``no`` and ``yes``. Raises ModelError where the vocabulary has no single token for one of them."""
    for form in (" {}", "{}", " {}".title(), "{}".title()):
        ids = [tokenizer(form.format(word), add_special_tokens=False)["input_ids"] for word in ANSWERS]
        no, yes = ids
        if len(no) == len(yes) == 1 and no != yes and tokenizer.unk_token_id not in (no[0], yes[0]):
            return no[0], yes[0]
    raise ModelError(field, "a vocabulary with yes and no as single tokens (or transfer.filter = none)", source)


class Verdicts(Task):
    """Rows ``{"text", "real"}`` as a task of the training loop: cross-entropy of the one token after the question."""

    def __init__(self, base: BaseModel, about: str, rows: Sequence[Row], plan: Plan) -> None:
        self.about, self.answers = about, answer_ids(base.tokenizer, plan.model.source)
        super().__init__(SiteDataset("", "generation", rows, ()), base, plan)

    def _build(self) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        assert self.base.language_model is not None
        return self.base.language_model, {}

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Token ids of t(x), the beginning of a long x, and the answer's token."""
        limit, tokenizer = self.plan.model.max_length, self.base.tokenizer
        ending = tokenizer(question("", self.about), add_special_tokens=False)["input_ids"]
        room = max(1, limit - len(ending))
        examples = []
        for row in rows:
            ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"][:room] + ending
            examples.append((ids, self.answers[bool(row["real"])]))
        return Encoded(tuple(examples))

    def collate(self, examples: Sequence[Any]) -> Batch:
        """``input_ids``, ``attention_mask`` (n, longest), padded at the left, and ``labels`` (n,)."""
        batch = {
            "input_ids": pad([ids for ids, _ in examples], self.base.tokenizer.pad_token_id, left=True),
            "attention_mask": pad([[1] * len(ids) for ids, _ in examples], 0, left=True),
            "labels": torch.tensor([answer for _, answer in examples]),
        }
        return {key: value.to(self.base.device) for key, value in batch.items()}

    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """−log p(answer | t(x)); one term a text."""
        return F.cross_entropy(self.last_logits(batch), batch["labels"]), len(batch["labels"])

    def last_logits(self, batch: Batch) -> torch.Tensor:
        """Logits of the token after the question, (n, vocabulary), in fp32."""
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return self.module(**inputs, logits_to_keep=1).logits[:, -1].float()

    def measure(self, *, generate: bool) -> Metrics:
        """Nothing: a discriminator is judged by what comes of what it keeps."""
        return {}


class Discriminator(AuxiliaryLora):
    """The LoRA on its model, and the rule p(yes) > p(no)."""

    name = "discriminator"

    def __init__(
        self, base: BaseModel, model: ModelSettings, settings: TransferSettings, about: str, seed: int
    ) -> None:
        super().__init__(base, model, settings, seed)
        self.about = about

    @classmethod
    def targets_of(cls, settings: TransferSettings) -> tuple[str, ...] | str:
        """``transfer.discriminator.target_modules``."""
        return settings.discriminator.target_modules

    def fit(self, real: Sequence[str], written: Sequence[str], watch: StepCallback | None = None) -> float:
        """Trains φ on inputs and on what the model wrote; returns the mean loss."""
        rows = [{"text": text, "real": True} for text in real] + [{"text": text, "real": False} for text in written]
        task = Verdicts(self.base, self.about, rows, self.plan)
        return self.learn(task, self.settings.discriminator.steps, BATCH, self.settings.discriminator.lr, watch)

    @torch.no_grad()
    def accepts(self, texts: Sequence[str]) -> list[bool]:
        """Whether p(yes | t(x)) > p(no | t(x)) under M + φ, for each text."""
        if not texts:
            return []
        task = Verdicts(self.base, self.about, [{"text": text, "real": True} for text in texts], self.plan)
        task.module.eval()
        no, yes = task.answers
        logits = torch.cat([task.last_logits(batch) for batch in task.batches(task.train.examples)])
        return (logits[:, yes] > logits[:, no]).tolist()
