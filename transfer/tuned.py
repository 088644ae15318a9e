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

from ..common.rows import Row, SiteRows
from ..common.seeds import seed_from
from ..common.settings import TransferSettings
from ..common.tasks.generation import Generation
from .lora import OwnLora
from .writing import list_of

LISTS = 2  # in a batch
WINDOW = 1024  # tokens of a list that are read at most


class TunedWriter(OwnLora):
    """The LoRA on its model; while it is active, the model writes as ``transfer.writer = "tuned"`` means."""

    name = "writer"

    @classmethod
    def targets_of(cls, settings: TransferSettings) -> tuple[str, ...] | str:
        """All linear layers: on the attention alone it takes three times the steps."""
        return "all-linear"

    def fit(self, texts: Sequence[str]) -> float:
        """Trains on lists of ``texts`` in ever new orders; returns the mean loss per token."""
        steps = self.settings.writer_steps
        rows = list(islice(lists(texts, self.settings, self.seed), LISTS * steps))
        room = getattr(self.base.backbone.config, "max_position_embeddings", WINDOW)
        plan = replace(self.plan, model=replace(self.plan.model, max_length=min(WINDOW, room)))
        task = Generation(SiteRows("", "generation", rows, ()), self.base, plan)
        return self.learn(task, steps, LISTS, self.settings.writer_lr)


def lists(texts: Sequence[str], settings: TransferSettings, seed: int) -> Iterator[Row]:
    """Rows without end: lists twice as long as there are seeds, each text once before any comes again."""
    rng, waiting = random.Random(seed_from(seed, "lists")), list[str]()
    while True:
        while len(waiting) < 2 * settings.seeds:
            waiting += rng.sample(texts, len(texts))
        items, waiting = waiting[: 2 * settings.seeds], waiting[2 * settings.seeds :]
        heading, numbered = list_of(items, len(items)).split("\n", 1)
        yield {"prompt": f"{heading}\n1.", "completion": numbered.removeprefix("1.")}
