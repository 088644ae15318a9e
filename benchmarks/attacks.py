"""What one bad site of six does to the others: the demo under four attacks and five ways to aggregate.

The last airline of the roster attacks in every round. ``scaling``: it sends its update times -1000. ``opposition``:
times -3, which is just within the bound. ``weight claim``: its update times -1, and a claim of a thousand million
examples. ``label flip``: it trains on complaints labelled as praise, and the other way round. The accuracies are means
over the five honest sites.

python benchmarks/attacks.py [SEEDS]     (2)
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from colora.cli.recipes import find_recipe
from colora.client.training.trainer import Trainer
from colora.common.config.loader import load_recipe
from colora.common.protocol.types import TrainReply, TrainRequest
from colora.server.reporting.summary import summarize
from colora.simulation.run import simulate

RESULTS = Path(__file__).with_name("results") / "attacks.jsonl"
FIXED = ("simulation.baseline=false", "simulation.threads=1", "evaluation.every=0")
BAD = "virginamerica"
RULES = {
    "mean": (),
    "mean, no bound": ("server.max_relative_norm=1e9",),
    "median": ("server.aggregator=median",),
    "trimmed mean": ("server.aggregator=trimmed_mean", "server.trim=0.2"),
    "krum": ("server.aggregator=krum", "server.trim=0.2"),
}
Handle = Callable[..., TrainReply]


def scaled(factor: float, claim: int | None = None) -> Callable[[Handle], Handle]:
    """An attack that multiplies the update of the bad site, and claims this number of examples and loss terms."""

    def attack(handle: Handle) -> Handle:
        def handled(self: Trainer, request: TrainRequest, *rest: Any) -> TrainReply:
            reply = handle(self, request, *rest)
            if self.site != BAD:
                return reply
            sent = {
                key: (request.shared[key] + factor * (array - request.shared[key])).astype(np.float32)
                for key, array in reply.shared.items()
            }
            claimed = {} if claim is None or not sent else {"examples": claim, "terms": claim}
            return dataclasses.replace(reply, shared=sent, **claimed)

        return handled

    return attack


def flipped(handle: Handle) -> Handle:
    """An attack that trains the bad site on wrong labels: the two labels of its training rows change places."""

    def handled(self: Trainer, request: TrainRequest, *rest: Any) -> TrainReply:
        if self.site == BAD and not getattr(self, "flipped", False):
            wrong = tuple((tokens, 1 - label) for tokens, label in self.task.train.examples)
            self.task.train, self.flipped = dataclasses.replace(self.task.train, examples=wrong), True
        return handle(self, request, *rest)

    return handled


ATTACKS: dict[str, Callable[[Handle], Handle]] = {
    "none": lambda handle: handle,
    "scaling": scaled(-1000.0),
    "opposition": scaled(-3.0),
    "weight claim": scaled(-1.0, claim=10**9),
    "label flip": flipped,
}


@contextmanager
def attacked(attack: Callable[[Handle], Handle]) -> Iterator[None]:
    """Make the bad site attack."""
    honest = Trainer.handle
    Trainer.handle = attack(honest)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.handle = honest  # type: ignore[method-assign]


def run(attack: str, rule: str, seed: int) -> dict[str, Any]:
    """Run the demo once, and return the mean accuracies of the honest sites."""
    recipe = load_recipe(find_recipe("demo"), (f"seed={seed}", *FIXED, *RULES[rule]))
    with tempfile.TemporaryDirectory() as folder, attacked(ATTACKS[attack]):
        summary = summarize(simulate(recipe, Path(folder) / "run", resume=False).events())
    honest = [row for site, row in summary.rows.items() if site != BAD]
    means = {
        mode: statistics.mean(row.metric(mode) or 0.0 for row in honest) for mode in ("base", "shared", "personal")
    }
    return {"attack": attack, "rule": rule, "seed": seed, **means, "clipped": len(summary.rows[BAD].clipped)}


def main() -> None:
    seeds = int(sys.argv[1]) if sys.argv[1:] else 2
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    known = {(r["attack"], r["rule"], r["seed"]): r for r in map(json.loads, lines)}
    for seed in range(seeds):
        for attack in ATTACKS:
            for rule in RULES:
                result = known.get((attack, rule, seed)) or run(attack, rule, seed)
                if (attack, rule, seed) not in known:
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(result) + "\n")
                print(
                    "{attack}, {rule}, seed {seed}: shared {shared:.3f}, personal {personal:.3f}".format(**result),
                    flush=True,
                )


if __name__ == "__main__":
    main()
