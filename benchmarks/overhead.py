"""Milliseconds of a site-round that are neither a training nor an evaluation step, in the demo.

The demo runs on the local engine, and every function in ``PARTS`` is timed. The time of a part excludes the parts that
it calls. A site-round is one ``ClientApp`` call of one site, and its share (one eighth) of the coordinator's work in
that round, from creating the requests to writing the checkpoint. Finalization is not included.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from figures import Figure, show

from colora.client.training import state_store as store
from colora.client.training import trainer
from colora.common.config.loader import load_recipe
from colora.common.protocol import flower_messages as messages
from colora.common.protocol import types as protocol
from colora.common.tasks.classification import Classification
from colora.common.training import micro_batch
from colora.server.reporting import events
from colora.server.rounds import aggregation, checkpoint, strategy
from colora.simulation import local_grid as grid
from colora.simulation.run import simulate

BAR = 50.0
STEP, SITE, COORDINATOR = "a step", "other work at the site", "other work at the coordinator"
PARTS: list[tuple[str, Any, str]] = [  # (part, namespace in which the function is looked up, its name)
    (STEP, micro_batch, "gradients"),
    (STEP, micro_batch, "apply_gradients"),
    (STEP, Classification, "measure"),
    (STEP, Classification, "probe"),
    (SITE, grid.LocalGrid, "_answer"),
    (COORDINATOR, strategy.AdapterStrategy, "configure_train"),
    (COORDINATOR, strategy.AdapterStrategy, "aggregate_train"),
    (COORDINATOR, strategy.AdapterStrategy, "configure_finalize"),
    ("load values into the model", trainer.Trainer, "load"),
    ("copy values out", trainer.Trainer, "values"),
    ("draw and collate batches, create the optimizer", trainer, "train"),
    ("hash arrays", protocol, "hash_arrays"),
    ("read the site's state", store.StateStore, "state"),
    ("read the site's state", store.StateStore, "reply"),
    ("write the site's state", store.StateStore, "write"),
    ("write the site's state", store.StateStore, "prune"),
    ("encode messages", messages, "pack_arrays"),
    ("encode messages", messages, "train_message"),
    ("encode messages", messages, "reply_message"),
    ("decode messages", messages, "request_from"),
    ("decode messages", messages, "reply_from"),
    ("check a reply", strategy, "admit_reply"),
    ("spool a reply", strategy, "save_arrays"),
    ("aggregate", aggregation, "aggregate"),
    ("aggregate", aggregation, "apply_optimizer"),
    ("residual of mean(B)·mean(A)", aggregation, "product_residual"),
    ("write the checkpoint", checkpoint.Checkpoints, "write"),
    ("write events", events.EventLog, "emit"),
    ("fsync", os, "fsync"),
]
Spent = dict[str, float]  # part → milliseconds


@dataclass
class Clock:
    """A stack of running parts. Time counts for the topmost; ``sites`` and ``rounds`` collect it."""

    parts: list[str] = field(default_factory=lambda: ["outside"])
    since: float = field(default_factory=time.perf_counter)
    spent: Spent = field(default_factory=lambda: defaultdict(float))
    sites: list[tuple[int, Spent]] = field(default_factory=list)  # (round, spent) of every ClientApp call
    rounds: dict[int, Spent] = field(default_factory=dict)

    def _tick(self) -> None:
        now = time.perf_counter()
        self.spent[self.parts[-1]] += 1e3 * (now - self.since)
        self.since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._tick()
            self.parts.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._tick()
                self.parts.pop()

        return run

    def site_round(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a ClientApp call, whose time is collected separately."""
        inner = self.timed(SITE, function)

        @functools.wraps(function)
        def run(grid: Any, message: Any) -> Any:
            self._tick()
            outer, self.spent = self.spent, defaultdict(float)
            reply = inner(grid, message)
            group = message.metadata.group_id
            if group.isdigit():  # a join belongs to no round
                self.sites.append((int(group), self.spent))
            self.spent = outer
            return reply

        return run

    def begin_round(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the function that begins a round at the coordinator; finalization is the last round + 1."""
        inner = self.timed(COORDINATOR, function)

        @functools.wraps(function)
        def run(strategy: Any, *args: Any) -> Any:
            self._tick()
            self.spent = self.rounds[args[-1].round + 1] = defaultdict(float)
            return inner(strategy, *args)

        return run


def install(clock: Clock) -> None:
    """Wrap every part with the clock."""
    special = {
        "_answer": clock.site_round,
        "configure_train": clock.begin_round,
        "configure_finalize": clock.begin_round,
    }
    for part, owner, name in PARTS:
        function = getattr(owner, name)
        around = special.get(name, functools.partial(clock.timed, part))
        setattr(owner, name, around(function))


def site_rounds(clock: Clock, last: int) -> list[Spent]:
    """Return the time by part of every site-round up to round ``last``, with the coordinator's share."""
    calls = defaultdict(int)
    for t, _ in clock.sites:
        calls[t] += 1
    result = []
    for t, own in clock.sites:
        if t <= last:
            shared = {part: ms / calls[t] for part, ms in clock.rounds[t].items() if part != "outside"}
            result.append({p: own.get(p, 0.0) + shared.get(p, 0.0) for p in own.keys() | shared.keys()})
    return result


def main() -> None:
    here = Path(__file__).resolve().parent
    recipe = load_recipe(here.parent / "recipes" / "demo.toml", ("simulation.baseline=false", "simulation.threads=1"))
    clock = Clock()
    install(clock)
    with tempfile.TemporaryDirectory() as folder:
        simulate(recipe, Path(folder) / "run", resume=False)
    spent_by_round = site_rounds(clock, recipe.rounds)
    names = sorted({part for spent in spent_by_round for part in spent} - {STEP})
    parts = [Figure(name, [spent.get(name, 0.0) for spent in spent_by_round], "ms") for name in names]
    parts.sort(key=lambda figure: -figure.median)
    whole = Figure(
        "all but the steps", [sum(spent[p] for p in spent if p != STEP) for spent in spent_by_round], "ms", BAR
    )
    steps = Figure("the steps", [spent[STEP] for spent in spent_by_round], "ms")
    show("A site-round of the demo (MiniLM-L6, local engine, one thread)", [steps, whole, *parts])


if __name__ == "__main__":
    main()
