"""What a differentially private step costs: an optimizer step of the demo with and without ``[privacy]``.

python benchmarks/private_step.py [REPETITIONS]     (5)
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from figures import Figure, show

from colora.cli.recipes import find_recipe
from colora.common.config.loader import load_recipe
from colora.simulation.run import simulate

FIXED = ("rounds=4", "train.final_steps=0", "train.steps=10", "evaluation.every=0", "simulation.baseline=false")
ROWS = ("data.test=4", "data.train=64")


def seconds_per_step(batch: int, *privacy: str) -> float:
    """The median seconds of a step over sites and rounds, the other work of a round included."""
    recipe = load_recipe(find_recipe("demo"), (*FIXED, *ROWS, f"train.batch_size={batch}", *privacy))
    with tempfile.TemporaryDirectory() as folder:
        events = simulate(recipe, Path(folder) / "run", resume=False).events()
    replies = [e for e in events if e["event"] == "reply" and e["kind"] == "train" and e["round"] > 1]
    return statistics.median(reply["seconds"] for reply in replies) / recipe.train.steps_per_round(0)


def main() -> None:
    repetitions = int(sys.argv[1]) if sys.argv[1:] else 5
    figures = []
    for batch in (8, 32):
        pairs = [
            (seconds_per_step(batch, "privacy.noise_multiplier=1.0"), seconds_per_step(batch))
            for _ in range(repetitions)
        ]
        ratios = [private / plain for private, plain in pairs]
        figures.append(Figure(f"private ÷ plain step, batch {batch}", ratios, bar=2.0))
        figures.append(Figure(f"plain step, batch {batch}", [plain for _, plain in pairs], "s"))
    show("A step of the demo", figures)


if __name__ == "__main__":
    main()
