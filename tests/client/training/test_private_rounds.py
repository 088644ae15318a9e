"""Differentially private rounds of a site: what they spend, when they repeat, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from opacus.accountants import RDPAccountant

from colora.client.training.privacy_budget import LEDGER, PrivacyLedger, Spending, epsilon_of, noise_for
from colora.client.training.private_rounds import PrivateRounds
from colora.client.training.state_store import StateStore
from colora.client.training.trainer import Trainer
from colora.common.adapters.initialization import initial_shared_state
from colora.common.config.loader import recipe_from
from colora.common.config.schema import Plan, PrivacySettings
from colora.common.errors import ConfigError, ModelError, QuorumError, RefusedError, StateError
from colora.common.protocol.types import EPSILON, TrainReply
from colora.simulation.run import simulate

from .test_trainer import Town, order, randomized, same, town

__all__ = ["town"]
PRIVACY = PrivacySettings(noise_multiplier=1.0)


def private_plan(town: Town, privacy: PrivacySettings = PRIVACY, **train: Any) -> Plan:
    return dataclasses.replace(town.plan(**train), privacy=privacy)


def ledger_of(site: Trainer) -> dict[str, Any]:
    path = site.store.folder.parent / LEDGER
    return json.loads(path.read_text()) if path.exists() else {}


# --- the accountant -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Optimal order:UserWarning")
@pytest.mark.parametrize(("noise", "rate"), [(1.1, 0.01), (0.7, 0.25), (2.0, 1.0), (4.0, 0.01)])
def test_epsilon_is_that_of_opacus_step_by_step(noise: float, rate: float) -> None:
    accountant = RDPAccountant()
    for _ in range(50):
        accountant.step(noise_multiplier=noise, sample_rate=rate)
    parts = [Spending(noise, rate, 1)] * 40 + [Spending(noise, rate, 10)]
    assert epsilon_of(parts, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-12)


def test_epsilon_of_the_example_in_the_paper() -> None:
    """Abadi et al. 2016, section 3.2: q = 0.01, σ = 4, 10,000 steps give ε ≈ 1.26 at δ = 1e-5."""
    assert 0.8 < epsilon_of([Spending(4.0, 0.01, 10_000)], 1e-5) < 1.26


def test_epsilon_of_full_batches_is_below_the_closed_form() -> None:
    """T Gaussian releases of noise σ are one of noise σ/√T: ε ≤ T/(2σ²) + √(2 T ln(1/δ))/σ (Mironov 2017)."""
    noise, steps, delta = 8.0, 16, 1e-5
    rho = steps / (2 * noise**2)
    epsilon = epsilon_of([Spending(noise, 1.0, steps)], delta)
    assert 0.7 * (rho + 2 * (rho * np.log(1 / delta)) ** 0.5) < epsilon < rho + 2 * (rho * np.log(1 / delta)) ** 0.5


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 8.0])
def test_the_noise_for_a_budget_spends_nearly_all_of_it(epsilon: float) -> None:
    noise = noise_for(epsilon, 1e-5, 0.1, 200)
    assert 0.95 * epsilon < epsilon_of([Spending(noise, 0.1, 200)], 1e-5) <= epsilon


# --- rounds ---------------------------------------------------------------------------------------------------------


def test_a_repeated_round_has_the_same_bits_and_spends_nothing(town: Town) -> None:
    plan = private_plan(town)
    site, shared = town.site(plan), initial_shared_state(plan, 2)
    first = site.handle(order(plan, 1, shared))
    ledger = ledger_of(site)
    assert len(ledger) == 1
    again = town.site(plan)
    assert same(again.handle(order(plan, 1, shared)).shared, first.shared)
    again.store.path(1).unlink()  # a kill between the ledger and the state
    assert same(again.handle(order(plan, 1, shared)).shared, first.shared)
    assert ledger_of(again) == ledger
    assert first.metrics[EPSILON] == pytest.approx(epsilon_of([Spending(1.0, 0.25, 2)], 1e-5))


def test_another_request_for_the_same_round_gets_other_noise_and_spends_again(town: Town) -> None:
    """With equal noise, the difference of two replies would have none."""
    plan = dataclasses.replace(private_plan(town, PrivacySettings(noise_multiplier=1e4), optimizer="sgd", steps=1))
    site, shared = town.site(plan), initial_shared_state(plan, 2)
    other = {key: value + np.float32(1e-6) for key, value in shared.items()}
    moved = []
    for start in (shared, other):
        reply = site.handle(order(plan, 1, start))
        moved.append(np.concatenate([(reply.shared[key] - start[key]).ravel() for key in sorted(start)]))
    assert len(ledger_of(site)) == 2
    assert abs(np.corrcoef(moved[0], moved[1])[0, 1]) < 0.2


def test_the_same_request_from_another_state_gets_other_noise_and_spends_again(town: Town) -> None:
    plan = private_plan(town)
    site, shared = town.site(plan), randomized(initial_shared_state(plan, 2))
    site.handle(order(plan, 1, shared))
    site.handle(order(plan, 2, shared))
    site.store.path(2).unlink()
    state = site.store.path(1)
    fresh = town.site(plan, at="fresh")
    fresh.handle(order(plan, 1, initial_shared_state(plan, 2)))
    state.write_bytes(fresh.store.path(1).read_bytes())
    site.handle(order(plan, 2, shared))
    assert len(ledger_of(site)) == 3


def test_a_site_stops_when_its_budget_is_spent(town: Town) -> None:
    plan = private_plan(town, PrivacySettings(epsilon=4.0))
    site, shared = town.site(plan), initial_shared_state(plan, 2)
    for t in range(1, plan.rounds + 1):
        reply = site.handle(order(plan, t, shared))
    assert 3.8 < reply.metrics[EPSILON] <= 4.0
    with pytest.raises(RefusedError, match=r"The privacy budget is spent: with this round ε would be 4\.\d+, above"):
        site.handle(order(plan, 2, randomized(shared)))
    assert len(ledger_of(site)) == plan.rounds


def test_the_limit_of_a_site_counts_all_federations(town: Town, tmp_path: Path) -> None:
    plan = private_plan(town)
    ledger = PrivacyLedger(tmp_path / LEDGER)
    ledger.spend("other", "key", Spending(1.0, 0.25, 2))
    two = epsilon_of([Spending(1.0, 0.25, 4)], 1e-5)
    rounds = PrivateRounds(plan, "ada", "s", 16, ledger, max_epsilon=two * 0.99)
    with pytest.raises(RefusedError, match=r"allow\.max_epsilon"):
        rounds._check_budget()
    PrivateRounds(plan, "ada", "s", 16, ledger, max_epsilon=two * 1.01)._check_budget()


def test_the_forecast_is_refused_before_the_first_round(town: Town) -> None:
    plan = private_plan(town, PrivacySettings(epsilon=4.0))
    site = town.site(plan)
    assert site.private_rounds
    assert 3.8 < site.private_rounds.forecast() <= 4.0
    site.private_rounds.max_epsilon = 3.0
    with pytest.raises(RefusedError) as refused:
        site.site_info()
    assert str(refused.value).startswith("site ada: privacy.epsilon: expected at most 3 (allow.max_epsilon), found 4")
    assert ledger_of(site) == {}


def test_a_damaged_ledger_ends_the_round(town: Town) -> None:
    plan = private_plan(town)
    site = town.site(plan)
    (site.store.folder.parent).mkdir(parents=True, exist_ok=True)
    (site.store.folder.parent / LEDGER).write_text('{"key": {"noise')
    with pytest.raises(StateError, match=r"privacy\.json is damaged"):
        site.handle(order(plan, 1, initial_shared_state(plan, 2)))


@pytest.mark.parametrize("kind", ["trial", "initialize"])
def test_requests_without_noise_are_refused(town: Town, kind: Any) -> None:
    plan = private_plan(town)
    site = town.site(plan)
    with pytest.raises(RefusedError, match="a round, with differential privacy"):
        site.handle(order(plan, 0, initial_shared_state(plan, 2), admitted=0, phase=kind))


def test_a_model_that_mixes_rows_is_refused(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertForSequenceClassification

    forward = BertForSequenceClassification.forward

    def mixing(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits = out.logits + out.logits.mean(0, keepdim=True)
        return out

    monkeypatch.setattr(BertForSequenceClassification, "forward", mixing)
    plan = private_plan(town)
    site = town.site(plan)
    with pytest.raises(ModelError, match="depend on the other rows of the batch"):
        site.handle(order(plan, 1, initial_shared_state(plan, 2)))
    assert ledger_of(site) == {}


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("train", "fallback", "local"),
        ("train", "head_init", "probe"),
        ("train", "class_weights", "balanced"),
        ("train", "report_benefit", True),
        ("adapter", "init", "spectral"),
        ("model", "precision", "fp16"),
    ],
)
def test_a_site_refuses_plans_that_would_break_the_guarantee(town: Town, table: str, key: str, value: Any) -> None:
    """Also if the coordinator has not checked its recipe."""
    plan = private_plan(town)
    changed = dataclasses.replace(plan, **{table: dataclasses.replace(getattr(plan, table), **{key: value})})
    bench = town.bench(plan)
    with pytest.raises(ConfigError, match=rf"{table}\.{key} is .* not possible with \[privacy\]"):
        town.site(changed, bench=dataclasses.replace(bench, plan=changed))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"server": {"groups": "similarity"}}, "server.groups"),
        ({"server": {"weights": "benefit"}}, "server.weights"),
        ({"server": {"patience": 2}, "data": {"validation_fraction": 0.3}}, "evaluation.validation_loss"),
    ],
)
def test_a_recipe_that_would_break_the_guarantee_is_refused(tiny_recipe: dict, change: dict, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        recipe_from({**tiny_recipe, "privacy": {"epsilon": 1.0}, **change})
    assert refused.value.field == key


# --- whole runs -----------------------------------------------------------------------------------------------------


def test_no_metric_but_epsilon_leaves_a_site(tiny_recipe: dict, tmp_path: Path, wire: list[Message]) -> None:
    recipe = recipe_from({**tiny_recipe, "privacy": {"epsilon": 8.0}})
    run = simulate(recipe, tmp_path / "run", resume=False)
    sent = {key for m in wire if m.has_content() and "metrics" in m.content for key in m.content["metrics"]}
    assert sent == {EPSILON}
    kept = StateStore(run.path / "sites" / "ada" / "state", "tiny").newest()
    assert kept is not None
    assert kept.base, "the site knows its own metrics"


def test_with_all_metrics_a_simulation_shows_them(tiny_recipe: dict, tmp_path: Path) -> None:
    recipe = recipe_from({**tiny_recipe, "privacy": {"epsilon": 8.0, "metrics": "all"}})
    events = simulate(recipe, tmp_path / "run", resume=False).events()
    metrics = next(e["metrics"] for e in reversed(events) if e["event"] == "reply")
    assert {EPSILON, "personal.accuracy"} <= metrics.keys()


def test_more_rounds_than_the_budget_pays_for_end_the_run(tiny_recipe: dict, tmp_path: Path) -> None:
    """``--rounds`` extends a run whose budget is spent: every site says so."""
    raw = {**tiny_recipe, "privacy": {"epsilon": 8.0}}
    simulate(recipe_from(raw), tmp_path / "run", resume=False)
    with pytest.raises(QuorumError, match=r"The privacy budget is spent|ε would be|privacy\.epsilon"):
        simulate(recipe_from({**raw, "rounds": 3}), tmp_path / "run", resume=True)


def test_the_batched_engine_trains_privately_as_well(tiny_recipe: dict, tmp_path: Path) -> None:
    """Private rounds train one site after the other, with equal bits."""
    raw = {**tiny_recipe, "privacy": {"noise_multiplier": 1.0}}
    replies: list[dict[str, TrainReply]] = []
    for engine in ("local", "batched"):
        settings = {**raw["simulation"], "engine": engine}
        run = simulate(recipe_from({**raw, "simulation": settings}), tmp_path / engine, resume=False)
        states = {p.parent.parent.name: p.read_bytes() for p in run.path.glob("sites/*/state/round-000002*")}
        stores = {site: StateStore(run.path / "sites" / site / "state", "tiny") for site in states}
        replies.append({site: store.newest().tensors for site, store in stores.items()})  # type: ignore[union-attr]
    for site, tensors in replies[0].items():
        assert same({k: v.numpy() for k, v in tensors.items()}, {k: v.numpy() for k, v in replies[1][site].items()})
