"""The local engine against Flower's own simulation runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from colora.common.atomic_io import load_arrays
from colora.server.reporting.summary import summarize
from colora.simulation.run import RunFolder


def run_engine(raw: dict, folder: Path, engine: str) -> RunFolder:
    """Run the command as a user does, in a new process."""
    folder.parent.mkdir(parents=True)
    recipe = folder.parent / "recipe.toml"
    recipe.write_text(tomli_w.dumps(raw))
    command = [sys.executable, "-m", "colora", "simulate", str(recipe), "--out", str(folder), "--engine", engine]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr
    return RunFolder(folder)


@pytest.mark.slow
def test_ray_and_local_give_the_same_adapter_states_and_metrics(tiny_recipe: dict, tmp_path: Path) -> None:
    """Bit-identical: both engines run the same code on one CPU with one thread."""
    raw = {**tiny_recipe, "train": {**tiny_recipe["train"], "final_steps": 1}}
    local, ray = (run_engine(raw, tmp_path / engine / "run", engine) for engine in ("local", "ray"))
    a, b = (load_arrays(sorted((run.path / "checkpoints").glob("*"))[-1])[0] for run in (local, ray))
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[key], b[key]) for key in a)
    for site in ("ada", "bob", "cyd"):
        states = [sorted((run.path / "sites" / site / "state").glob("*"))[-1] for run in (local, ray)]
        x, y = (load_arrays(path)[0] for path in states)
        assert x.keys() == y.keys()
        assert all(np.array_equal(x[key], y[key]) for key in x)
    rows = [summarize(run.events()).rows for run in (local, ray)]
    assert [json.dumps(r.metrics, sort_keys=True) for r in rows[0].values()] == [
        json.dumps(r.metrics, sort_keys=True) for r in rows[1].values()
    ]
