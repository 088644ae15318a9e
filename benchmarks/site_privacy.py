"""What differential privacy for whole sites costs: many sites with a few rows each of one linear regression.

All rows are of y = ⟨X, W*⟩ + ε with one W* of rank 3, d = 20, σ = 0.1, and one LoRA is shared (``fedit``), so no site
could learn W* from its own 40 rows. The result is the relative error of the shared model on 5 rows of each site that no
site trains on: 1 without training, and about 0.1 at best, since these rows have noise as well.

python benchmarks/site_privacy.py [SITES] [ARM …]     (200, none clip 8)
An arm is a privacy budget ε, ``clip`` for clipping without noise worth mentioning, or ``none``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from colora.common.config.loader import recipe_from
from colora.server.reporting.summary import summarize
from colora.simulation.run import simulate

ROUNDS, TRAIN, TEST, SIZE, RANK = 20, 40, 5, 20, 3
CLIP = 0.6


def write_rows(path: Path, sites: int) -> None:
    """Write all rows of the regression, with ‖W*‖_F = 1."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(SIZE, RANK)) @ rng.normal(size=(RANK, SIZE))
    truth /= np.linalg.norm(truth)
    x = rng.normal(size=(sites * (TRAIN + TEST), SIZE, SIZE)).astype(np.float32)
    y = np.einsum("nij,ij->n", x, truth) + 0.1 * rng.normal(size=len(x))
    np.savez(path, x=x, y=y.astype(np.float32))


def recipe_of(arm: str, rows: Path, sites: int) -> dict[str, Any]:
    """The recipe of an arm."""
    server: dict[str, Any] = {"quorum": sites, "weights": "uniform", "max_relative_norm": 1e9}
    if arm == "clip":
        server["privacy"] = {"noise_multiplier": 1e-6, "clip_norm": CLIP}
    elif arm != "none":
        server["privacy"] = {"epsilon": float(arm), "clip_norm": CLIP}
    return {
        "name": "sites",
        "rounds": ROUNDS,
        "model": {"source": f"synthetic:bilinear-{SIZE}"},
        "adapter": {"rank": RANK, "alpha": float(RANK), "target_modules": ["proj"]},
        "method": {"name": "fedit"},
        "train": {
            "steps": 5,
            "batch_size": TRAIN,
            "lr_schedule": "cosine",
            "optimizer": "adam",
            "lr": 0.03,
            "max_grad_norm": 0.0,
        },
        "evaluation": {"every": 0},
        "data": {"source": str(rows), "task": "regression", "train": TRAIN, "test": TEST},
        "partition": {"by": "iid", "sites": sites},
        "server": server,
        "simulation": {"threads": 1},
    }


def main() -> None:
    sites = int(sys.argv[1]) if sys.argv[1:] else 200
    with tempfile.TemporaryDirectory() as place:
        rows = Path(place) / "rows.npz"
        write_rows(rows, sites)
        for arm in sys.argv[2:] or ("none", "clip", "8"):
            run = simulate(recipe_from(recipe_of(arm, rows, sites)), Path(place) / arm, resume=False)
            events = run.events()
            noised = [event for event in events if event["event"] == "noised"]
            told = f", noise {noised[-1]['noise']:.3g}, ε {noised[-1]['epsilon']:.3g}" if noised else ""
            clipped = sum(len(event["clipped"]) for event in noised) / (ROUNDS * sites)
            print(f"{arm}: error {summarize(events).mean('shared'):.3f}, {clipped:.0%} clipped{told}", flush=True)


if __name__ == "__main__":
    main()
