"""Peak memory of a simulation with 16 sites ÷ 2 sites on the local engine, where all sites share one base model.

MiniLM-L6 on 20 Newsgroups, IID sites with two labels, 2 rounds of 1 step. Every run is a new process that prints its
peak resident set. The two sizes alternate.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from figures import Figure, ratios, show

from colora.common.config.loader import recipe_from
from colora.simulation.run import simulate

BAR, REPEATS = 1.15, 3
FEW, MANY = 2, 16
RECIPE: dict[str, Any] = {
    "name": "memory",
    "rounds": 2,
    "model": {"source": "asset:minilm-l6", "max_length": 48},
    "train": {"steps": 1, "batch_size": 8},
    "evaluation": {"every": 0},
    "simulation": {"threads": 1},
    "data": {
        "source": "asset:20newsgroups/train",
        "test_source": "asset:20newsgroups/test",
        "labels": ["rec.autos", "sci.space"],
        "train": 16,
        "test": 8,
    },
}


def run(sites: int) -> None:
    """Run one simulation in this process and print the peak resident set in kilobytes."""
    recipe = recipe_from({**RECIPE, "partition": {"by": "iid", "sites": sites}})
    with tempfile.TemporaryDirectory() as folder:
        events = simulate(recipe, Path(folder) / "run", resume=False).events()
    finalized = next(event for event in events if event["event"] == "finalized")
    assert len(finalized["sites"]) == sites, events
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def peak(sites: int) -> float:
    """Return the peak resident set of a new process, in MB."""
    done = subprocess.run([sys.executable, __file__, str(sites)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]) * 1024 / 1e6


def main() -> None:
    peaks: dict[int, list[float]] = {FEW: [], MANY: []}
    for _ in range(REPEATS):
        for sites, values in peaks.items():
            values.append(peak(sites))
    figures = [Figure(f"peak memory, {sites} sites", values, "MB") for sites, values in peaks.items()]
    figures.append(Figure(f"{MANY} sites ÷ {FEW} sites", ratios(peaks[MANY], peaks[FEW]), bar=BAR))
    show("Peak resident set of a run", figures)


if __name__ == "__main__":
    run(int(sys.argv[1])) if sys.argv[1:] else main()
