"""The tuned generator: a LoRA with which a causal model continues lists of the site's own texts.

This is not part of the paper, where the bare model generates from five seeds. The lists of a small model drift off
topic; after a few steps on lists of real texts they do not. The LoRA is trained on inputs only, never on a label or an
answer. It may repeat texts that it was trained on, so it is personal state.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from ..common.config.schema import TransferSettings
from ..common.dataset import Row, SiteDataset
from ..common.seeds import seed_from
from ..common.tasks.generation import Generation
from ..common.training.loop import StepCallback
from .auxiliary_lora import AuxiliaryLora
from .sampling import numbered_list

BATCH_SIZE = 2  # lists per optimizer step
MAX_TOKENS = 1024  # of one list
ITEM_TOKENS = 4  # at most, for an item's number and line break


class TunedGenerator(AuxiliaryLora):
    """The LoRA of ``transfer.generator.mode = "tuned"``; while it is active, the model generates tuned texts."""

    name = "writer"  # unchanged, as the seed of the initial values derives from it
    title = "tuned generator"

    @classmethod
    def targets_of(cls, settings: TransferSettings) -> tuple[str, ...] | str:
        """Return all linear layers: the attention alone takes three times as many steps."""
        return "all-linear"

    def fit(self, texts: Sequence[str], seeds: int, on_step: StepCallback | None = None) -> float:
        """Train on lists of ``texts`` and return the mean loss per token.

        A list has as many texts as a prompt with ``seeds`` seeds announces, or fewer where the context is too short.
        """
        steps, max_tokens = self.settings.generator.tuning_steps, self._max_tokens()
        longest = max(len(self.base.tokenizer(text)["input_ids"]) for text in texts) + ITEM_TOKENS
        length = max(1, min(2 * seeds, len(texts), max_tokens // longest - 1))
        rows = list(islice(list_rows(texts, length, self.seed), BATCH_SIZE * steps))
        plan = replace(self.plan, model=replace(self.plan.model, max_length=max_tokens))
        task = Generation(SiteDataset("", "generation", rows, ()), self.base, plan)
        return self.train_on(task, steps, BATCH_SIZE, self.settings.generator.tuning_lr, on_step)

    def _max_tokens(self) -> int:
        return min(MAX_TOKENS, getattr(self.base.backbone.config, "max_position_embeddings", MAX_TOKENS))


def list_rows(texts: Sequence[str], length: int, seed: int) -> Iterator[Row]:
    """Yield rows without end: lists of ``length`` different texts, reshuffled when all texts are used."""
    rng = random.Random(seed_from(seed, "lists"))
    while True:
        order = rng.sample(texts, len(texts))
        for start in range(0, len(order) - length + 1, length):
            heading, numbered = numbered_list(order[start : start + length], length).split("\n", 1)
            yield {"prompt": f"{heading}\n1.", "completion": numbered.removeprefix("1.")}
