"""One bad site among six cannot move the adapter far: its update is scaled to a multiple of the median norm."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from colora.common.event_log import Event
from colora.common.protocol.types import TrainReply, TrainRequest
from colora.server.reporting.summary import summarize
from colora.server.rounds.clipping import Clipped, norm_bound
from tests.server.rounds.test_strategy import Hall, Pretender, recipe, same

A, B = "proj.lora_A.weight", "proj.lora_B.weight"


@pytest.fixture
def hall(tmp_path: Path) -> Hall:
    return Hall(tmp_path / "hall")


def norm(arrays: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(array.astype(np.float64))) for array in arrays.values())))


def scaled(factor: float) -> Any:
    """Send the honest update times a factor."""

    def does(site: Pretender, order: TrainRequest, reply: TrainReply) -> TrainReply:
        shared = {key: order.shared[key] + factor * (array - order.shared[key]) for key, array in reply.shared.items()}
        return dataclasses.replace(reply, shared={key: array.astype(np.float32) for key, array in shared.items()})

    return does


def test_the_bound_is_a_multiple_of_the_median() -> None:
    assert norm_bound({"a": 1.0, "b": 2.0, "c": 900.0}, 3.0) == 6.0
    assert norm_bound({"a": 1.0, "b": 900.0}, 3.0) == float("inf")


def test_a_clipped_update_keeps_its_direction_and_has_the_norm_of_the_bound() -> None:
    rng = np.random.default_rng(0)
    start = {A: rng.normal(size=(2, 5)).astype(np.float32), B: rng.normal(size=(4, 2)).astype(np.float32)}
    arrays = {key: value + rng.normal(size=value.shape).astype(np.float32) for key, value in start.items()}
    clipped = Clipped(arrays, start, 0.25)
    assert set(clipped) == {A, B}
    for key, value in start.items():
        np.testing.assert_allclose(clipped[key] - value, 0.25 * (arrays[key] - value), atol=1e-6)
        assert clipped[key].dtype == np.float32


def test_honest_sites_are_not_clipped(hall: Hall, tmp_path: Path) -> None:
    state = hall.run(recipe())
    assert hall.events("clipped") == []
    assert same(state.shared, Hall(tmp_path / "off").run(recipe(max_relative_norm=1e9)).shared)


def test_one_site_of_four_that_scales_its_updates_moves_the_adapter_by_a_bounded_step(
    hall: Hall, tmp_path: Path
) -> None:
    settings = recipe(weights="uniform")
    honest = hall.run(settings).shared
    attacked = Hall(tmp_path / "attacked")
    state = attacked.run(settings, attacked.sites(settings, {"dee": scaled(1000.0)}))
    unbounded = Hall(tmp_path / "unbounded")
    loose = recipe(weights="uniform", max_relative_norm=1e9)
    free = unbounded.run(loose, unbounded.sites(loose, {"dee": scaled(1000.0)}))
    events: list[Event] = attacked.events("clipped")
    assert [event["site"] for event in events] == ["dee"] * 4
    moved = {
        name: norm({k: s[k] - honest[k] for k in honest})
        for name, s in (("bound", state.shared), ("free", free.shared))
    }
    per_round = max(event["bound"] for event in events) / 4  # the site's share of a mean of four
    assert moved["bound"] <= 4 * per_round * 4 / 3  # four rounds; an honest update of the median norm is replaced
    assert moved["free"] > 100 * moved["bound"]


def test_the_report_names_the_site_and_the_rounds(hall: Hall) -> None:
    settings = recipe()
    hall.run(settings, hall.sites(settings, {"dee": scaled(50.0)}))
    summary = summarize(hall.events("started") + hall.events("clipped"))
    assert summary.rows["dee"].clipped == [1, 2, 3, 4]


@pytest.mark.parametrize("field", ["terms", "examples"])
def test_a_site_that_claims_a_great_weight_is_refused(hall: Hall, field: str) -> None:
    settings = recipe(weights={"terms": "tokens", "examples": "examples"}[field])

    def claims(site: Pretender, order: TrainRequest, reply: TrainReply) -> TrainReply:
        return dataclasses.replace(reply, **{field: 10**9}) if order.kind == "train" else reply

    hall.run(settings, hall.sites(settings, {"dee": claims}))
    refusals = hall.events("refused")
    assert [(event["site"], event["field"]) for event in refusals] == [("dee", field)] * 4
    assert all("dee" not in sites for sites in hall.admitted.values())
