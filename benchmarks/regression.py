"""CoLoRA where few sites, or unlike sites, defeat the plain mean: heterogeneous regression through the real strategy.

Five tasks: 40 rows each, with A and B from the usual LoRA start and from the spectral start. A round trains the cores
by gradient descent and takes one gradient of A and B, on which the coordinator takes a step of Adam.
Mixed pool: 20 tasks with 60 rows each, of which half share their subspaces and half have their own; benefit weights
against uniform ones, both from the spectral start. The error is the mean of ‖Ŵ − W*‖ / ‖W*‖ over the similar tasks.

python benchmarks/regression.py [SEEDS] [ARM …]     (20, all arms)
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from colora.cli.recipes import find_recipe
from colora.common.config.loader import load_recipe
from colora.server.reporting.summary import summarize
from colora.simulation.run import simulate

RESULTS = Path(__file__).with_name("results") / "regression.jsonl"
COMMON = ("simulation.baseline=false", "simulation.threads=1", "evaluation.every=0")
FIVE = (
    "partition.sites=5",
    "server.quorum=5",
    "rounds=1000",
    "train.schedule=alternating",
    "train.personal_steps=10",
    "train.shared_steps=1",
    "train.optimizer=sgd",
    "train.lr=1.0",
    "train.core_lr=0.2",
    "train.lr_schedule=constant",
    "train.final_steps=50",
    "server.optimizer=adam",
    "server.lr=1e-2",
)
MIXED = (
    "data.source=synthetic:regression-mixed",
    "data.train=60",
    "train.batch_size=60",
    "rounds=40",
    "train.steps=10",
    "train.lr=0.1",
    "adapter.init=spectral",
)
ARMS = {
    "five": FIVE,
    "five, spectral": (*FIVE, "adapter.init=spectral"),
    "mixed": MIXED,
    "mixed, benefit": (*MIXED, "server.weights=benefit"),
}


def run(arm: str, seed: int) -> dict[str, Any]:
    """Run one arm at one seed: the error, and the share of the weight that the similar tasks have in the last round."""
    recipe = load_recipe(find_recipe("regression"), (f"seed={seed}", *COMMON, *ARMS[arm]))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        events = simulate(recipe, Path(folder) / "run", resume=False).events()
    rows = summarize(events).rows
    similar = [site for i, site in enumerate(rows) if i % 2 == 0 or not arm.startswith("mixed")]
    weights = [event["weights"] for event in events if event["event"] == "round"][-1]
    return {
        "arm": arm,
        "seed": seed,
        "error": statistics.mean(rows[site].metric("personal") or 0.0 for site in similar),
        "weight": sum(weights[site] for site in similar) / sum(weights.values()),
        "seconds": round(time.monotonic() - started),
    }


def main() -> None:
    seeds, arms = int(sys.argv[1]) if sys.argv[1:] else 20, sys.argv[2:] or list(ARMS)
    known = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    found = {(result["arm"], result["seed"]): result for result in known}
    RESULTS.parent.mkdir(exist_ok=True)
    for seed in range(seeds):
        for arm in arms:
            if (arm, seed) not in found:
                found[arm, seed] = run(arm, seed)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(found[arm, seed]) + "\n")
            print(
                "{arm}, seed {seed}: error {error:.3f}, weight of the similar {weight:.4f}".format(**found[arm, seed])
            )
    for arm in arms:
        errors = [found[arm, seed]["error"] for seed in range(seeds)]
        weights = [found[arm, seed]["weight"] for seed in range(seeds)]
        print(
            f"{arm}: median {statistics.median(errors):.3f}, least {min(errors):.3f}, greatest {max(errors):.3f}; "
            f"≤ .06 at {sum(e <= 0.06 for e in errors)}, ≤ .10 at {sum(e <= 0.1 for e in errors)} of {seeds} seeds; "
            f"least weight {min(weights):.4f}"
        )


if __name__ == "__main__":
    main()
