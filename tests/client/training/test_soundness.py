"""A round that ends in NaN is refused at its site, which keeps its last good state."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from colora.client.data.selection import load_site_rows
from colora.client.training.adapted_model import attach_adapters
from colora.client.training.soundness import check_trained
from colora.client.training.state_store import StateStore
from colora.client.training.trainer import Trainer
from colora.common.adapters.initialization import initial_shared_state
from colora.common.config.loader import recipe_from
from colora.common.config.schema import Recipe, to_json
from colora.common.config.site_schema import SiteSettings
from colora.common.errors import QuorumError, RefusedError
from colora.common.models.base_model import load_base_model
from colora.common.protocol.types import OVERFLOWS, Arrays, RequestKind, TrainReply, TrainRequest
from colora.common.training.loop import TrainOutcome
from colora.server.reporting.events import read_events
from colora.simulation.run import simulate

BROKEN = {"core_lr": 1e34, "head_lr": 1e34}  # the cores overflow, while A and B stay finite


def phased(raw: dict) -> dict:
    """A recipe whose shared groups train before its personal ones, so that only these can become NaN in a round."""
    phases = [{"steps": 2, "groups": ["A", "B"]}, {"steps": 3, "groups": ["core", "head"]}]
    return {**raw, "train": {**raw["train"], "schedule": "phases", "phase": phases, "final_steps": 3}}


def site_of(recipe: Recipe, folder: Path) -> Trainer:
    site = recipe.site[0]
    model = attach_adapters(load_base_model(recipe.plan.model, generates=False), recipe.plan)
    return Trainer(model, load_site_rows(SiteSettings(site.name, site.data), 0), StateStore(folder, recipe.name))


def ask(
    recipe: Recipe, trainer: Trainer, t: int, admitted: int, shared: Arrays | None = None, kind: RequestKind = "train"
) -> TrainReply:
    shared = shared or initial_shared_state(recipe.plan)
    return trainer.handle(TrainRequest(recipe.name, t, kind, admitted, to_json(recipe.plan), shared, False))


@pytest.mark.parametrize("kind", ["train", "finalize"])
def test_the_state_before_the_broken_round_is_the_one_that_stays(
    kind: RequestKind, tiny_recipe: dict, tmp_path: Path
) -> None:
    good = phased(tiny_recipe)
    broken = {**good, "train": {**good["train"], **BROKEN}}
    shared = ask(recipe_from(good), site_of(recipe_from(good), tmp_path), 1, 0).shared
    with pytest.raises(RefusedError, match=r"site ada: .* is not finite\. The site keeps its last state\. Lower train"):
        ask(recipe_from(broken), site_of(recipe_from(broken), tmp_path), 2, 1, shared, kind)
    store = StateStore(tmp_path, "tiny")
    before = store.state(1)
    assert store.state(2) is None
    assert before is not None
    assert all(bool(value.isfinite().all()) for value in before.tensors.values())
    ask(recipe_from(good), site_of(recipe_from(good), tmp_path), 3, 1)  # and a later round goes on from it
    after = store.state(3)
    assert after is not None
    assert after.previous == 1


def test_a_simulation_ends_with_the_reason_and_admits_no_such_round(tiny_recipe: dict, tmp_path: Path) -> None:
    raw = phased(tiny_recipe)
    raw["train"] |= BROKEN
    with pytest.raises(QuorumError, match="not finite"):
        simulate(recipe_from(raw), tmp_path / "run", resume=False)
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert not [event for event in events if event["event"] == "round"]
    assert "Lower train.lr, core_lr, head_lr and private_lr" in (tmp_path / "run" / "log.txt").read_text()


def test_a_round_without_an_applied_step_is_refused() -> None:
    outcome = TrainOutcome(float("nan"), 0, 24, steps=3, applied=0, overflows=63)
    with pytest.raises(
        RefusedError, match=r'all 3 optimizer steps overflowed.* Use model.precision = "bf16" or "fp32"'
    ):
        check_trained(outcome, {}, "ada")


def test_a_round_of_no_steps_is_none_that_failed() -> None:
    check_trained(TrainOutcome(float("nan"), 0, 0), {"head.w": torch.zeros(2)}, "ada")


def test_overflows_are_reported_as_a_metric(tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_from(tiny_recipe)
    trainer = site_of(recipe, tmp_path)
    original = Trainer._train
    monkeypatch.setattr(Trainer, "_train", lambda *a: dataclasses.replace(original(*a), overflows=4))
    assert ask(recipe, trainer, 1, 0).metrics[OVERFLOWS] == 4.0
