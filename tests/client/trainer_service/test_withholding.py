"""A trainer process with limits on what it tells: what leaves it, and what its audit logs say."""

from __future__ import annotations

import dataclasses
import json
import signal
from typing import TYPE_CHECKING

import pytest

from colora.client.deployment.checks.plans import QUIET, check_plans
from colora.client.trainer_service import audit_log
from colora.client.trainer_service.audit_log import AuditLog
from colora.client.trainer_service.client import TrainerError
from colora.common.config.schema import Plan, PrivacySettings, to_json
from colora.common.protocol.types import EPSILON, VALIDATION_LOSS, hash_arrays

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SiteSetup


def site_log(setup: SiteSetup) -> list[dict]:
    return [json.loads(line) for line in (setup.state / "audit.jsonl").read_text().splitlines()]


def test_the_audit_log_says_what_was_rounded_and_withheld(site_setup: SiteSetup) -> None:
    """Round 1 asked twice with different adapters: one measurement, two updates. A repetition gives the same bytes."""
    site_setup.configure("[allow]", 'metrics = "rounded"', "max_evaluations = 1").start()
    site, plan = site_setup.client(), site_setup.plan()
    first, second = site_setup.request(plan), site_setup.request(plan, seed=1)
    replies = [site.handle(each) for each in (first, second, first)]
    exact = site_setup.expected(plan, first)[0]
    assert replies[0].shared.keys() == replies[1].shared.keys() == exact.shared.keys()
    assert sorted(replies[0].metrics) == sorted(exact.metrics) == sorted(replies[2].metrics)
    assert replies[0].metrics["base.accuracy"] in (0.0, 0.5, 1.0)  # of 6 test rows, in halves
    assert replies[0].metrics["train.loss"] == float(f"{exact.metrics['train.loss']:.2g}")
    assert replies[0].metrics == replies[2].metrics
    assert replies[1].metrics == {}
    lines = [line for line in site_setup.audit() if line["kind"] == "reply"]
    assert [line.get("rounded", []) for line in lines] == [sorted(exact.metrics), [], sorted(exact.metrics)]
    assert lines[1]["withheld"] == sorted(exact.metrics)
    assert lines[1]["metrics"] == []


def test_a_validation_is_measured_beside_the_next_round_and_once(site_setup: SiteSetup) -> None:
    """Its number is that of the next round. Both are answered with metrics, a second validation is not."""
    data = 'source = "rows.csv"\nvalidation_fraction = 0.25\n'
    site_setup.configure("[allow]", "max_evaluations = 1", data=data).start()
    site, plan = site_setup.client(), site_setup.plan()
    site.handle(site_setup.request(plan))
    asked = [
        dataclasses.replace(site_setup.request(plan, 2, seed=seed), kind="validate", admitted_round=1, evaluate=False)
        for seed in (1, 2, 1)
    ]
    replies = [site.handle(each) for each in asked]
    assert [sorted(reply.metrics) for reply in replies] == [[VALIDATION_LOSS], [], [VALIDATION_LOSS]]
    assert replies[0].metrics == replies[2].metrics
    assert not any(reply.shared for reply in replies)
    assert sorted(path.name for path in (site_setup.state / plan.name).glob("round-*")) == ["round-000001.safetensors"]
    following = dataclasses.replace(site_setup.request(plan, 2), admitted_round=1)
    assert "train.loss" in site.handle(following).metrics
    assert [line["phase"] for line in site_setup.audit()] == ["train", "validate", "validate", "validate", "train"]


def test_a_site_without_metrics_sends_none_and_keeps_its_own(site_setup: SiteSetup) -> None:
    from colora.common.models.saved import read_saved_model

    site_setup.configure("[allow]", 'metrics = "none"').start()
    plan = site_setup.plan()
    reply = site_setup.client().handle(site_setup.request(plan))
    assert reply.metrics == {}
    assert reply.examples == 8
    kept = read_saved_model(site_setup.state / plan.name / "round-000001.safetensors").metadata.metrics
    assert {"train.loss", "base.accuracy"} <= set(kept)
    (line,) = site_setup.audit()
    assert line["withheld"] == sorted(kept)


def test_a_refused_plan_and_a_refused_request_are_in_the_logs_with_their_reasons(site_setup: SiteSetup) -> None:
    allow = ("[allow]", 'optimizers = ["adamw"]', "max_requests_per_day = 1", "min_examples = 8")
    site_setup.configure(*allow).start()
    site, plan = site_setup.client(), site_setup.plan()
    with pytest.raises(TrainerError) as caught:
        site.site_info("city", to_json(site_setup.plan("city", optimizer="sgd")))
    assert caught.value.public() == "RefusedError: train.optimizer"
    assert not (site_setup.state / "city").exists()
    (line,) = site_log(site_setup)
    assert (line["kind"], line["federation"], line["text"]) == ("refusal", "city", "RefusedError: train.optimizer")
    assert line["reason"] == "site ada: train.optimizer: expected one of adamw (allow.optimizers), found sgd"
    first = site_setup.request(plan)
    assert site.handle(first).key == site.handle(first).key == first.key  # the second one is free
    with pytest.raises(TrainerError) as caught:
        site.handle(site_setup.request(plan, 2))
    assert caught.value.public() == "RefusedError: allow.max_requests_per_day"
    line = site_setup.audit()[-1]
    assert line["reason"] == "site ada: allow.max_requests_per_day: expected at most 1 a day (UTC), found 2"


def test_the_check_shows_a_person_what_is_unusual_and_what_was_refused(site_setup: SiteSetup) -> None:
    """The plan of these tests has 2 × 4 examples and 16 tokens, which a provisioned site would refuse."""
    site_setup.configure("[allow]", "max_rank = 4").start()
    assert check_plans(site_setup.state) == QUIET
    site, plan = site_setup.client(), site_setup.plan()
    site.site_info(plan.name, to_json(plan))
    told = check_plans(site_setup.state)
    assert told == (
        "LOOK at town: train.steps is 2 × batch size 4, ordinarily at least 24 examples; "
        "train.batch_size is 4, ordinarily at least 8; model.max_length is 16, ordinarily at least 32"
    )
    wide = dataclasses.replace(plan, adapter=dataclasses.replace(plan.adapter, rank=65))
    with pytest.raises(TrainerError):
        site.site_info(plan.name, to_json(wide))
    assert "1 refused, the last at 2" in check_plans(site_setup.state)
    assert check_plans(site_setup.state).endswith("adapter.rank: expected at most 4 (allow.max_rank), found 65")


def test_the_log_of_refusals_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "MAX_SITE_LOG", 1000)
    for number in range(50):
        AuditLog(tmp_path, "town").refusal("RefusedError: name", f"reason {number}" + "x" * 5000)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"audit.jsonl", "audit-older.jsonl"}
    assert max(sizes.values()) < 2000
    assert "reason 49" in (tmp_path / "audit.jsonl").read_text()


def private(setup: SiteSetup, **privacy: float) -> Plan:
    return dataclasses.replace(setup.plan(), privacy=PrivacySettings(**privacy))


def test_of_a_private_round_only_epsilon_is_told_and_the_ledger_has_it(site_setup: SiteSetup) -> None:
    site_setup.configure(trainer='seeds = "secret"').start()
    plan = private(site_setup, epsilon=8.0)
    site = site_setup.client()
    reply = site.handle(site_setup.request(plan))
    assert reply.metrics.keys() == {EPSILON}
    assert 0 < reply.metrics[EPSILON] < 8
    assert len(json.loads((site_setup.state / "privacy.json").read_text())["spendings"]) == 1
    line = next(line for line in site_setup.audit() if line["kind"] == "reply")
    assert "train.loss" in line["withheld"]
    assert line["metrics"] == [EPSILON]


def test_a_restarted_trainer_repeats_a_private_round_and_spends_nothing(site_setup: SiteSetup) -> None:
    """Killed after the round; then its state is lost as well, but not its secret and its ledger."""
    trainer = site_setup.configure(trainer='seeds = "secret"').start()
    plan = private(site_setup, noise_multiplier=1.0)
    first = site_setup.client().handle(site_setup.request(plan))
    ledger = (site_setup.state / "privacy.json").read_bytes()
    trainer.end(signal.SIGKILL)
    for state in (site_setup.state / "town").glob("round-*"):
        state.unlink()
    site_setup.start()
    again = site_setup.client().handle(site_setup.request(plan))
    assert hash_arrays(again.shared) == hash_arrays(first.shared)
    assert (site_setup.state / "privacy.json").read_bytes() == ledger


@pytest.mark.parametrize(
    ("site_lines", "trainer", "message"),
    [
        (["[allow]", "max_epsilon = 2.0"], 'seeds = "secret"', "privacy.epsilon"),
        (["[allow]", "min_noise = 50.0"], 'seeds = "secret"', "privacy.epsilon"),
        ([], "", "trainer.seeds"),
    ],
)
def test_a_private_plan_that_the_site_does_not_accept_is_refused_at_joining(
    site_setup: SiteSetup, site_lines: list[str], trainer: str, message: str
) -> None:
    site_setup.configure(*site_lines, trainer=trainer).start()
    with pytest.raises(TrainerError, match=message):
        site_setup.client().site_info("town", to_json(private(site_setup, epsilon=8.0)))
