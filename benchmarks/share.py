"""How much does the gain of similar sites fall with the share of dissimilar ones? The four airlines of ``mixed``, with
0 to 4 of its newsgroup sites, in one pool without groups.

Every result is appended to ``benchmarks/results/share.jsonl``; results that the file has are not run again.

python benchmarks/share.py [SEEDS]     (3)
"""

from __future__ import annotations

import json
import sys
import tempfile
import tomllib
from pathlib import Path

import tomli_w
from claim import RESULTS, known_results, mean_of, run

from colora.cli.recipes import find_recipe

SIMILAR = 4
DISSIMILAR = (0, 1, 2, 4)
ARM = "colora,server.groups=none"


def main() -> None:
    seeds = int(sys.argv[1]) if sys.argv[1:] else 3
    path = RESULTS / "share.jsonl"
    raw = tomllib.loads(find_recipe("mixed").read_text())
    for seed in range(seeds):
        for number in DISSIMILAR:
            arm = f"{ARM},dissimilar={number}"
            result = known_results(path).get((arm, seed))
            if result is None:
                with tempfile.TemporaryDirectory() as folder:
                    recipe = Path(folder) / "share.toml"
                    recipe.write_text(tomli_w.dumps(raw | {"site": raw["site"][: SIMILAR + number]}))
                    result = run(recipe, ARM, seed, Path(folder)) | {"arm": arm}
                with path.open("a") as file:
                    file.write(json.dumps(result) + "\n")
            print(f"seed {seed}, {number} dissimilar: {mean_of(result):.3f}, {result['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
