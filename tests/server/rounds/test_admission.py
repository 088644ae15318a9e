"""All refusals of replies and joining sites; each names the site, the field, the expected and the found value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from colora.common.config.loader import recipe_from
from colora.common.errors import RefusedError
from colora.common.protocol.limits import MAX_COUNT
from colora.common.protocol.types import BENEFIT, PROTOCOL, SiteInfo, TrainReply, TrainRequest, hash_layout
from colora.server.rounds.admission import PINNED, ReplyLimits, admit_reply, admit_site, reply_limits

LAYOUT = {"q.lora_A.weight": (2, 3), "q.lora_B.weight": (4, 2)}
SENT = {key: np.ones(shape, np.float32) for key, shape in LAYOUT.items()}
TRAIN = TrainRequest("fed", 7, "train", 6, "{}", SENT, True)
FINALIZE = dataclasses.replace(TRAIN, kind="finalize")
GOOD = TrainReply("ada", "fed", 7, TRAIN.key, {key: value + 1 for key, value in SENT.items()}, terms=40, examples=8)
BOUND = ReplyLimits(10.0, examples=16, terms=64)  # the good update's norm is √14 = 3.74


def put(key: str, value: Any) -> Callable[[TrainReply], TrainReply]:
    """Replace, add or (None) remove one array of the reply."""
    shared = {k: v for k, v in {**GOOD.shared, key: value}.items() if v is not None}
    return lambda reply: dataclasses.replace(reply, shared=shared)


def with_value(value: float) -> Callable[[TrainReply], TrainReply]:
    """Replace one value of B."""
    array = GOOD.shared["q.lora_B.weight"].copy()
    array[3, 1] = value
    return put("q.lora_B.weight", array)


def with_fields(**fields: Any) -> Callable[[TrainReply], TrainReply]:
    return lambda reply: dataclasses.replace(reply, **fields)


A, B = LAYOUT
REFUSALS: dict[str, tuple[Callable[[TrainReply], TrainReply], str, str, str]] = {  # change, field, expected, found
    "a core": (put("q.lora_core", np.eye(2, dtype=np.float32)), "arrays", "the shared groups only", "also q.lora_core"),
    "a head": (
        put("head.classifier.weight", np.eye(2, dtype=np.float32)),
        "arrays",
        "the shared groups only",
        "also head.classifier.weight",
    ),
    "a missing array": (put(B, None), "arrays", B, "no such array"),
    "no arrays at all": (with_fields(shared={}), "arrays", A, "no such array"),
    "a transposed array": (put(A, np.ones((3, 2), np.float32)), A, "shape (2, 3)", "(3, 2)"),
    "a flat array": (put(A, np.ones(6, np.float32)), A, "shape (2, 3)", "(6,)"),
    "a scalar that would broadcast": (put(A, np.float32(1).reshape(())), A, "shape (2, 3)", "()"),
    "double precision": (put(A, np.ones((2, 3))), A, "float32", "float64"),
    "half precision": (put(A, np.ones((2, 3), np.float16)), A, "float32", "float16"),
    "integers": (put(A, np.ones((2, 3), np.int32)), A, "float32", "int32"),
    "the other byte order": (put(A, np.ones((2, 3), ">f4")), A, "float32", ">f4"),
    "a benefit that is not a number": (with_fields(metrics={BENEFIT: float("nan")}), BENEFIT, "0 to 10", "nan"),
    "a negative benefit": (with_fields(metrics={BENEFIT: -0.1}), BENEFIT, "0 to 10", "-0.1"),
    "a benefit out of range": (with_fields(metrics={BENEFIT: 1e12}), BENEFIT, "0 to 10", "1000000000000.0"),
    "NaN": (with_value(float("nan")), B, "finite values", "NaN or infinity"),
    "infinity": (with_value(float("inf")), B, "finite values", "NaN or infinity"),
    "minus infinity": (with_value(float("-inf")), B, "finite values", "NaN or infinity"),
    "no terms": (with_fields(terms=0), "terms", "1 to 64", "0"),
    "negative terms": (with_fields(terms=-5), "terms", "1 to 64", "-5"),
    "far too many terms": (with_fields(terms=65), "terms", "1 to 64", "65"),
    "no examples": (with_fields(examples=0), "examples", "1 to 16", "0"),
    "absurdly many examples": (
        with_fields(examples=2 * MAX_COUNT),
        "examples",
        "1 to 16",
        str(2 * MAX_COUNT),
    ),
    "a step too far": (with_value(12.0), "update norm", "at most 10", "11.5758"),  # √(13·1² + 11²) = √134
    "one number of 1e30": (with_value(1e30), "update norm", "at most 10", "1e+30"),
    "another site's name": (with_fields(site="bob"), "site", "ada", "bob"),
    "another federation": (with_fields(federation="feud"), "federation", "fed", "feud"),
    "the round before": (with_fields(round=6), "round", "7", "6"),
    "another request of this round": (with_fields(key="0" * 32), "request key", TRAIN.key, "0" * 32),
}


def test_a_good_reply_is_admitted() -> None:
    admit_reply(GOOD, "ada", TRAIN, LAYOUT, BOUND)


@pytest.mark.parametrize("name", REFUSALS)
def test_each_refusal_names_site_field_expected_and_found(name: str) -> None:
    change, field, expected, found = REFUSALS[name]
    with pytest.raises(RefusedError) as caught:
        admit_reply(change(GOOD), "ada", TRAIN, LAYOUT, BOUND)
    error = caught.value
    assert (error.site, error.field, error.expected, error.found) == ("ada", field, expected, found)
    assert str(error) == f"site ada: {field}: expected {expected}, found {found}"


def test_the_norm_is_of_the_update_over_all_arrays_and_its_bound_is_met_exactly() -> None:
    """Each of the 6 + 8 values changes by 1, so the norm is √14."""
    admit_reply(GOOD, "ada", TRAIN, LAYOUT, ReplyLimits(14**0.5 + 1e-9))
    with pytest.raises(RefusedError, match=r"update norm: expected at most 3\.74, found 3\.74166"):
        admit_reply(GOOD, "ada", TRAIN, LAYOUT, ReplyLimits(3.74))
    large = {key: value + 1e6 for key, value in SENT.items()}  # large values, but a small update
    request = dataclasses.replace(TRAIN, shared=large)
    reply = dataclasses.replace(GOOD, shared=large, key=request.key)
    admit_reply(reply, "ada", request, LAYOUT, ReplyLimits(1e-3))


def test_a_finalize_reply_needs_no_terms_and_carries_no_array() -> None:
    final = dataclasses.replace(GOOD, key=FINALIZE.key, shared={}, terms=0, examples=0)
    admit_reply(final, "ada", FINALIZE, {}, BOUND)
    with pytest.raises(RefusedError, match=r"site ada: arrays: expected the shared groups only, found also q\.lora_A"):
        admit_reply(dataclasses.replace(final, shared=GOOD.shared), "ada", FINALIZE, {}, BOUND)


def test_a_method_that_shares_nothing_is_admitted_with_nothing() -> None:
    request = dataclasses.replace(TRAIN, shared={})
    admit_reply(dataclasses.replace(GOOD, shared={}, key=request.key), "ada", request, {}, BOUND)


@pytest.mark.parametrize("field", ["federation", "round", "kind", "admitted_round", "plan", "evaluate", "shared"])
def test_every_field_of_a_request_is_part_of_its_key(field: str) -> None:
    """The key identifies a request: changing any field changes it; the order of the arrays does not matter."""
    other = {
        "federation": "g",
        "round": 8,
        "kind": "finalize",
        "admitted_round": 5,
        "plan": '{"a": 1}',
        "evaluate": False,
    }
    values = {**other, "shared": {**SENT, A: SENT[A] + np.float32(1e-7)}}
    assert dataclasses.replace(TRAIN, **{field: values[field]}).key != TRAIN.key  # type: ignore[arg-type]
    assert dataclasses.replace(TRAIN, shared=dict(reversed(SENT.items()))).key == TRAIN.key


# --- joining --------------------------------------------------------------------------------------------------------


SITE = SiteInfo("ada", PROTOCOL, "m" * 64, "t" * 64, "c" * 64, hash_layout(LAYOUT), "generation", 20, 5, 0, 0)
PINS = {**{name: getattr(SITE, name) for name in PINNED}, "layout": hash_layout(LAYOUT)}


def test_a_site_with_the_federations_base_model_may_join() -> None:
    admit_site(SITE, PINS)


@pytest.mark.parametrize("field", ["model", "tokenizer", "chat_template", "layout"])
def test_a_site_with_another_fingerprint_may_not_join(field: str) -> None:
    with pytest.raises(RefusedError) as caught:
        admit_site(dataclasses.replace(SITE, **{field: "x" * 64}), PINS)
    error = caught.value
    assert (error.site, error.field, error.found) == ("ada", field, "x" * 16)
    assert PINS[field].startswith(error.expected)


def test_another_protocol_or_an_empty_site_may_not_join() -> None:
    with pytest.raises(RefusedError, match=f"site ada: protocol: expected {PROTOCOL}, found {PROTOCOL + 1}"):
        admit_site(dataclasses.replace(SITE, protocol=PROTOCOL + 1), PINS)
    with pytest.raises(RefusedError, match="site ada: The site has no training examples and no test examples"):
        admit_site(dataclasses.replace(SITE, train=0, test=0), PINS)
    admit_site(dataclasses.replace(SITE, train=0), PINS)


@pytest.mark.parametrize(("task", "tokens"), [("classification", 1), ("regression", 1), ("generation", 32)])
def test_a_site_cannot_weigh_more_than_the_plan_has_steps(task: str, tokens: int) -> None:
    """Twelve steps of four examples; a generator's example has at most max_length loss terms."""
    raw = {
        "name": "fed",
        "rounds": 2,
        "model": {"source": "synthetic:bilinear-6", "max_length": 32},
        "train": {"schedule": "alternating", "personal_steps": 5, "shared_steps": 7, "batch_size": 4},
        "site": [{"name": "ada", "source": "none.npz"}],
    }
    limits = reply_limits(recipe_from(raw), dataclasses.replace(SITE, task=task, train=7))
    assert (limits.examples, limits.terms) == (48, 48 * tokens)


def test_with_epochs_the_limit_follows_from_the_sites_rows() -> None:
    """Two passes over 10 examples in batches of 4 are 5 steps; a batch has no more examples than the site."""
    raw = {"name": "fed", "rounds": 2, "model": {"source": "synthetic:bilinear-6"}}
    raw |= {"train": {"epochs": 2, "batch_size": 4}, "site": [{"name": "ada", "source": "none.npz"}]}
    limits = {rows: reply_limits(recipe_from(raw), dataclasses.replace(SITE, train=rows)) for rows in (10, 3)}
    assert {rows: each.examples for rows, each in limits.items()} == {10: 20, 3: 6}


def test_a_power_step_has_norm_one_at_most() -> None:
    """‖G‖ = 1 bounds G Gᵀ B and A Gᵀ G, so one site cannot decide the subspaces of all."""
    request = dataclasses.replace(TRAIN, kind="initialize", round=0, admitted_round=0)
    whole = {key: np.full(shape, 1 / np.sqrt(np.prod(shape)), np.float32) for key, shape in LAYOUT.items()}
    reply = dataclasses.replace(GOOD, key=request.key, round=0, shared=whole)
    admit_reply(reply, "ada", request, LAYOUT, BOUND)
    larger = dataclasses.replace(reply, shared={**whole, B: 1.1 * whole[B]})
    with pytest.raises(RefusedError, match=r"site ada: norm of q\.lora_B\.weight: expected at most 1, found 1\.1"):
        admit_reply(larger, "ada", request, LAYOUT, BOUND)
