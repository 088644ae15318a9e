"""kill -9 at random moments, each followed by --resume, changes nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from colora.common.atomic_io import load_arrays
from colora.server.reporting.summary import summarize
from colora.simulation.run import RunFolder


def command(recipe: Path, folder: Path) -> list[str]:
    return [sys.executable, "-m", "colora", "simulate", str(recipe), "--out", str(folder), "--resume"]


def events_in(folder: Path) -> int:
    path = folder / "events.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_in_round(process: subprocess.Popen, folder: Path, number: int, events: int, delay: float) -> str | None:
    """Kill a process in or after a round, once it has told of so many events of its own, ``delay`` seconds later.

    Returns the last event of the run; None if the process ended before.
    """
    before = events_in(folder)
    while process.poll() is None and (events_in(folder) < before + events or round_of(last_event(folder)) < number):
        time.sleep(0.002)
    time.sleep(delay)
    if process.poll() is not None:
        return None
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = last_event(folder)
    return f"{last['event']} {last.get('round', '')} {last.get('site', '')}".strip()


def round_of(event: dict) -> int:
    return event.get("round", 0)


def last_event(folder: Path) -> dict:
    return json.loads((folder / "events.jsonl").read_text().split("\n")[:-1][-1])


def durable(folder: Path) -> dict[str, tuple[dict[str, np.ndarray], dict]]:
    """The last checkpoint and every site's last state, without durations."""
    files = {}
    for place in (folder / "checkpoints", *sorted(folder.glob("sites/*/state"))):
        arrays, meta = load_arrays(sorted(place.glob("round-*"))[-1])
        for duration in ("seconds", "measuring"):
            meta.get("reply", {}).pop(duration, None)
        files[str(place.relative_to(folder))] = arrays, meta
    for ledger in sorted(folder.glob("sites/*/privacy.json")):
        files[str(ledger.relative_to(folder))] = {}, json.loads(ledger.read_text())
    return files


ADAM = {"private": "multilora", "server": {"quorum": 3, "optimizer": "adam"}}
STOPPING = {  # two models a site, and rounds that are compared on the same validation rows
    "private": "multilora",
    "server": {"quorum": 3, "optimizer": "adam", "keep": "best", "patience": 6},
    "train": {"lr": 0.05, "fallback": "local"},
    "adapter": {"init": "spectral"},
    "data": {"validation_fraction": 0.34},
}
FEW_BITS = {"communication": {"update_bits": 4, "broadcast_bits": 4}}
WAY_DOWN = {"communication": {"broadcast_bits": 2}, "server": {"quorum": 1, "fraction": 0.67, "optimizer": "adam"}}
GROUPS = {"server": {"quorum": 3, "weights": "benefit", "groups": "similarity"}}
PRIVATE_SITES = {"server": {"quorum": 3, "privacy": {"epsilon": 8.0}}}
PRIVATE = {"privacy": {"epsilon": 8.0}, "private": "lora"}  # the ledger of the budget is compared as well
BATCHED = {"simulation": {"threads": 1, "engine": "batched"}, "private": "lora"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "rounds", "options"),
    [
        (3, 10, STOPPING),
        (3, 10, GROUPS),
        (3, 10, BATCHED),
        (3, 10, PRIVATE),
        (3, 10, PRIVATE_SITES),
        (3, 10, FEW_BITS),
        (3, 10, WAY_DOWN),
        pytest.param(10, 40, ADAM, marks=pytest.mark.endurance),
    ],
    ids=[
        "fallback, early stopping, adam and spectral start",
        "groups and benefit weights",
        "batched engine",
        "differential privacy",
        "differential privacy for sites",
        "4 bits both ways",
        "2 bits on the way down to sampled sites",
        "adam",
    ],
)
def test_kills_change_no_bit_of_adapter_or_personal_state(
    tiny_recipe: dict, tmp_path: Path, kills: int, rounds: int, options: dict
) -> None:
    train = {
        **tiny_recipe["train"],
        "steps": 6,
        "final_steps": 3,
        "persist_optimizer_state": True,
        "lr_schedule": "cosine",
    }
    raw = {
        **tiny_recipe,
        "rounds": rounds,
        **options,
        "train": {**train, **options.get("train", {})},
        "adapter": {**tiny_recipe["adapter"], **options.get("adapter", {})},
    }
    recipe, undisturbed, killed = tmp_path / "recipe.toml", tmp_path / "calm", tmp_path / "killed"
    recipe.write_text(tomli_w.dumps(raw))
    subprocess.run(command(recipe, undisturbed), check=True, capture_output=True, env=os.environ)
    secret = undisturbed / "noise.secret"
    if secret.exists():
        killed.mkdir()
        shutil.copy(secret, killed)
    rng, kills_at = random.Random(repr(options)), []
    ran = max(round_of(event) for event in RunFolder(undisturbed).events())
    events_per_round = events_in(undisturbed) // ran
    for number in sorted(rng.sample(range(1, ran - 1), kills)):  # two rounds are left, so the run cannot end first
        process = subprocess.Popen(command(recipe, killed), stdout=subprocess.DEVNULL, env=os.environ)
        events, delay = rng.randint(1, events_per_round), rng.uniform(0, 0.05)
        kills_at.append(kill_in_round(process, killed, number, events, delay))
    done = subprocess.run(command(recipe, killed), capture_output=True, text=True, env=os.environ)
    print("\nkilled at:", *kills_at, sep="\n  ")
    assert done.returncode == 0, done.stderr
    assert sum(moment is not None for moment in kills_at) == kills, "a run ended before its kill"

    a, b = durable(undisturbed), durable(killed)
    assert a.keys() == b.keys()
    for place, (arrays, meta) in a.items():
        assert b[place][1] == meta, place
        assert b[place][0].keys() == arrays.keys()
        assert all(np.array_equal(b[place][0][key], value) for key, value in arrays.items()), place
    finals = [
        {r.site: r.metrics for r in summarize(RunFolder(f).events()).rows.values()} for f in (undisturbed, killed)
    ]
    assert finals[0] == finals[1]
