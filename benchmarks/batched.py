"""How much faster is a site-round when sites train in one batch? The batched engine against the local one.

Sixteen sites with shares of the airline tweets, MiniLM-L6 with rank 8 on query and value, five steps a round. Each
repetition runs both engines, one after the other, and compares the median seconds of a round without the first one.

python benchmarks/batched.py [REPETITIONS] [COHORT]     (3, 8)
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

FIXED = (
    "rounds=5",
    "train.final_steps=0",
    "evaluation.every=0",
    "simulation.baseline=false",
    "data.test=4",
    "data.train=32",
    'partition={by="iid", sites=16}',
)
BARS = {1: 0.5, 2: 0.5, 4: 0.8}  # batch size → the largest ratio that is hoped for


def seconds_per_round(engine: str, batch: int, cohort: int) -> float:
    """The median seconds of a round, training at all sites included."""
    settings = (f"simulation.engine={engine}", f"simulation.cohort={cohort}", f"train.batch_size={batch}")
    recipe = load_recipe(find_recipe("demo"), (*FIXED, *settings))
    with tempfile.TemporaryDirectory() as folder:
        events = simulate(recipe, Path(folder) / "run", resume=False).events()
    return statistics.median(event["seconds"] for event in events if event["event"] == "round" and event["round"] > 1)


def main() -> None:
    repetitions, cohort = ([int(argument) for argument in sys.argv[1:]] + [3, 8][len(sys.argv) - 1 :])[:2]
    figures = []
    for batch, bar in BARS.items():
        pairs = [
            (seconds_per_round("batched", batch, cohort), seconds_per_round("local", batch, cohort))
            for _ in range(repetitions)
        ]
        ratios = [together / apart for together, apart in pairs]
        figures.append(Figure(f"batched ÷ local, batch {batch}", ratios, bar=bar))
        figures.append(Figure(f"local, batch {batch}", [apart / 16 for _, apart in pairs], "s a site-round"))
    show(f"16 sites on MiniLM-L6, cohort {cohort}", figures)


if __name__ == "__main__":
    main()
