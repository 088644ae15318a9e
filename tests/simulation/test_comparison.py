"""The gain over local-only training, paired by test row."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from colora.common.config.loader import recipe_from
from colora.server.reporting.summary import summarize
from colora.simulation.comparison import paired_gain
from colora.simulation.run import simulate


def test_paired_gain_is_the_mean_difference_and_its_standard_error() -> None:
    """Differences 1, 0, 0, -1, 1: mean 0.2, variance 0.7, standard error sqrt(0.7 / 5)."""
    gain, error = paired_gain([1, 1, 0, 0, 1], [0, 1, 0, 1, 0])
    assert gain == pytest.approx(0.2)
    assert error == pytest.approx(math.sqrt(0.7 / 5))
    assert paired_gain([1, 0, 1], [1, 0, 1]) == (0, 0)
    assert paired_gain([1], [0]) == (1, None)


def test_a_run_with_baseline_reports_each_sites_gain_and_its_error(tiny_recipe: dict, tmp_path: Path) -> None:
    recipe = recipe_from({**tiny_recipe, "simulation": {"baseline": True}})
    run = simulate(recipe, tmp_path / "run", resume=False)
    rows = summarize(run.events()).rows.values()
    compared = [event for event in run.events() if event["event"] == "compared"]
    assert [event["site"] for event in compared] == [row.site for row in rows]
    for row, event in zip(rows, compared, strict=True):
        personal, alone = row.metric("personal"), row.metric("alone")
        assert personal is not None
        assert alone is not None
        assert row.gain == pytest.approx(personal - alone)
        assert row.gain_error == event["standard_error"]
        assert event["rows"] == row.test
