"""Adapters of ranks 4, 8 and 16 in one federation: the exact mean of products against zero-padded averaging.

The sites of a recipe train in turn at rank 4, 8 and 16; the federation has rank 16. Arms: ``product`` is the mean of
products. ``aligned`` is the mean of factors in a basis like the one that arrived. ``padded`` is the mean of factors
that are cut to the site's rank and padded with zeros. ``all 4`` and ``all 16`` give all sites one rank. Results are
appended to ``benchmarks/results/mixed_ranks-RECIPE.jsonl``.

python benchmarks/mixed_ranks.py [RECIPE] [SEEDS] [ARM …]     (r8, 3, product aligned padded)
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import tomllib
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import tomli_w
from claim import RESULTS, Result, known_results, mean_of, run

from colora.cli.recipes import find_recipe
from colora.client.training.smaller_rank import SmallerRank
from colora.common.protocol.types import Arrays

ARMS = {  # arm → ranks of the sites in turn, and a key of its recipe
    "product": ((4, 8, 16), "server.aggregator=product"),
    "aligned": ((4, 8, 16), "server.aggregator=mean"),
    "padded": ((4, 8, 16), "server.aggregator=mean"),
    "all 4": ((4,), "server.aggregator=product"),
    "all 16": ((16,), "server.aggregator=product"),
}
RANK = 16


def cut(smaller: SmallerRank, arrays: Arrays) -> Arrays:
    """The first rows of A and columns of B."""
    return {
        key: array[: smaller.site] if "lora_A" in key else array[:, : smaller.site] if "lora_B" in key else array
        for key, array in arrays.items()
    }


def pad(smaller: SmallerRank, trained: Arrays, received: Arrays) -> Arrays:
    """A with rows of zeros, and B with columns of zeros."""
    missing = smaller.federation - smaller.site
    rows, columns = ((0, missing), (0, 0)), ((0, 0), (0, missing))
    return {
        key: np.pad(array, rows) if "lora_A" in key else np.pad(array, columns) if "lora_B" in key else array
        for key, array in trained.items()
    }


def measure(name: str, arm: str, seed: int, folder: Path) -> Result:
    """Run one arm at one seed."""
    ranks, keys = ARMS[arm]
    raw = tomllib.loads(find_recipe(name).read_text())
    raw["adapter"] = {**raw["adapter"], "rank": RANK, "alpha": 2.0 * RANK}
    raw["partition"] = {**raw["partition"], "max_ranks": ranks}
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(raw))
    padded = patch.multiple(SmallerRank, received=cut, sent=pad) if arm == "padded" else nullcontext()
    with padded:
        return {**run(path, f"colora,train.lr=1e-2,{keys}", seed, folder / arm), "arm": arm}


def main() -> None:
    arguments = sys.argv[1:]
    name, seeds = (arguments + ["r8", "3"][len(arguments) :])[:2]
    path = RESULTS / f"mixed_ranks-{name}.jsonl"
    for arm in arguments[2:] or ("product", "aligned", "padded"):
        found = []
        for seed in range(int(seeds)):
            result = known_results(path).get((arm, seed))
            if result is None:
                with tempfile.TemporaryDirectory() as folder:
                    result = measure(name, arm, seed, Path(folder))
                with path.open("a") as file:
                    file.write(json.dumps(result) + "\n")
            found.append(result)
        shared, personal = (statistics.mean(mean_of(r, mode) for r in found) for mode in ("shared", "personal"))
        seconds = statistics.median(r["seconds"] for r in found)
        print(f"{arm}: shared {shared:.3f}, personal {personal:.3f}, {len(found)} seeds, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
