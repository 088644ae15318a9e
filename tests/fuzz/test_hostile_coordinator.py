"""A coordinator's plans and requests at a site: what is out of bounds is refused at once, and nothing else happens."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from colora.client.trainer_service import plan_bounds
from colora.client.trainer_service.plan_bounds import BOUNDS, LOWEST, check_bounds, check_disk, check_request, numbers
from colora.client.trainer_service.policy import check_allowed
from colora.client.trainer_service.session import TrainerSession
from colora.common.config.schema import (
    CommunicationSettings,
    DataSettings,
    PhaseSettings,
    Plan,
    PrivacySettings,
    to_dict,
    to_json,
)
from colora.common.config.site_schema import AllowSettings, SiteSettings
from colora.common.errors import ColoraError, ConfigError, DataError, RefusedError, StateError
from colora.common.protocol.types import TrainRequest

from .mutations import NUMBERS, TEXTS
from .test_hostile_sites import recipe

PROBABILITIES = {
    *("adapter.dropout", "private.dropout", "train.label_smoothing", "train.warmup_ratio", "transfer.generator.top_p"),
    *("privacy.delta", "communication.update_bits", "communication.broadcast_bits"),
}
SITE = SiteSettings("ada", DataSettings())


def full_plan() -> dict[str, Any]:
    """A plan in which every number is set."""
    plan = recipe(3).plan
    rates = dict.fromkeys(("core_lr", "head_lr", "private_lr", "max_update_norm"), 1.0)
    phase = (PhaseSettings(1, ("A",)),)
    train = dataclasses.replace(plan.train, **rates, steps=1, epochs=1.0, micro_batch=1, phase=phase, schedule="phases")
    transfer = dataclasses.replace(plan.transfer, samples=1)
    patterns = {"rank_pattern": {"proj": 1}, "alpha_pattern": {"proj": 1.0}}
    adapter = dataclasses.replace(plan.adapter, layers_to_transform=(0,), **patterns)
    more = {
        "privacy": PrivacySettings(1.0, 1e-6, 1.0),
        "communication": CommunicationSettings(update_bits=8, broadcast_bits=8),
    }
    return to_dict(dataclasses.replace(plan, adapter=adapter, train=train, transfer=transfer, **more))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, inner in items for leaf in leaves(inner, (*path, key))]
    return [path]


def tables(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if not isinstance(value, dict):
        return []
    return [path, *(inner for key, each in value.items() for inner in tables(each, (*path, key)))]


def changed(raw: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    raw = json.loads(json.dumps(raw))
    table: Any = raw
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    return raw


def test_every_number_of_a_plan_has_a_bound() -> None:
    found = {key for key, _ in numbers(full_plan())}
    assert found == set(BOUNDS)
    check_bounds(recipe(3).plan, SITE)


@pytest.mark.parametrize(
    "key",
    sorted(set(BOUNDS) - PROBABILITIES),
)
def test_a_number_beyond_its_bound_is_refused(key: str) -> None:
    """The schema checks the range of the probabilities, and the choice of the bits."""
    raw = full_plan()
    path = next(p for p in leaves(raw) if ".".join(k for k in p if isinstance(k, str)) in (key, f"{key}.proj"))
    number = int(BOUNDS[key]) * 2
    plan = changed(raw, path, float(number) if isinstance(_at(raw, path), float) else number)
    with pytest.raises(RefusedError, match=key.rpartition(".")[2]):
        TrainerSession(SITE).accept("fed", json.dumps(plan))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_plans_are_refused_or_harmless(count: int) -> None:
    rng, raw, refused = random.Random(5), full_plan(), 0
    places = leaves(raw)
    for _ in range(count):
        plan = changed(raw, rng.choice(places), rng.choice((*NUMBERS, *TEXTS, None, [], {}, [[]], "(a+)+$")))
        text, began = json.dumps(plan), time.monotonic()
        try:
            accepted = TrainerSession(SITE).accept(str(plan.get("name")), text[: rng.choice((len(text), 10**9, 50))])
            assert all(abs(number) <= BOUNDS[key] for key, number in numbers(to_dict(accepted)) if key != "seed")
        except ColoraError as error:
            refused += 1
            public = error.public()
            assert len(public) < 300, public
            assert public.isprintable()
        assert time.monotonic() - began < 5
    assert refused > count * 0.3


KEYS = (
    "a b",
    "a-b",
    "",
    " ",
    "0",
    "row 7",
    "tuple[str, ...]",
    "a\nb",
    "\x1b[2J",
    "\ud800",
    "k" * 100_000,
    "\U0001f600",
)
VALUES = (*NUMBERS, *TEXTS, None, [], {}, "x" * 200_000, "\U0001f600" * 50_000, [1] * 60_000, {"a": "b" * 99_999})


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_plan_with_other_keys_or_long_values_is_refused_in_a_short_sentence(count: int) -> None:
    """Each is refused in one short sentence, whatever its key is and however long its value."""
    rng, raw = random.Random(7), full_plan()
    places, values = tables(raw), leaves(raw)
    told: list[tuple[str, str]] = []
    for number in range(count):
        place = (*rng.choice(places), rng.choice(KEYS)) if number % 2 else rng.choice(values)
        try:
            TrainerSession(SITE).accept("fed", json.dumps(changed(raw, place, rng.choice(VALUES))))
        except ColoraError as error:
            told.append((str(error), error.public()))
    assert len(told) > 0.8 * count
    for text, public in told:
        assert len(public) < 300
        assert len(text) < 1500
        assert text.isprintable()


def test_a_plan_that_is_nested_deeply_is_refused_in_words() -> None:
    for depth in (150, 250, 900, 100_000):
        text = to_json(recipe(3).plan)[:-1] + ', "x": ' + "[" * depth + "]" * depth + "}"
        with pytest.raises(ColoraError) as refused:
            TrainerSession(SITE).accept("fed", text)
        assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "revision",
    [
        *("../../../x", "a..b", "a//b", "/a", "a/", ".", "", "-a", "a b", "a\n", "a@b", "é", "a" * 101, "refs/../pr"),
        *("\x00", "a\\b", "a?b", "{0}"),
    ],
)
def test_a_revision_is_the_name_of_a_branch_tag_or_commit(revision: str) -> None:
    raw = changed(full_plan(), ("model", "revision"), revision)
    with pytest.raises(ConfigError, match=r"model\.revision must be (letters, digits|at most 100 characters)"):
        TrainerSession(SITE).accept("fed", json.dumps(raw))


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/7", "0" * 40, "a_b-c", "_x"])
def test_an_ordinary_revision_is_accepted_where_any_model_is(revision: str) -> None:
    TrainerSession(SITE).accept("fed", json.dumps(changed(full_plan(), ("model", "revision"), revision)))


@pytest.mark.parametrize("key", sorted(LOWEST))
@pytest.mark.parametrize("value", [5e-324, 1e-170, 0.99])
def test_a_number_below_its_bound_is_refused(key: str, value: float) -> None:
    """The accountant cannot compute with a noise multiplier of 1e-170."""
    below = LOWEST[key] * value if value == 0.99 else value
    raw = changed(full_plan(), tuple(key.split(".")), below)
    with pytest.raises(RefusedError, match=rf"{key}: expected at least {LOWEST[key]:g}"):
        TrainerSession(SITE).accept("fed", json.dumps(raw))


@pytest.mark.parametrize(
    ("key", "plan"),
    [
        ("train.phase.steps", {"train": {"schedule": "phases", "phase": [{"steps": 10_001, "groups": ["A"]}] * 100}}),
        (
            "train.personal_steps + train.shared_steps",
            {"train": {"schedule": "alternating", "personal_steps": 600_000, "shared_steps": 400_001}},
        ),
        ("train.steps", {"train": {"steps": 500_001, "fallback": "local"}}),
        ("train.final_steps", {"train": {"final_steps": 500_001, "fallback": "local"}}),
        ("adapter.rank", {"method": {"name": "multilora"}, "adapter": {"rank": 64, "modules": 65}}),
        ("private.rank", {"private": {"kind": "multilora", "rank": 64, "modules": 65}}),
    ],
)
def test_a_sum_or_product_of_allowed_numbers_is_bounded_too(key: str, plan: dict[str, Any]) -> None:
    with pytest.raises(RefusedError) as refused:
        TrainerSession(SITE).accept("fed", json.dumps({**to_dict(recipe(3).plan), **plan}))
    assert refused.value.field == key


@pytest.mark.parametrize("name", ["(a+)+$", ".*", "q|v", "x" * 201, "", "a/b", "query$"])
@pytest.mark.parametrize("as_list", [True, False])
def test_module_names_are_plain(name: str, as_list: bool) -> None:
    plan = recipe(3).plan
    adapter = dataclasses.replace(plan.adapter, target_modules=(name,) if as_list else name)
    with pytest.raises(RefusedError, match=r"adapter.target_modules"):
        check_bounds(dataclasses.replace(plan, adapter=adapter), SITE)


@pytest.mark.parametrize("key", ["exclude_modules", "rank_pattern", "alpha_pattern"])
def test_names_beside_the_target_modules_are_plain(key: str) -> None:
    plan = recipe(3).plan
    value: Any = {"(a+)+$": 1} if key.endswith("pattern") else "(a+)+$"
    adapter = dataclasses.replace(plan.adapter, **{key: value})
    with pytest.raises(RefusedError, match=f"adapter.{key}"):
        check_bounds(dataclasses.replace(plan, adapter=adapter), SITE)


@pytest.mark.parametrize("name", ["flower", "Flower", "logs", "node.json", "services.json", "client.lock", "x.sock"])
def test_a_federation_is_not_named_like_the_sites_own_files(name: str) -> None:
    with pytest.raises(RefusedError, match="name: expected a name that the state folder does not use"):
        TrainerSession(SITE).accept(name, to_json(dataclasses.replace(recipe(3).plan, name=name)))


def test_a_transfer_names_an_allowed_source() -> None:
    site = dataclasses.replace(SITE, allow=AllowSettings(federations=("fed",)))
    plan = recipe(3).plan
    plan = dataclasses.replace(plan, transfer=dataclasses.replace(plan.transfer, source_federation="other"))
    with pytest.raises(RefusedError, match=r"transfer.source_federation: expected one of fed"):
        check_allowed(plan, "fed", site)


@pytest.mark.parametrize(
    ("key", "plan"),
    [
        ("max_rounds", {"rounds": 8}),
        ("max_batch_size", {"train": {"batch_size": 8}}),
        ("max_batch_size", {"evaluation": {"batch_size": 8}}),
        ("max_new_tokens", {"evaluation": {"max_new_tokens": 8}}),
        ("max_new_tokens", {"transfer": {"generator": {"max_new_tokens": 8}}}),
        ("max_calls", {"transfer": {"generator": {"max_calls": 8}}}),
        ("max_samples", {"transfer": {"samples": 8}}),
        ("max_epochs", {"transfer": {"distillation": {"epochs": 8}}}),
    ],
)
def test_each_number_has_a_limit_of_the_site(key: str, plan: dict[str, Any]) -> None:
    limits = dict.fromkeys(("max_rounds", "max_batch_size", "max_new_tokens", "max_calls", "max_samples"), 1000)
    strict = AllowSettings(**{**limits, "max_epochs": 1000, key: 7})  # type: ignore[arg-type]
    raw = json.dumps({**to_dict(recipe(3).plan), **plan})
    TrainerSession(SITE).accept("fed", raw)
    with pytest.raises(RefusedError, match=rf"at most 7 \(allow.{key}\), found "):
        TrainerSession(dataclasses.replace(SITE, allow=strict)).accept("fed", raw)


@pytest.mark.parametrize(("number", "kind"), [(4, "train"), (5, "finalize"), (2**62, "train"), (0, "train")])
def test_a_round_that_the_plan_does_not_have_is_refused(number: int, kind: Any) -> None:
    plan: Plan = recipe(3).plan
    check_request(plan, TrainRequest("fed", 3, "train", 0, "", {}, False), SITE)
    check_request(plan, TrainRequest("fed", 4, "finalize", 0, "", {}, False), SITE)
    with pytest.raises(RefusedError, match="round: expected 1 to "):
        check_request(plan, TrainRequest("fed", number, kind, 0, "", {}, False), SITE)


def test_the_disk_that_a_federation_uses_is_bounded(tmp_path: Path) -> None:
    site = dataclasses.replace(SITE, allow=AllowSettings(max_disk=1e-6))
    check_disk(tmp_path / "none", site)
    (tmp_path / "round-000001.safetensors").write_bytes(b"x" * 2000)
    with pytest.raises(RefusedError, match=r"allow.max_disk"):
        check_disk(tmp_path, site)
    assert plan_bounds.RESERVED


def test_an_error_to_the_coordinator_has_no_path_and_no_row() -> None:
    assert StateError("/home/ada/state/fed/round-000001.safetensors", "x", "y").public() == "StateError"
    assert DataError("row 7 of patients.csv", "x", "y").public() == "DataError"
    assert DataError("data.label", "x", "y").public() == "DataError: data.label"
    assert RefusedError("train.personal_steps + train.shared_steps", "x", "y").public().endswith("train.shared_steps")


def test_time_is_limited_in_evaluation_and_generation_too() -> None:
    import torch

    from colora.client.trainer_service.time_limit import TimeLimit

    layer = torch.nn.Linear(2, 2)
    with TimeLimit(0.05, "ada"):  # an evaluation has no steps
        layer(torch.ones(1, 2))
        time.sleep(0.06)
        with pytest.raises(RefusedError, match=r"allow.max_seconds: expected at most 0.05"):
            layer(torch.ones(1, 2))
    layer(torch.ones(1, 2))  # nothing stays hooked
