"""Every limit of [allow] is enforced exactly; a refusal is detailed at the site and short outside."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from colora.client.trainer_service.plan_bounds import ALLOWED
from colora.client.trainer_service.policy import check_allowed
from colora.common.config.schema import Plan, parse
from colora.common.config.site_schema import AllowSettings, SiteSettings
from colora.common.errors import ConfigError, RefusedError
from colora.common.methods import METHODS

PLAN: dict[str, Any] = {
    "name": "north-sea",
    "rounds": 3,
    "model": {"source": "asset:minilm-l6", "max_length": 128},
    "adapter": {"rank": 8},
    "method": {"name": "colora"},
    "train": {"steps": 10, "final_steps": 20},
}
EVERYTHING = {
    "federations": ["south", "north-sea"],
    "models": ["asset:minilm-l6"],
    "methods": ["fedit", "colora"],
    "max_rank": 8,
    "max_steps": 20,
    "max_seconds": 60.0,
    "max_tokens": 128,
    "precision": ["fp32"],
    "max_seeds": 5,
    "tuned_generator": True,
}
GENERATOR = {"model": "asset:minilm-l6"}
PREPARE = {"prepare": True, "discriminator": {"steps": 20}, "generator": GENERATOR}
ALTERNATING = {"schedule": "alternating", "personal_steps": 2, "shared_steps": 3, "steps": 99}


def ask(allow: dict[str, Any], **changes: Any) -> None:
    plan = parse(Plan, {**PLAN, **changes})
    check_allowed(plan, plan.name, parse(SiteSettings, {"name": "ada", "data": {"source": "a.csv"}, "allow": allow}))


def test_a_site_without_limits_allows_any_model_rank_and_steps() -> None:
    ask({}, adapter={"rank": 512}, train={"steps": 10**6})


def test_what_lies_on_every_limit_is_allowed() -> None:
    elsewhere = {*ALLOWED.values(), "max_disk"}  # tests/fuzz/test_hostile_coordinator.py
    elsewhere |= {"min_examples", "min_batch_size", "min_max_length", "optimizers", "require_clipping"}  # lower bounds
    elsewhere |= {"max_epsilon", "max_delta", "min_noise"}  # test_inversion.py, test_withholding.py
    elsewhere |= {"require_secure_aggregation", "min_sites"}  # test_secure_site.py
    elsewhere |= {"metrics", "max_evaluations", "max_requests_per_day"}  # test_release.py, test_request_ledger.py
    assert set(EVERYTHING) == {f.name for f in fields(AllowSettings)} - elsewhere
    ask(EVERYTHING, transfer={**PREPARE, "generator": {**GENERATOR, "mode": "tuned", "tuning_steps": 20}})
    many = {"discriminator": {"steps": 10**6}, "generator": {**GENERATOR, "tuning_steps": 10**6}}
    ask({"max_steps": 20, "max_seeds": 0}, transfer=many)  # nothing is prepared
    ask({"max_steps": 20}, transfer={**many, "prepare": True, "filter": "none"})
    ask({}, transfer=PREPARE)


def test_a_larger_rank_is_allowed_where_the_site_can_train_a_smaller_one() -> None:
    """Up to eight times ``max_rank``."""
    ask({"max_rank": 7})
    ask({"max_rank": 2}, adapter={"rank": 16})


@pytest.mark.parametrize(
    ("allow", "changes", "message"),
    [
        ({"federations": ["a", "b"]}, {}, "federation: expected one of a, b (allow.federations), found 'north-sea'"),
        ({"models": ["m"]}, {}, "model.source: expected one of m (allow.models), found 'asset:minilm-l6'"),
        ({"models": []}, {}, "model.source: expected nothing (allow.models is empty), found 'asset:minilm-l6'"),
        ({"methods": ["ffa"]}, {}, "method.name: expected one of ffa (allow.methods), found 'colora'"),
        (
            {"max_rank": 7},
            {"adapter": {"init": "orthogonal"}},
            "adapter.rank: expected at most 7 (allow.max_rank), found 8",
        ),
        (
            {"max_rank": 7},
            {"method": {"name": "ffa"}},
            "adapter.rank: expected at most 7 (allow.max_rank), found 8",
        ),
        ({"max_rank": 2}, {"adapter": {"rank": 17}}, "adapter.rank: expected at most 2 (allow.max_rank), found 17"),
        ({"max_steps": 9}, {}, "train.steps: expected at most 9 (allow.max_steps), found 10"),
        (
            {"max_steps": 19},
            {"train": {"steps": 10, "fallback": "local"}},
            "train.steps: expected at most 19 (allow.max_steps), found 20",
        ),
        ({}, {"transfer": {**PREPARE, "seeds": 6}}, "transfer.seeds: expected at most 5 (allow.max_seeds), found 6"),
        ({"max_seeds": 0}, {"transfer": PREPARE}, "transfer.seeds: expected at most 0 (allow.max_seeds), found 5"),
        (
            {},
            {"transfer": {**PREPARE, "generator": {"mode": "tuned"}}},
            "transfer.generator.mode: expected target or source (or true in allow.tuned_generator), found tuned",
        ),
        (
            {},
            {"transfer": {"source_federation": "north-sea", "generator": {"mode": "tuned"}}},
            "transfer.generator.mode: expected target or source (or true in allow.tuned_generator), found tuned",
        ),
        (
            {"models": ["asset:minilm-l6"]},
            {"transfer": {**PREPARE, "generator": {"model": "smollm2"}}},
            "transfer.generator.model: expected one of asset:minilm-l6 (allow.models), found 'smollm2'",
        ),
        (
            {"max_rank": 8},
            {"transfer": {**PREPARE, "discriminator": {"rank": 9}}},
            "transfer.discriminator.rank: expected at most 8 (allow.max_rank), found 9",
        ),
        (
            {"max_steps": 20},
            {"transfer": {**PREPARE, "discriminator": {"steps": 21}}},
            "transfer.discriminator.steps: expected at most 20 (allow.max_steps), found 21",
        ),
        (
            {"max_steps": 20, "tuned_generator": True},
            {"transfer": {**PREPARE, "generator": {**GENERATOR, "mode": "tuned", "tuning_steps": 21}}},
            "transfer.generator.tuning_steps: expected at most 20 (allow.max_steps), found 21",
        ),
        ({"max_steps": 19}, {}, "train.final_steps: expected at most 19 (allow.max_steps), found 20"),
        (
            {"max_steps": 4},
            {"train": ALTERNATING},
            "train.personal_steps + train.shared_steps: expected at most 4 (allow.max_steps), found 5",
        ),
        ({"max_tokens": 127}, {}, "model.max_length: expected at most 127 (allow.max_tokens), found 128"),
        ({"precision": []}, {}, "model.precision: expected nothing (allow.precision is empty), found 'fp32'"),
    ],
)
def test_what_lies_beyond_is_refused_in_words(allow: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedError) as refusal:
        ask(allow, **changes)
    assert str(refusal.value) == f"site ada: {message}"
    assert refusal.value.public() == f"RefusedError: {message.split(': expected')[0]}"


HUB: dict[str, Any] = {"source": "org/model", "max_length": 128}


@pytest.mark.parametrize("revision", ["refs/pr/7", "v2", "main"])
def test_an_allowed_model_is_allowed_at_its_default_branch_only(revision: str) -> None:
    """A pull request of a repository holds files of anyone."""
    ask({"models": ["org/model"]}, model=HUB)
    with pytest.raises(RefusedError) as refused:
        ask({"models": ["org/model", "org/model@v1"]}, model={**HUB, "revision": revision})
    expected = f'unset (or "org/model@{revision}" in allow.models)'
    assert str(refused.value) == f"site ada: model.revision: expected {expected}, found {revision}"
    assert refused.value.public() == "RefusedError: model.revision"


def test_an_entry_with_a_revision_allows_that_revision_only() -> None:
    ask({"models": ["org/model@v1"]}, model={**HUB, "revision": "v1"})
    ask({}, model={**HUB, "revision": "v2"})
    for model in (HUB, {**HUB, "revision": "v2"}, {**HUB, "source": "org/other", "revision": "v1"}):
        with pytest.raises(RefusedError, match=r"model\.source: expected one of org/model@v1 \(allow\.models\)"):
            ask({"models": ["org/model@v1"]}, model=model)


def test_steps_of_the_other_schedule_do_not_count() -> None:
    ask({"max_steps": 5}, train=ALTERNATING)


@pytest.mark.parametrize("allow", [{"methods": ["colora+head"]}, {"methods": ["colora", "colora+A+head"]}])
def test_a_head_may_be_shared_where_the_site_says_so(allow: dict[str, Any]) -> None:
    ask(allow, method={"name": "colora", "head": "shared"})


@pytest.mark.parametrize("methods", [None, ["colora"], ["colora+A", "fedit+head"]])
def test_an_allowed_name_is_no_way_to_a_group_that_the_method_leaves_at_the_site(methods: list[str] | None) -> None:
    """Nor does a site file without limits: only the site's own entry shares a group that the table keeps personal."""
    with pytest.raises(RefusedError) as refusal:
        ask({"methods": methods} if methods else {}, method={"name": "colora", "head": "shared"})
    expected = 'personal as in colora (or "colora+head" in allow.methods)'
    assert str(refusal.value) == f"site ada: method.head: expected {expected}, found shared"
    assert refusal.value.public() == "RefusedError: method.head"


def test_a_site_without_limits_takes_every_method_and_none_that_does_not_exist() -> None:
    for name in METHODS:
        ask({}, method={"name": name})
    with pytest.raises(ConfigError, match=r"method\.name"):
        ask({}, method={"name": "fedall"})


def test_two_moved_groups_need_one_entry_that_has_both() -> None:
    moved = {"name": "local", "A": "shared", "head": "shared"}
    with pytest.raises(RefusedError, match=r"site ada: method\.A: .* \(or \"local\+A\+head\" in allow\.methods\)"):
        ask({"methods": ["local+A", "local+head"]}, method=moved)
    ask({"methods": ["local+head+A"]}, method=moved)


@pytest.mark.parametrize("name", METHODS)
def test_keeping_more_at_home_needs_no_leave(name: str) -> None:
    ask({"methods": [name]}, method={"name": name, "A": "personal", "B": "personal", "head": "personal"})
