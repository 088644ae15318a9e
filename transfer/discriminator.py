"""The discriminator φ: a LoRA on a causal model that tells real inputs of a site from synthetic ones.

Trans-LoRA (arXiv 2405.17258), section 3.1. Training maximizes log p("yes" | t(x)) for real inputs and
log p("no" | t(x)) for synthetic ones, with t(x) = ``x \\n Is the above question from NAME dataset?``. The filter
accepts a text iff p(yes) > p(no). The discriminator reads inputs only, never a label or an answer.
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

BATCH_SIZE = 8  # texts per optimizer step
ANSWERS = ("no", "yes")  # indexed by whether the text is real


def question(text: str, dataset_name: str) -> str:
    """t(x): the text followed by the paper's question."""
    return f"{text}\nIs the above question from {dataset_name} dataset?"


def answer_ids(tokenizer: Any, source: str, field: str = "transfer.generator.model") -> tuple[int, int]:
    """Return the token ids of ``no`` and ``yes``.

    Raises ModelError, which names ``field``, where the vocabulary has no single token for one of them.
    """
    for form in (" {}", "{}", " {}".title(), "{}".title()):
        ids = [tokenizer(form.format(word), add_special_tokens=False)["input_ids"] for word in ANSWERS]
        no, yes = ids
        if len(no) == len(yes) == 1 and no != yes and tokenizer.unk_token_id not in (no[0], yes[0]):
            return no[0], yes[0]
    raise ModelError(
        field,
        "a vocabulary with yes and no as single tokens",
        source,
        message=f"{field}: the discriminator needs yes and no as single tokens, which {source} does not have.",
        hint='Choose another model, or set transfer.filter = "none".',
    )


class DiscriminatorTask(Task):
    """A task with rows ``{"text", "real"}``: cross-entropy of the one token after the question."""

    def __init__(self, base: BaseModel, dataset_name: str, rows: Sequence[Row], plan: Plan) -> None:
        self.dataset_name, self.answers = dataset_name, answer_ids(base.tokenizer, plan.model.source)
        super().__init__(SiteDataset("", "generation", rows, ()), base, plan)

    def _build(self) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        assert self.base.language_model is not None
        return self.base.language_model, {}

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Tokenize t(x), with a long x truncated, and pair it with the answer's token id."""
        limit, tokenizer = self.plan.model.max_length, self.base.tokenizer
        ending = tokenizer(question("", self.dataset_name), add_special_tokens=False)["input_ids"]
        max_text = max(1, limit - len(ending))  # tokens left for x
        examples = []
        for row in rows:
            ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"][:max_text] + ending
            examples.append((ids, self.answers[bool(row["real"])]))
        return Encoded(tuple(examples))

    def collate(self, examples: Sequence[Any]) -> Batch:
        """Return ``input_ids`` and ``attention_mask`` (n, longest), padded on the left, and ``labels`` (n,)."""
        batch = {
            "input_ids": pad([ids for ids, _ in examples], self.base.tokenizer.pad_token_id, left=True),
            "attention_mask": pad([[1] * len(ids) for ids, _ in examples], 0, left=True),
            "labels": torch.tensor([answer for _, answer in examples]),
        }
        return {key: value.to(self.base.device) for key, value in batch.items()}

    def made_up(self) -> tuple[Any, Any]:
        """Texts of one word and of several."""
        short, long = self.encode([{"text": "a", "real": True}, {"text": "a a a a", "real": True}]).examples
        return short, long

    def loss_of(self, outputs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, int]:
        """Return the mean of −log p(answer | t(x)), and the number of texts."""
        return F.cross_entropy(outputs, batch["labels"]), len(batch["labels"])

    def outputs(self, batch: Batch) -> torch.Tensor:
        """Return the logits of the token after the question, (n, vocabulary), in fp32."""
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return self.module(**inputs, logits_to_keep=1).logits[:, -1].float()

    def measure(self, *, generate: bool) -> Metrics:
        """Return no metrics: the discriminator's quality shows in the transferred model."""
        return {}


class Discriminator(AuxiliaryLora):
    """The discriminator's LoRA, and the rule p(yes) > p(no)."""

    name = title = "discriminator"

    def __init__(
        self, base: BaseModel, model: ModelSettings, settings: TransferSettings, dataset_name: str, seed: int
    ) -> None:
        super().__init__(base, model, settings, seed)
        self.dataset_name = dataset_name

    @classmethod
    def targets_of(cls, settings: TransferSettings) -> tuple[str, ...] | str:
        """Return ``transfer.discriminator.target_modules``."""
        return settings.discriminator.target_modules

    def fit(self, real: Sequence[str], synthetic: Sequence[str], on_step: StepCallback | None = None) -> float:
        """Train φ on real and synthetic inputs and return the mean loss."""
        rows = [{"text": text, "real": True} for text in real] + [{"text": text, "real": False} for text in synthetic]
        task = DiscriminatorTask(self.base, self.dataset_name, rows, self.plan)
        settings = self.settings.discriminator
        return self.train_on(task, settings.steps, BATCH_SIZE, settings.lr, on_step)

    @torch.no_grad()
    def accepts(self, texts: Sequence[str]) -> list[bool]:
        """Return for each text whether p(yes | t(x)) > p(no | t(x)) under M + φ."""
        if not texts:
            return []
        rows = [{"text": text, "real": True} for text in texts]  # ``real`` is not read
        task = DiscriminatorTask(self.base, self.dataset_name, rows, self.plan)
        task.module.eval()
        no, yes = task.answers
        logits = torch.cat([task.outputs(batch) for batch in task.batches(task.train.examples)])
        return (logits[:, yes] > logits[:, no]).tolist()
