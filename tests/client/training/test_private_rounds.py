"""Differentially private rounds of a site: what they spend, when they repeat, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from opacus.accountants import RDPAccountant

from colora.client.artifacts.transfer import _distillation_plan
from colora.client.training.privacy_budget import LEDGER, PrivacyLedger
from colora.client.training.state_store import StateStore
from colora.client.training.trainer import Trainer
from colora.common.adapters.initialization import initial_shared_state
from colora.common.config.loader import recipe_from
from colora.common.config.schema import Plan, PrivacySettings
from colora.common.errors import ConfigError, ModelError, RefusedError, StateError
from colora.common.protocol.types import EPSILON, TrainReply
from colora.common.training.accountant import Spending, epsilon_of, noise_for
from colora.simulation.run import simulate

from .test_trainer import Town, order, randomized, same, town

__all__ = ["town"]
PRIVACY = PrivacySettings(noise_multiplier=1.0)


def private_plan(town: Town, privacy: PrivacySettings = PRIVACY, **train: Any) -> Plan:
    return dataclasses.replace(town.plan(**train), privacy=privacy)


def ledger_of(site: Trainer) -> dict[str, Any]:
    path = site.store.folder.parent / LEDGER
    return json.loads(path.read_text())["spendings"] if path.exists() else {}


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


def test_the_limit_of_a_site_counts_all_federations(town: Town) -> None:
    """Before the first round, and in every round."""
    plan = private_plan(town)
    site = town.site(plan)
    assert site.private_rounds
    ledger = PrivacyLedger(site.store.folder.parent / LEDGER)
    ledger.spend("other", "key", Spending(1.0, 0.25, 8))
    both = epsilon_of([Spending(1.0, 0.25, 16)], 1e-5)
    site.private_rounds.max_epsilon = both * 1.01
    site.site_info()
    site.private_rounds.max_epsilon = both * 0.99
    with pytest.raises(RefusedError, match=r"allow\.max_epsilon, of all federations"):
        site.site_info()
    site.private_rounds.max_epsilon = epsilon_of([Spending(1.0, 0.25, 9)], 1e-5)
    with pytest.raises(RefusedError, match=r"allow\.max_epsilon"):
        site.handle(order(plan, 1, initial_shared_state(plan, 2)))


def test_the_forecast_is_refused_before_the_first_round(town: Town) -> None:
    plan = private_plan(town, PrivacySettings(epsilon=4.0))
    site = town.site(plan)
    assert site.private_rounds
    assert 3.8 < site.private_rounds.forecast.epsilon() <= 4.0
    site.private_rounds.max_epsilon = 3.0
    with pytest.raises(RefusedError) as refused:
        site.site_info()
    assert str(refused.value).startswith("site ada: privacy.epsilon: expected at most 3 (allow.max_epsilon")
    assert ledger_of(site) == {}


def test_a_delta_that_allows_publishing_an_example_is_refused(town: Town) -> None:
    site = town.site(private_plan(town, PrivacySettings(epsilon=4.0, delta=0.1)))
    with pytest.raises(ConfigError, match=r"privacy\.delta is 0\.1, which is no protection for 16 training examples"):
        site.site_info()


def test_a_private_round_never_starts_from_a_state_without_noise(town: Town) -> None:
    """A coordinator asks for the final steps early, which have no noise, and names their state as admitted."""
    plan = private_plan(town, final_steps=2)
    site, shared = town.site(plan), initial_shared_state(plan, 2)
    site.handle(order(plan, 1, shared))
    final = site.handle(order(plan, 2, shared, phase="finalize"))
    assert (final.terms, final.examples) == (0, 0), "counts of steps without noise"
    with pytest.raises(RefusedError, match="trained without noise"):
        site.handle(order(plan, 3, shared))
    assert len(ledger_of(site)) == 1


def test_a_plan_that_becomes_private_cannot_continue_from_older_states(town: Town) -> None:
    plan = town.plan()
    shared = initial_shared_state(plan, 2)
    town.site(plan).handle(order(plan, 1, shared))
    private = private_plan(town)
    with pytest.raises(RefusedError, match="trained without noise"):
        town.site(private).handle(order(private, 2, shared))


def test_other_rows_get_other_noise_and_spend_again(town: Town) -> None:
    """A coordinator replays round 1 after the site's rows have changed."""
    plan = private_plan(town, PrivacySettings(noise_multiplier=1e4), optimizer="sgd", steps=1)
    shared, moved = initial_shared_state(plan, 2), []
    for rows in (16, 15):
        site = town.site(plan, rows=rows)
        for path in site.store.folder.glob("round-*"):
            path.unlink()
        reply = site.handle(order(plan, 1, shared))
        moved.append(np.concatenate([(reply.shared[key] - shared[key]).ravel() for key in sorted(shared)]))
    assert len(ledger_of(site)) == 2
    assert abs(np.corrcoef(moved[0], moved[1])[0, 1]) < 0.2


def test_a_round_that_runs_again_with_another_secret_has_other_noise_and_spends_again(town: Town) -> None:
    """The secret is lost, or a bit of it flips: a second noise on the same gradients would let them be averaged."""
    plan = private_plan(town, PrivacySettings(noise_multiplier=1e4), optimizer="sgd", steps=1)
    shared, moved = initial_shared_state(plan, 2), []
    for secret in ("a" * 64, "b" + "a" * 63, "a" * 64):
        site = town.site(plan)
        assert site.private_rounds
        site.private_rounds.secret = secret
        site.store.path(1).unlink(missing_ok=True)
        reply = site.handle(order(plan, 1, shared))
        moved.append(np.concatenate([(reply.shared[key] - shared[key]).ravel() for key in sorted(shared)]))
    assert len(ledger_of(site)) == 2
    assert abs(np.corrcoef(moved[0], moved[1])[0, 1]) < 0.2
    assert (moved[0] == moved[2]).all()


def test_one_example_without_a_finite_loss_does_not_refuse_a_round(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the refusal would tell that the example is there."""
    plan = private_plan(town)
    site = town.site(plan)
    loss_of, calls = site.task.loss_of, []

    def sometimes_infinite(*arguments: Any) -> Any:
        calls.append(1)
        loss, terms = loss_of(*arguments)
        return (loss * float("inf") if len(calls) == 2 else loss), terms

    monkeypatch.setattr(site.task, "loss_of", sometimes_infinite)
    reply = site.handle(order(plan, 1, initial_shared_state(plan, 2)))
    assert len(calls) > 2
    assert all(np.isfinite(value).all() for value in reply.shared.values())


def test_counts_of_cut_and_empty_rows_stay_at_the_site(town: Town) -> None:
    """They depend on ``model.max_length``, which a coordinator can vary."""
    plan = private_plan(town)
    short = dataclasses.replace(plan, model=dataclasses.replace(plan.model, max_length=4))
    assert town.site(dataclasses.replace(short, privacy=PrivacySettings())).site_info().truncated > 0
    assert town.site(short).site_info().truncated == 0


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
    for call in (site.site_info, lambda: site.handle(order(plan, 1, initial_shared_state(plan, 2)))):
        with pytest.raises(ModelError, match="depend on the other rows of the batch"):
            call()
    assert ledger_of(site) == {}


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("train", "fallback", "local"),
        ("train", "head_init", "probe"),
        ("train", "class_weights", "balanced"),
        ("train", "report_benefit", True),
        ("adapter", "init", "spectral"),
        ("evaluation", "validation_loss", True),
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
        ({"server": {"patience": 2}, "data": {"validation_fraction": 0.3}}, "server.patience"),
        ({"server": {"keep": "best"}, "data": {"validation_fraction": 0.3}}, "server.keep"),
    ],
)
def test_a_recipe_that_would_break_the_guarantee_is_refused(tiny_recipe: dict, change: dict, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        recipe_from({**tiny_recipe, "privacy": {"epsilon": 1.0}, **change})
    assert refused.value.field == key


def test_a_table_without_a_budget_is_not_silently_no_privacy(tiny_recipe: dict) -> None:
    with pytest.raises(ConfigError, match=r"\[privacy\] sets neither epsilon nor noise_multiplier"):
        recipe_from({**tiny_recipe, "privacy": {"delta": 1e-6}})


def test_one_round_beyond_the_budget_is_named(town: Town) -> None:
    plan = private_plan(town, PrivacySettings(epsilon=0.01, noise_multiplier=1.0))
    with pytest.raises(RefusedError, match=r"One round alone would spend ε = \d\.\d+, above privacy\.epsilon = 0\.01"):
        town.site(plan).handle(order(plan, 1, initial_shared_state(plan, 2)))


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


def test_a_run_with_a_budget_does_not_get_more_rounds(tiny_recipe: dict, tmp_path: Path) -> None:
    raw = {**tiny_recipe, "privacy": {"epsilon": 8.0}}
    simulate(recipe_from(raw), tmp_path / "run", resume=False)
    with pytest.raises(ConfigError, match=r"The privacy budget of the run in .* is for 2 rounds"):
        simulate(recipe_from({**raw, "rounds": 3}), tmp_path / "run", resume=True)


def test_a_run_with_given_noise_gets_more_rounds_and_spends_more(tiny_recipe: dict, tmp_path: Path) -> None:
    raw = {**tiny_recipe, "privacy": {"noise_multiplier": 2.0}, "train": {**tiny_recipe["train"], "final_steps": 1}}
    simulate(recipe_from(raw), tmp_path / "run", resume=False)
    run = simulate(recipe_from({**raw, "rounds": 3}), tmp_path / "run", resume=True)
    spent = [e["metrics"][EPSILON] for e in run.events() if e["event"] == "reply" and e["site"] == "ada"]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(epsilon_of([Spending(2.0, 4 / 12, 6)], 1e-5))


def test_a_private_model_can_be_transferred_without_noise(tiny_recipe: dict) -> None:
    """It trains on generated texts, and nothing of it is sent."""
    plan = recipe_from({**tiny_recipe, "privacy": {"epsilon": 8.0}}).plan
    assert not _distillation_plan(SimpleNamespace(plan=plan), plan, 8).privacy.enabled  # type: ignore[arg-type]


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
