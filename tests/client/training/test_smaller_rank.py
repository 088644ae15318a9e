"""Sites whose adapters have a smaller rank than the federation's: the best approximation in, the exact product out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from colora.client.training.adapted_model import AdaptedModel, attach_adapters
from colora.client.training.smaller_rank import SmallerRank, plan_at_rank
from colora.client.training.trainer import Trainer
from colora.common.adapters.inject import scaling_of
from colora.common.config.schema import AdapterSettings, Plan, to_json
from colora.common.errors import RefusedError
from colora.common.models.base_model import load_base_model
from colora.common.models.saved import read_saved_model
from colora.common.protocol.types import Arrays, TrainRequest, hash_layout

from .test_trainer import Town, order, randomized, same, state

A, B = "x.lora_A.weight", "x.lora_B.weight"
SMALLER = SmallerRank(federation=16, site=4)


def arrays(seed: int = 0, rank: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    b = rng.normal(size=(24, rank)) @ rng.normal(size=(rank, 16))
    return {A: rng.normal(size=(16, 32)).astype(np.float32), B: b.astype(np.float32), "head.bias": np.ones(2)}


def best_of_rank(product: np.ndarray, rank: int) -> np.ndarray:
    u, values, v = np.linalg.svd(product)
    return (u[:, :rank] * values[:rank]) @ v[:rank]


def test_what_arrives_is_the_best_approximation_of_the_sites_rank() -> None:
    given = arrays()
    received = SMALLER.received(given)
    assert (received[A].shape, received[B].shape) == ((4, 32), (24, 4))
    np.testing.assert_allclose(received[B] @ received[A], best_of_rank(given[B] @ given[A], 4), atol=2e-4)
    assert received["head.bias"] is given["head.bias"]


def test_what_leaves_is_what_arrived_plus_what_training_changed() -> None:
    """Exact where the sum has the federation's rank: 12 from what arrived, 4 from what was trained."""
    given = arrays(rank=12)
    received = SMALLER.received(given)
    trained = {**received, B: received[B] + np.random.default_rng(1).normal(size=(24, 4)).astype(np.float32)}
    sent = SMALLER.sent(trained, given)
    assert {key: value.shape for key, value in sent.items()} == {key: value.shape for key, value in given.items()}
    expected = given[B] @ given[A] + (trained[B] - received[B]) @ received[A]
    np.testing.assert_allclose(sent[B] @ sent[A], expected, atol=1e-3)


@pytest.mark.parametrize("given", [arrays(), arrays(rank=3), {**arrays(), B: np.zeros((24, 16), np.float32)}])
def test_a_site_that_trains_nothing_sends_what_arrived(given: Arrays) -> None:
    """Otherwise the part that it cannot hold would vanish from the mean, and its update would count as large."""
    sent = SMALLER.sent(SMALLER.received(given), given)
    for key in (A, B):
        np.testing.assert_allclose(sent[key], given[key], atol=1e-4)


@pytest.mark.parametrize("key", [A, B])
def test_values_that_are_not_finite_are_refused(key: str) -> None:
    broken = arrays()
    broken[key][0, 0] = np.nan
    with pytest.raises(RefusedError, match=f"{key}: expected finite values, found NaN or infinity"):
        SMALLER.received(broken)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_smaller_adapter_has_the_same_scaling(rslora: bool, town: Town) -> None:
    plan = dataclasses.replace(town.plan(), adapter=AdapterSettings(16, 8.0, rslora=rslora))
    smaller = plan_at_rank(plan, 4)
    assert smaller.adapter.rank == 4
    assert scaling_of(smaller.adapter) == pytest.approx(scaling_of(plan.adapter))


@pytest.fixture
def town(tiny_bert: Path, tmp_path: Path) -> Town:
    torch.set_num_threads(1)
    return Town(tiny_bert, tmp_path)


@pytest.fixture
def small(town: Town) -> Callable[[Plan], Trainer]:
    """A site of the federation's rank 4 with an adapter of rank 2."""

    def bench(plan: Plan) -> AdaptedModel:
        return attach_adapters(load_base_model(plan.model, generates=False), plan, max_rank=2)

    return lambda plan: town.site(plan, bench=bench(plan))


def first(town: Town, plan: Plan) -> dict[str, np.ndarray]:
    """S_0 of the federation's rank."""
    return dict(town.site(plan, at="whole").received(0))


@pytest.mark.parametrize("method", ["colora", "fedit"])
def test_the_reply_has_the_federations_layout(method: str, town: Town, small: Callable[[Plan], Trainer]) -> None:
    plan = town.plan(method)
    site, whole = small(plan), town.site(plan, at="whole")
    assert site.site_info().layout == whole.site_info().layout == hash_layout(whole.layout)
    assert (site.site_info().rank, whole.site_info().rank) == (2, 0)
    given = first(town, plan)
    sent = site.handle(order(plan, 1, given)).shared
    stored = read_saved_model(site.store.path(1)).shared
    assert not same(sent, given)
    for key in (key for key in sent if "lora_A" in key):  # B begins at zero, so the sum has rank 2
        up = key.replace("lora_A", "lora_B")
        assert np.linalg.matrix_rank(sent[up] @ sent[key], tol=1e-4) == 2
        np.testing.assert_allclose(sent[up] @ sent[key], stored[up] @ stored[key], atol=1e-5)


def test_local_only_training_has_the_sites_rank_too(town: Town, small: Callable[[Plan], Trainer]) -> None:
    """Otherwise a simulation would compare a federation's small adapter with a large one."""
    plan = town.plan("local")
    site = small(plan)
    reply = site.handle(order(plan, 1, {}))
    assert (reply.shared, site.plan.adapter.rank, site.site_info().rank) == ({}, 2, 2)


def test_a_finished_model_is_complete_in_the_sites_rank(town: Town, small: Callable[[Plan], Trainer]) -> None:
    """The state's plan, shared arrays and core have rank 2, so export and predict need not know of the other."""
    plan = town.plan()
    site = small(plan)
    reply = site.handle(order(plan, 1, first(town, plan)))
    site.handle(order(plan, 2, randomized(reply.shared), phase="finalize", evaluate=True))
    saved = read_saved_model(site.store.path(2))
    assert saved.plan.adapter.rank == 2
    assert {array.shape for key, array in saved.personal.items() if "core" in key} == {(2, 2)}
    assert {2 in array.shape for key, array in saved.shared.items() if "lora" in key} == {True}
    again = Trainer(
        attach_adapters(load_base_model(plan.model, generates=False), saved.plan), site.task.rows, site.store
    )
    again.load(saved.shared, state(site, 2).tensors)
    texts = [{"text": row["text"]} for row in site.task.rows.test]
    measured = [p["label"] for p in again.task.predict(texts)]
    accuracy = np.mean([label == row["label"] for label, row in zip(measured, site.task.rows.test, strict=True)])
    stored = site.store.reply(2, order(plan, 2, randomized(reply.shared), phase="finalize", evaluate=True).key)
    assert stored is not None
    assert stored.metrics["personal.accuracy"] == pytest.approx(float(accuracy))


def test_a_changed_rank_is_refused(town: Town, small: Callable[[Plan], Trainer]) -> None:
    plan = town.plan()
    site = small(plan)
    reply = site.handle(order(plan, 1, first(town, plan)))
    with pytest.raises(RefusedError, match="The adapter has rank 4 here, but the site's state of round 1 has rank 2"):
        town.site(plan).handle(order(plan, 2, reply.shared))


def test_the_same_request_gives_the_same_bits(town: Town, small: Callable[[Plan], Trainer], tmp_path: Path) -> None:
    plan = town.plan()
    one = small(plan)
    request = TrainRequest(plan.name, 1, "train", 0, to_json(plan), randomized(first(town, plan)), evaluate=True)
    reply, again = one.handle(request), one.handle(request, again=True)
    assert same(reply.shared, again.shared)
