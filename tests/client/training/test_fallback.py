"""A site keeps the better of the collaborative and its local model, judged on rows that neither was trained on."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from colora.client.artifacts.predict import Predictor
from colora.client.data.row_schema import hold_out_validation
from colora.client.data.selection import load_site_rows
from colora.client.training import fallback
from colora.client.training.adapted_model import attach_adapters
from colora.client.training.fallback import Comparison, compare, local_plan
from colora.client.training.state_store import StateStore
from colora.client.training.trainer import Trainer
from colora.common.adapters.initialization import initial_shared_state
from colora.common.config.loader import recipe_from
from colora.common.config.schema import Plan, to_json
from colora.common.config.site_schema import SiteSettings
from colora.common.errors import ConfigError, DataError
from colora.common.models.base_model import load_base_model
from colora.common.models.saved import read_saved_model
from colora.common.protocol.types import FALLBACK, FALLBACK_DIFFERENCE, FALLBACK_KEPT, Arrays, TrainReply, TrainRequest
from colora.server.reporting.report import print_report
from colora.server.reporting.summary import summarize
from colora.simulation.run import simulate


def with_fallback(raw: dict, **train: object) -> dict:
    settings = {**raw["train"], "steps": 4, "final_steps": 4, "fallback": "local", **train}
    return {**raw, "train": settings, "data": {"validation_fraction": 0.34}}


@pytest.mark.parametrize(
    ("collaborative", "local", "keeps"),
    [
        ([1.0, 1.1, 0.9, 1.0], [0.5, 0.4, 0.6, 0.5], True),
        ([0.5, 0.4, 0.6, 0.5], [1.0, 1.1, 0.9, 1.0], False),
        ([1.0, 0.2, 1.0, 0.2], [0.2, 1.0, 0.2, 0.9], False),  # no clear difference
        ([1.0], [0.1], False),  # one row tells nothing
        ([1.0, 1.0], [math.nan, 0.1], False),  # a local model that diverged
        ([math.inf, 1.0], [0.5, 0.5], True),  # a collaborative model that diverged
    ],
)
def test_the_local_model_is_kept_if_its_loss_is_clearly_lower(
    collaborative: list[float], local: list[float], keeps: bool
) -> None:
    assert compare(collaborative, local).keeps_local is keeps


def test_the_comparison_is_paired() -> None:
    found = compare([1.0, 3.0, 2.0], [0.5, 2.6, 1.4])
    assert found.difference == pytest.approx(0.5)
    assert found.standard_error == pytest.approx(0.1 / 3**0.5)
    assert Comparison(0.1, 0.1).keeps_local is False


def test_validation_rows_are_the_last_ones_of_every_label_and_no_label_is_lost() -> None:
    rows = [{"text": str(i), "label": label} for i, label in enumerate("ababaaaaac")]
    train, validation = hold_out_validation(rows, 0.3)
    assert [row["text"] for row in train] == ["0", "1", "2", "4", "5", "6", "9"]
    assert [(row["text"], row["label"]) for row in validation] == [("3", "b"), ("7", "a"), ("8", "a")]
    assert hold_out_validation([*train, *validation], 0.3) == (train, validation)
    assert hold_out_validation(rows, 0.0) == (rows, ())


class Site:
    """The first site of a recipe, without Flower."""

    def __init__(self, raw: dict, folder: Path, *, local: bool = False) -> None:
        recipe = recipe_from(raw)
        self.plan: Plan = local_plan(recipe.plan) if local else recipe.plan
        model = attach_adapters(load_base_model(self.plan.model, generates=False), self.plan)
        settings = SiteSettings(recipe.site[0].name, recipe.site[0].data)
        rows = load_site_rows(settings, recipe.seed)
        self.folder, self.trainer = folder, Trainer(model, rows, StateStore(folder, self.plan.name))
        self.start: Arrays = {} if local else initial_shared_state(self.plan)

    def round(self, t: int, shared: Arrays, *, finalize: bool = False) -> TrainReply:
        kind = "finalize" if finalize else "train"
        return self.trainer.handle(TrainRequest(self.plan.name, t, kind, t - 1, to_json(self.plan), shared, finalize))


def test_a_kept_local_model_is_that_of_a_site_that_trained_alone(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same site with personal A and B, to the bit; and what ``colora predict`` makes of the state file."""
    monkeypatch.setattr(fallback, "compare", lambda collaborative, local: Comparison(0.5, 0.1))
    raw = with_fallback(tiny_recipe)
    site, alone = Site(raw, tmp_path / "site"), Site(raw, tmp_path / "alone", local=True)
    for t in (1, 2):
        site.round(t, site.start)
        alone.round(t, {})
    reply, oracle = site.round(3, site.start, finalize=True), alone.round(3, {}, finalize=True)

    assert reply.metrics[FALLBACK_KEPT] == 1
    assert reply.metrics[FALLBACK_DIFFERENCE] == 0.5
    saved, expected = read_saved_model(site.folder), read_saved_model(alone.folder)
    assert not saved.shared
    assert saved.personal.keys() == expected.personal.keys()
    assert all(np.array_equal(saved.personal[key], value) for key, value in expected.personal.items())
    assert {k: v for k, v in reply.metrics.items() if k.startswith("personal.")} == {
        k: v for k, v in oracle.metrics.items() if k.startswith("personal.")
    }
    texts = [{"text": row["text"]} for row in site.trainer.task.rows.test]
    assert list(Predictor(saved).predict(texts)) == list(Predictor(expected).predict(texts))


def test_the_collaborative_model_is_kept_unchanged_otherwise(tiny_recipe: dict, tmp_path: Path) -> None:
    """Oracle: the same recipe without ``train.fallback``, to the bit. The local model never leaves the site."""
    raw = with_fallback(tiny_recipe, lr=1e-6, head_lr=1e-6)  # the two models stay the same: no clear difference
    both, plain = Site(raw, tmp_path / "both"), Site(with_fallback(raw, fallback=None), tmp_path / "plain")
    for t in (1, 2):
        replies = [site.round(t, site.start) for site in (both, plain)]
        assert replies[0].metrics == replies[1].metrics
        assert all(np.array_equal(replies[0].shared[key], value) for key, value in replies[1].shared.items())
    finals = [site.round(3, both.start, finalize=True) for site in (both, plain)]
    assert finals[0].metrics[FALLBACK_KEPT] == 0
    assert {k: v for k, v in finals[0].metrics.items() if k not in FALLBACK} == finals[1].metrics
    kept, expected = (read_saved_model(site.folder) for site in (both, plain))
    for part in ("shared", "personal"):
        mine, theirs = getattr(kept, part), getattr(expected, part)
        assert not [key for key, value in theirs.items() if not np.array_equal(mine[key], value)]


def test_a_local_model_that_diverges_does_not_end_the_round(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(with_fallback(tiny_recipe), tmp_path / "site")
    local = site.trainer.local
    assert local is not None
    take_steps = local.take_steps

    def diverging(request: TrainRequest, state: object, on_step: object, method: object = None) -> object:
        return dataclasses.replace(take_steps(request, state, on_step, method), loss=math.nan)

    monkeypatch.setattr(local, "take_steps", diverging)
    assert site.round(1, site.start).shared
    assert "The model of train.fallback was not trained in round 1" in caplog.text
    state = site.trainer.store.state(1)
    assert state is not None
    assert state.local is not None
    assert state.local.position == 0


def test_a_run_tells_what_each_site_kept(tiny_recipe: dict, tmp_path: Path) -> None:
    run = simulate(recipe_from(with_fallback(tiny_recipe)), tmp_path / "run", resume=False)
    rows = summarize(run.events()).rows
    assert all(row.kept_local is not None for row in rows.values())
    console = Console(file=io.StringIO(), width=200, record=True)
    print_report(summarize(run.events()), run.path, console)
    assert "local model" in console.export_text()
    assert all(row.train == 8 for row in rows.values())  # 4 of 12 rows are for validation


def test_a_site_without_validation_rows_is_refused(tiny_recipe: dict, tmp_path: Path) -> None:
    raw = {**with_fallback(tiny_recipe), "data": {}}
    with pytest.raises(DataError, match=r"data\.validation_fraction"):
        Site(raw, tmp_path / "site")


def test_where_a_fallback_is_not_possible(tiny_recipe: dict) -> None:
    with pytest.raises(ConfigError, match=r"train\.fallback is not possible with method 'multilora'"):
        recipe_from({**with_fallback(tiny_recipe), "method": {"name": "multilora"}})
