"""``train.epochs``: every site takes the steps of its own rows, and the coordinator knows them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from colora.common.atomic_io import load_arrays
from colora.common.config.loader import recipe_from
from colora.server.reporting.report import print_report
from colora.server.reporting.summary import summarize
from colora.server.rounds import strategy
from colora.simulation.run import simulate

ROWS = {"ada": 12, "bob": 7, "cyd": 3}  # in batches of 4
STEPS = {"ada": 3, "bob": 2, "cyd": 1}


@pytest.fixture
def unequal(tiny_recipe: dict) -> dict:
    """The tiny recipe with one epoch a round, at sites with different numbers of rows."""
    for site in tiny_recipe["site"]:
        lines = Path(site["source"]).read_text().splitlines(keepends=True)
        Path(site["source"]).write_text("".join(lines[: ROWS[site["name"]]]))
    train = {"epochs": 1, "batch_size": 4, "lr": 1e-2, "lr_schedule": "cosine", "final_steps": 1}
    return {**tiny_recipe, "rounds": 3, "train": train}


def last_checkpoint(folder: Path) -> dict[str, np.ndarray]:
    return load_arrays(sorted((folder / "checkpoints").glob("round-*"))[-1])[0]


def test_unequal_sites_take_unequal_steps_and_both_are_shown(unequal: dict, tmp_path: Path) -> None:
    unequal["simulation"] = {**unequal["simulation"], "baseline": True}
    run = simulate(recipe_from(unequal), tmp_path / "run", resume=False)
    events = list(run.events())
    assert {event["site"]: event["steps"] for event in events if event["event"] == "joined"} == STEPS
    terms = {event["site"]: event["terms"] for event in events if event["event"] == "reply" and event["round"] == 1}
    assert terms == {"ada": 12, "bob": 8, "cyd": 3}
    summary = summarize(events)
    assert {site: row.steps for site, row in summary.rows.items()} == STEPS
    assert not any(row.failures for row in summary.rows.values())
    console = Console(record=True, width=160)
    print_report(summary, run.path, console)
    told = console.export_text()
    assert "steps: optimizer steps of a round." in told
    rows = [line.split() for line in told.partition("rows: ")[0].splitlines()]
    table = {row[0]: row for row in rows if row and row[0] in ROWS}
    assert {site: (cells[1], cells[2]) for site, cells in table.items()} == {
        site: (f"{ROWS[site]}+6", str(STEPS[site])) for site in ROWS
    }


def test_equal_sites_with_one_epoch_end_as_with_as_many_steps(tiny_recipe: dict, tmp_path: Path) -> None:
    """12 rows in batches of 4 are 3 steps. The table has no column of steps where all are equal."""
    ends = []
    for name, count in (("steps", {"steps": 3}), ("epochs", {"epochs": 1})):
        raw = {**tiny_recipe, "train": {"batch_size": 4, "lr": 1e-2, "lr_schedule": "linear", **count}}
        run = simulate(recipe_from(raw), tmp_path / name, resume=False)
        metrics = {site: row.metrics for site, row in summarize(run.events()).rows.items()}
        ends.append((last_checkpoint(run.path), metrics))
    (one, metrics), (other, also) = ends
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)
    assert metrics == also


def test_a_run_that_stops_in_a_round_ends_with_the_same_bits(
    unequal: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_from(unequal)
    simulate(recipe, tmp_path / "whole", resume=False)
    admit = strategy.admit_reply

    def stops(reply: object, site: str, request: strategy.TrainRequest, *rest: object) -> float:
        if (request.round, site) == (2, "bob"):
            raise KeyboardInterrupt
        return admit(reply, site, request, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(strategy, "admit_reply", stops)
    with pytest.raises(KeyboardInterrupt):
        simulate(recipe, tmp_path / "stopped", resume=False)
    monkeypatch.undo()
    simulate(recipe, tmp_path / "stopped", resume=True)
    one, other = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "stopped")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)
