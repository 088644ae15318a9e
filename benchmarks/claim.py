"""Does collaboration help? Methods side by side on one recipe, over seeds: mean ± standard deviation over seeds.

python benchmarks/claim.py [RECIPE] [SEEDS]     (newsgroups, 3)
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
from pathlib import Path

from colora.cli import find_recipe
from colora.common.recipe import load_recipe
from colora.common.settings import MethodSettings
from colora.server.board import Board, board_of
from colora.simulation.run import simulate

METHODS = ("local", "fedit", "colora")


def run(recipe_path: Path, method: str, seed: int, folder: Path) -> Board:
    recipe = load_recipe(recipe_path, (f"seed={seed}", "simulation.baseline=false", "evaluation.every=0"))
    recipe = dataclasses.replace(recipe, method=MethodSettings(name=method))
    return board_of(simulate(recipe, folder / f"{method}-{seed}", resume=False).events())


def main() -> None:
    name, seeds = (sys.argv[1:] + ["newsgroups", "3"][len(sys.argv) - 1 :])[:2]
    found: dict[str, list[Board]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(int(seeds)):
            for method in METHODS:
                board = run(find_recipe(name), method, seed, Path(folder))
                found[method].append(board)
                print(f"seed {seed} {method}: personal {board.mean('personal'):.3f}", flush=True)
    print(
        f"\n{name}, {seeds} seeds, mean over sites of the personal model's metric, ± over seeds; base is the bare model"
    )
    base = [board.mean("base") or 0.0 for board in found[METHODS[0]]]
    print(f"base    {statistics.mean(base):.3f} ± {_spread(base):.3f}")
    for method, boards in found.items():
        personal = [board.mean("personal") or 0.0 for board in boards]
        print(f"{method:<7} {statistics.mean(personal):.3f} ± {_spread(personal):.3f}")


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
