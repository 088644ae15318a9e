"""A writer that has learnt from the site's texts: a LoRA with which the model goes on with lists of them.

Not of the paper, where the bare model writes after the five seeds. A small model's lists wander off; after a few steps
on lists of real texts they stay with the site's kind. It sees inputs only, never a label or an answer; what it has seen
it may write again, so it is as personal as they are.
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
from .sampling import list_of

LISTS = 2  # in a batch
WINDOW = 1024  # tokens of a list at most
NUMBER = 4  # tokens of an item's number and line, at most


class TunedGenerator(AuxiliaryLora):
    """The LoRA on its model; while it is active, the model writes as ``transfer.generator.mode = "tuned"`` means."""

    name = "writer"

    @classmethod
    def targets_of(cls, settings: TransferSettings) -> tuple[str, ...] | str:
        """All linear layers: on the attention alone it takes three times the steps."""
        return "all-linear"

    def fit(self, texts: Sequence[str], seeds: int, watch: StepCallback | None = None) -> float:
        """Trains on lists of ``texts``, of the length that so many seeds ask for; returns the mean loss per token."""
        steps, room = self.settings.generator.tuning_steps, self._room()
        longest = max(len(self.base.tokenizer(text)["input_ids"]) for text in texts) + NUMBER
        length = max(1, min(2 * seeds, len(texts), room // longest - 1))
        rows = list(islice(lists(texts, length, self.seed), LISTS * steps))
        plan = replace(self.plan, model=replace(self.plan.model, max_length=room))
        task = Generation(SiteDataset("", "generation", rows, ()), self.base, plan)
        return self.learn(task, steps, LISTS, self.settings.generator.tuning_lr, watch)

    def _room(self) -> int:
        return min(WINDOW, getattr(self.base.backbone.config, "max_position_embeddings", WINDOW))


def lists(texts: Sequence[str], length: int, seed: int) -> Iterator[Row]:
    """Rows without end: lists of so many different texts, drawn anew when the texts are used up."""
    rng = random.Random(seed_from(seed, "lists"))
    while True:
        order = rng.sample(texts, len(texts))
        for start in range(0, len(order) - length + 1, length):
            heading, numbered = list_of(order[start : start + length], length).split("\n", 1)
            yield {"prompt": f"{heading}\n1.", "completion": numbered.removeprefix("1.")}
