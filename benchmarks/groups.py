"""Which groups does ``server.groups = "similarity"`` find? One trial per recipe and seed, without the rounds after it.

Every result is appended to ``benchmarks/results/groups.jsonl``; results that the file has are not run again.

python benchmarks/groups.py [SEEDS] [RECIPE …]     (5, demo newsgroups r8 mixed)
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from colora.cli.recipes import find_recipe
from colora.common.config.loader import load_recipe
from colora.simulation.run import simulate

RESULTS = Path(__file__).with_name("results") / "groups.jsonl"
CHANGES = (
    "server.groups=similarity",
    "rounds=1",
    "train.lr_schedule=constant",
    "train.final_steps=0",
    "evaluation.every=0",
    "simulation.baseline=false",
    "simulation.threads=1",
)


def run(name: str, seed: int) -> dict[str, Any]:
    """Run the trial of one recipe at one seed, and return its groups and the tests that led to them."""
    recipe = load_recipe(find_recipe(name), (f"seed={seed}", *CHANGES))
    with tempfile.TemporaryDirectory() as folder:
        events = simulate(recipe, Path(folder) / "run", resume=False).events()
    grouped = next(event for event in events if event["event"] == "grouped")
    return {"recipe": name, "seed": seed, "groups": grouped["groups"], "tests": grouped["tests"]}


def main() -> None:
    seeds, names = int(sys.argv[1]) if sys.argv[1:] else 5, sys.argv[2:] or ["demo", "newsgroups", "r8", "mixed"]
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    known = {(result["recipe"], result["seed"]): result for result in map(json.loads, lines)}
    for seed in range(seeds):
        for name in names:
            result = known.get((name, seed)) or run(name, seed)
            if (name, seed) not in known:
                with RESULTS.open("a") as file:
                    file.write(json.dumps(result) + "\n")
            groups = "; ".join(", ".join(group) for group in result["groups"])
            print(f"{name}, seed {seed}: p = {result['tests'][0]['p_value']:.4f}; {groups}", flush=True)


if __name__ == "__main__":
    main()
