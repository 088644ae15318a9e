"""The cost of a federation's transfer to a new base model: accuracy on real test texts and bytes, before and after.

python benchmarks/moved.py FIRST SECOND

FIRST is the run folder of ``colora simulate … --out FIRST`` with ``transfer.prepare``, SECOND that of ``colora simulate
--transfer-from FIRST --transfer-to MODEL --out SECOND``. The second run's own metrics are on held-out synthetic texts.
Here each site's model of both runs is measured on the site's real test texts, which the transfer did not use.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch

from colora.client.artifacts.predict import Predictor
from colora.client.data.selection import load_site_rows
from colora.common.config.loader import load_site
from colora.common.models.saved import read_saved_model
from colora.server.reporting.run_folder import RunFolder


def accuracy(run: Path, site: str, data: Path) -> float:
    """Return the accuracy of the site's newest personal model, a text classifier, on its real test rows."""
    seed = read_saved_model(data / "sites" / site).plan.seed
    rows = load_site_rows(load_site(data / "sites" / site / "site.toml"), seed).test
    predictions = Predictor(read_saved_model(run / "sites" / site)).predict([{"text": row["text"]} for row in rows])
    return statistics.mean(p["label"] == row["label"] for p, row in zip(predictions, rows, strict=True))


def traffic(run: Path) -> tuple[int, int]:
    """Return the bytes of shared arrays sent to the sites and received from them."""
    replies = [event for event in RunFolder(run).events() if event["event"] == "reply" and not event.get("baseline")]
    return sum(event["bytes_down"] for event in replies), sum(event["bytes_up"] for event in replies)


def main() -> None:
    torch.set_num_threads(1)
    first, second = map(Path, sys.argv[1:3])
    pairs = []
    for site in sorted(folder.name for folder in (second / "sites").iterdir()):
        pairs.append((accuracy(first, site, first), accuracy(second, site, first)))
        print(f"{site:12} {pairs[-1][0]:.3f} {pairs[-1][1]:.3f}", flush=True)
    before, after = (statistics.mean(values) for values in zip(*pairs, strict=True))
    print(f"{'mean':12} {before:.3f} {after:.3f}  {after / before:.1%}")
    for name, run in (("before", first), ("in the transfer", second)):
        down, up = traffic(run)
        print(f"bytes {name}: {down:,} down, {up:,} up")


if __name__ == "__main__":
    main()
