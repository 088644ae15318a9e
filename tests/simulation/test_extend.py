"""A run that gets more rounds ends as if it had had them from the start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from colora.common.config.loader import recipe_from
from colora.common.errors import ConfigError
from colora.server.reporting.summary import summarize
from colora.simulation.run import simulate
from tests.simulation.test_resume import durable


def longer(raw: dict, rounds: int, **train: object) -> dict:
    settings = {**raw["train"], "final_steps": 2, "persist_optimizer_state": True, **train}
    return {**raw, "rounds": rounds, "train": settings, "private": "lora", "server": {"quorum": 2, "fraction": 0.7}}


@pytest.mark.parametrize("stops", [(2,), (1, 3)], ids=["once", "twice"])
def test_more_rounds_give_the_bits_of_a_run_that_had_them_from_the_start(
    tiny_recipe: dict, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    """Every run ends with final steps, from which nothing may reach the rounds that follow."""
    tiny_recipe["simulation"]["baseline"] = True
    whole = simulate(recipe_from(longer(tiny_recipe, 5)), tmp_path / "whole", resume=False)
    for i, rounds in enumerate((*stops, 5)):
        parts = simulate(recipe_from(longer(tiny_recipe, rounds)), tmp_path / "parts", resume=i > 0)

    for place in ("", "baseline"):
        expected, found = durable(whole.path / place), durable(parts.path / place)
        assert expected.keys() == found.keys()
        for name, (arrays, meta) in expected.items():
            assert found[name][1] == meta, name
            assert not [key for key, value in arrays.items() if not np.array_equal(found[name][0][key], value)]
    rows = [summarize(run.events()).rows for run in (whole, parts)]
    assert {site: (row.metrics, row.gain) for site, row in rows[0].items()} == {
        site: (row.metrics, row.gain) for site, row in rows[1].items()
    }


@pytest.mark.parametrize(
    ("change", "key"),
    [({}, None), ({"lr_schedule": "cosine"}, 'train.lr_schedule = "cosine"')],
    ids=["constant", "cosine"],
)
def test_a_schedule_over_all_rounds_is_told(tiny_recipe: dict, tmp_path: Path, change: dict, key: str | None) -> None:
    simulate(recipe_from(longer(tiny_recipe, 1, **change)), tmp_path / "run", resume=False)
    run = simulate(recipe_from(longer(tiny_recipe, 2, **change)), tmp_path / "run", resume=True)
    extended = [event for event in run.events() if event["event"] == "extended"]
    assert [(e["before"], e["rounds"], e["inexact"]) for e in extended] == [(1, 2, key)]
    assert summarize(run.events()).rounds == 2


def test_a_run_cannot_be_shortened_or_changed(tiny_recipe: dict, tmp_path: Path) -> None:
    run = simulate(recipe_from(longer(tiny_recipe, 2)), tmp_path / "run", resume=False)
    before = run.recipe.read_bytes()
    with pytest.raises(ConfigError, match="can be extended, but not shortened"):
        simulate(recipe_from(longer(tiny_recipe, 1)), tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match="The recipe differs"):
        simulate(recipe_from(longer(tiny_recipe, 3, lr=0.5)), tmp_path / "run", resume=True)
    assert run.recipe.read_bytes() == before
