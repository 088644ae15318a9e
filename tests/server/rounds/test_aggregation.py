"""Aggregation against hand arithmetic, Flower's own strategies and the dense products."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvgM, FedYogi

from colora.common.config.schema import ServerSettings
from colora.common.products import Factors, dense_squares, gram_squares
from colora.server.rounds.aggregation import (
    AGGREGATORS,
    BLOCK,
    SERVER_OPTIMIZERS,
    RoundState,
    WeightedUpdate,
    aggregate,
    apply_optimizer,
    product_residual,
    trimmed_per_side,
    weighted_mean,
)
from colora.server.rounds.weighting import WEIGHTS, Contribution
from colora.simulation.local_grid import LocalGrid

Arrays = dict[str, np.ndarray]
SHAPES = {"q.lora_A.weight": (3, 7), "q.lora_B.weight": (5, 3), "v.lora_A.weight": (3, 4), "v.lora_B.weight": (6, 3)}


def arrays(seed: int, size: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {key: rng.normal(0, size, shape).astype(np.float32) for key, shape in SHAPES.items()}


def updates(seed: int, around: Arrays, weights: tuple[int, ...] = (3, 5, 2)) -> list[WeightedUpdate]:
    """Updates of sites with these weights: ``around`` with noise."""
    noise = [arrays(100 * seed + k, 0.1) for k in range(len(weights))]
    return [WeightedUpdate(w, {k: around[k] + n[k] for k in SHAPES}) for w, n in zip(weights, noise, strict=True)]


# --- the mean -------------------------------------------------------------------------------------------------------


def test_the_weighted_mean_is_the_one_by_hand() -> None:
    mean = weighted_mean(
        [
            WeightedUpdate(1.0, {"x": np.array([[0.0, 4.0]], np.float32), "y": np.array([8.0], np.float32)}),
            WeightedUpdate(3.0, {"x": np.array([[4.0, 0.0]], np.float32), "y": np.array([-8.0], np.float32)}),
        ]
    )
    assert mean["x"].tolist() == [[3.0, 1.0]]  # (1·0 + 3·4) / 4, (1·4 + 3·0) / 4
    assert mean["y"].tolist() == [-4.0]
    assert mean["x"].dtype == np.float32


def test_only_the_proportions_of_the_weights_count() -> None:
    start = arrays(0)
    small, large = (weighted_mean(updates(1, start, w)) for w in ((3, 5, 2), (3000, 5000, 2000)))
    for key in SHAPES:
        np.testing.assert_allclose(small[key], large[key], rtol=0, atol=1e-7)


def test_blocks_do_not_change_a_bit_of_the_mean() -> None:
    """The oracle adds whole arrays. The arrays have more numbers than a block, and not a multiple of it."""
    rng, shape = np.random.default_rng(0), (3, BLOCK - 5)
    values = [rng.standard_normal(shape, np.float32) for _ in range(3)]
    weights = (0.7, 1.9, 12.3)
    mean = weighted_mean(WeightedUpdate(w, {"x": v}) for w, v in zip(weights, values, strict=True))
    whole = weights[0] * values[0].astype(np.float64)
    for weight, value in list(zip(weights, values, strict=True))[1:]:
        whole = whole + weight * value.astype(np.float64)
    assert mean["x"].tobytes() == (whole / sum(weights)).astype(np.float32).tobytes()


@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        np.array(2.0, np.float32),
        np.array([], np.float32),
        np.array([-0.0, 1.0], np.float16),
    ],
    ids=["in Fortran's order", "without dimensions", "empty", "half precision"],
)
def test_the_mean_takes_arrays_of_any_layout_and_leaves_them_as_they_are(array: np.ndarray) -> None:
    before = array.tobytes()
    mean = weighted_mean(WeightedUpdate(weight, {"x": array}) for weight in (1.0, 3.0))["x"]
    assert (mean.shape, mean.dtype, mean.tobytes()) == (array.shape, array.dtype, before)
    assert array.tobytes() == before


def test_arrays_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1,\) among arrays of shape \(4,\)"):
        weighted_mean(WeightedUpdate(1.0, {"x": np.ones(n, np.float32)}) for n in (4, 1))


def test_the_mean_of_equal_updates_is_that_update_to_the_bit() -> None:
    one = arrays(0)
    mean = weighted_mean([WeightedUpdate(w, one) for w in (0.1, 0.7, 123.0)])
    assert all(np.array_equal(mean[key], one[key]) for key in SHAPES)


def test_a_fixed_order_repeats_the_sum_to_the_bit_and_sums_are_double() -> None:
    """In single precision 1e8 + 1 − 1e8 is 0; in double precision the 1 remains."""
    many = updates(1, arrays(0), tuple(range(1, 30)))
    first, second = weighted_mean(many), weighted_mean(iter(many))
    assert all(first[key].tobytes() == second[key].tobytes() for key in SHAPES)
    big = [WeightedUpdate(1.0, {"x": np.array([v], np.float32)}) for v in (1e8, 1.0, -1e8)]
    assert weighted_mean(big)["x"].item() == np.float32(1 / 3)


def test_the_mean_holds_one_update_at_a_time() -> None:
    """It consumes a generator: memory does not grow with the number of sites."""
    alive: list[int] = []

    class Fleeting(dict):
        def __del__(self) -> None:
            alive.remove(self["k"].item())

    def stream() -> Iterator[WeightedUpdate]:
        for k in range(20):
            alive.append(k)
            yield WeightedUpdate(1.0, Fleeting(k=np.array([k])))
            assert len(alive) <= 2

    assert weighted_mean(stream())["k"].tolist() == [9]  # 9.5, in the type that came


def test_weights_are_what_they_say() -> None:
    weights = {name: weigh({"ada": Contribution(70, 4, 0.5)}, 0.0)["ada"] for name, weigh in WEIGHTS.items()}
    assert weights == {"tokens": 70.0, "examples": 4.0, "uniform": 1.0, "benefit": 1.0}


# --- aggregators -----------------------------------------------------------------------------------------------------


def combine(name: str, given: Iterable[WeightedUpdate], **settings: Any) -> Arrays:
    """The shared arrays that an aggregator makes of updates of round 1."""
    shared = aggregate(given, RoundState(1, arrays(0), ServerSettings(aggregator=name, **settings))).shared  # type: ignore[arg-type]
    return shared


def test_the_default_aggregator_is_the_weighted_mean_to_the_bit() -> None:
    given = updates(1, arrays(0))
    found, mean = combine(ServerSettings().aggregator, iter(given)), weighted_mean(given)
    assert all(found[key].tobytes() == mean[key].tobytes() for key in SHAPES)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_identical_updates_give_that_update_to_the_bit(name: str) -> None:
    for count in (1, 2, 3, 4, 12):
        found = combine(name, [WeightedUpdate(k + 0.1, arrays(0)) for k in range(count)])
        assert all(np.array_equal(found[key], value) for key, value in arrays(0).items())
        assert all(value.dtype == np.float32 for value in found.values())


@pytest.mark.parametrize("name", AGGREGATORS)
def test_an_aggregator_of_a_method_without_shared_groups_returns_nothing(name: str) -> None:
    assert combine(name, [WeightedUpdate(1.0, {}), WeightedUpdate(2.0, {})]) == {}


@pytest.mark.parametrize("name", AGGREGATORS)
def test_only_a_rule_that_needs_all_updates_holds_more_than_one(name: str) -> None:
    """The iterator counts how many updates exist at the moment when it makes the next one."""
    alive: set[int] = set()
    most = 0

    class Counted(dict):
        def __init__(self, k: int) -> None:
            super().__init__(x=np.array([k], np.float32))
            self.k = k
            alive.add(k)

        def __del__(self) -> None:
            alive.discard(self.k)

    def stream() -> Iterator[WeightedUpdate]:
        nonlocal most
        for k in range(9):
            most = max(most, len(alive))
            yield WeightedUpdate(1.0, Counted(k))

    assert combine(name, stream())["x"].tolist() == [3.5 if name == "krum" else 4.0]  # it leaves one out
    assert (most > 1) is AGGREGATORS[name].needs_all


def one_value(*values: float) -> list[WeightedUpdate]:
    """Updates of one number each, with different weights."""
    return [WeightedUpdate(1.0 + k, {"x": np.array([v], np.float32)}) for k, v in enumerate(values)]


ROBUST = [name for name, row in AGGREGATORS.items() if not row.averages]


@pytest.mark.parametrize("name", ROBUST)
def test_a_robust_rule_does_not_depend_on_the_order_or_the_weights(name: str) -> None:
    given = updates(1, arrays(0), (1, 2, 3, 4, 5))
    equal = [WeightedUpdate(1.0, update.arrays) for update in reversed(given)]
    one, other = combine(name, given), combine(name, equal)
    assert all(one[key].tobytes() == other[key].tobytes() for key in SHAPES)


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("sites", [3, 4, 7])
@pytest.mark.parametrize("wild", [-1e30, -9.0, 1e30])
def test_one_wild_site_cannot_leave_the_range_of_the_others(name: str, sites: int, wild: float) -> None:
    """The mean of the same updates leaves it everywhere. Krum keeps all updates where there are fewer than five."""
    if name == "krum" and sites < 5:
        pytest.skip("all updates are kept")
    honest = updates(1, arrays(0), (1,) * (sites - 1))
    wild_update = WeightedUpdate(1e6, {key: np.full(shape, wild, np.float32) for key, shape in SHAPES.items()})
    given = [honest[0], wild_update, *honest[1:]]
    for key, value in combine(name, given).items():
        stacked = np.stack([update.arrays[key] for update in honest])
        assert (stacked.min(0) <= value).all()
        assert (value <= stacked.max(0)).all()
        mean = weighted_mean(given)[key]
        assert ((mean < stacked.min(0)) | (mean > stacked.max(0))).all()


def test_the_median_by_hand() -> None:
    assert combine("median", one_value(5, -100, 2))["x"].tolist() == [2.0]
    assert combine("median", one_value(5, -100, 2, 4))["x"].tolist() == [3.0]  # (2 + 4) / 2
    given = [WeightedUpdate(1.0, {"x": np.array(v, np.float32)}) for v in ([1, 9], [2, 8], [3, 70])]
    assert combine("median", given)["x"].tolist() == [2.0, 9.0]  # each coordinate by itself


def test_the_trimmed_mean_by_hand() -> None:
    assert combine("trimmed_mean", one_value(6, -100, 2))["x"].tolist() == [2.0]  # one on each side
    assert combine("trimmed_mean", one_value(9, 2, 4, 3, -5))["x"].tolist() == [3.0]  # (2 + 3 + 4) / 3
    assert combine("trimmed_mean", one_value(9, 2, 4, 3, -5), trim=0.4)["x"].tolist() == [3.0]  # the median
    assert combine("trimmed_mean", one_value(1, 4))["x"].tolist() == [2.5]  # too few to trim


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(1, 0.1, 0), (2, 0.4, 0), (3, 0.0, 1), (10, 0.1, 1), (30, 0.1, 3), (10, 0.3, 3), (4, 0.49, 1), (100, 0.49999, 49)],
)
def test_a_trimmed_mean_trims_the_fraction_but_never_everything(count: int, fraction: float, expected: int) -> None:
    assert trimmed_per_side(count, fraction) == expected


# --- server optimizers against Flower's -----------------------------------------------------------------------------


def flower(strategy: Any, start: Arrays, rounds: list[list[WeightedUpdate]]) -> list[Arrays]:
    """The results of one of Flower's strategies on the same replies, round after round."""
    grid = LocalGrid(ClientApp(), 3)
    now, results = ArrayRecord({k: Array(v) for k, v in start.items()}), []
    for t, replies in enumerate(rounds, 1):
        strategy.configure_train(t, now, ConfigRecord(), grid)
        messages = []
        for update in replies:
            record = ArrayRecord({k: Array(np.asarray(v)) for k, v in update.arrays.items()})
            content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": int(update.weight)})})
            question = Message(RecordDict(), 1, MessageType.TRAIN)
            grid.push_messages([question])
            messages.append(Message(content, reply_to=question))
        now, _ = strategy.aggregate_train(t, messages)
        results.append({k: array.numpy() for k, array in now.items()})
    return results


MINE_AND_FLOWERS: dict[str, tuple[dict[str, float], Callable[..., Any], dict[str, float]]] = {
    "momentum": ({"momentum": 0.9}, FedAvgM, {"server_learning_rate": 1.0, "server_momentum": 0.9}),
    "momentum-slow": ({"momentum": 0.5, "lr": 0.3}, FedAvgM, {"server_learning_rate": 0.3, "server_momentum": 0.5}),
    "mean-slow": ({"lr": 0.25}, FedAvgM, {"server_learning_rate": 0.25, "server_momentum": 0.0}),
    "adam": ({}, FedAdam, {}),
    "adam-own": (
        {"lr": 0.03, "beta_1": 0.8, "beta_2": 0.95, "tau": 1e-2},
        FedAdam,
        {"eta": 0.03, "beta_1": 0.8, "beta_2": 0.95, "tau": 1e-2},
    ),
    "yogi": ({}, FedYogi, {}),
    "yogi-own": (
        {"lr": 0.03, "beta_1": 0.8, "beta_2": 0.95, "tau": 1e-2},
        FedYogi,
        {"eta": 0.03, "beta_1": 0.8, "beta_2": 0.95, "tau": 1e-2},
    ),
}


@pytest.mark.parametrize("name", MINE_AND_FLOWERS)
def test_every_optimizer_equals_flowers_strategy_over_three_rounds(name: str) -> None:
    """Defaults included: our table's rate is Flower's."""
    own, strategy, theirs = MINE_AND_FLOWERS[name]
    settings = ServerSettings(optimizer=name.split("-")[0], **own)  # type: ignore[arg-type]
    start = arrays(0)
    rounds = [updates(t, start) for t in (1, 2, 3)]
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    expected = flower(strategy(min_train_nodes=3, min_available_nodes=3, **theirs), start, rounds)
    now, own = start, {}
    for t, replies in enumerate(rounds, 1):
        before = now
        now, own = apply_optimizer(weighted_mean(replies), RoundState(t, now, settings, own))
        for key in SHAPES:
            np.testing.assert_allclose(now[key], expected[t - 1][key], rtol=0, atol=2e-6)
            assert now[key].dtype == np.float32
            assert np.abs(now[key] - before[key]).max() > 1e-4


def test_the_plain_mean_is_the_mean_and_has_no_state() -> None:
    start = arrays(0)
    mean = weighted_mean(updates(1, start))
    now, own = apply_optimizer(mean, RoundState(1, start, ServerSettings()))
    assert all(now[key].tobytes() == mean[key].tobytes() for key in SHAPES)
    assert own == {}


@pytest.mark.parametrize("optimizer", SERVER_OPTIMIZERS)
def test_an_unchanged_aggregate_changes_nothing(optimizer: str) -> None:
    """Sites that return what they received leave every optimizer at its place, and nothing is divided by zero."""
    start = arrays(0)
    settings = ServerSettings(optimizer=optimizer)  # type: ignore[arg-type]
    now, own = apply_optimizer(start, RoundState(1, start, settings))
    now, _ = apply_optimizer(start, RoundState(2, now, settings, own))
    assert all(np.array_equal(now[key], start[key]) for key in SHAPES)


@pytest.mark.parametrize("optimizer", SERVER_OPTIMIZERS)
def test_optimizers_leave_their_inputs_alone(optimizer: str) -> None:
    start, settings = arrays(0), ServerSettings(optimizer=optimizer)  # type: ignore[arg-type]
    mean = weighted_mean(updates(1, start))
    _, own = apply_optimizer(mean, RoundState(1, start, settings))
    copies = {key: value.copy() for key, value in own.items()}
    apply_optimizer(mean, RoundState(2, start, settings, own))
    assert all(np.array_equal(start[key], value) for key, value in arrays(0).items())
    assert all(np.array_equal(own[key], value) for key, value in copies.items())


# --- what averaging A and B separately loses ------------------------------------------------------------------------


def dense_residual(given: list[WeightedUpdate], mean: Arrays) -> float:
    """√(Σ ‖Σ p B A − B̄ Ā‖² / Σ ‖Σ p B A‖²) with every product written out."""
    total, off, whole = sum(u.weight for u in given), 0.0, 0.0
    for layer in ("q", "v"):
        a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        products = [u.weight / total * u.arrays[b].astype(np.float64) @ u.arrays[a].astype(np.float64) for u in given]
        product = np.sum(products, axis=0)
        whole += np.sum(product**2)
        off += np.sum((product - mean[b].astype(np.float64) @ mean[a].astype(np.float64)) ** 2)
    return float(np.sqrt(off / whole))


@pytest.mark.parametrize("weights", [(1, 1), (3, 5, 2), (1, 100, 7, 9, 30)])
def test_the_product_residual_equals_the_dense_computation(weights: tuple[int, ...]) -> None:
    given = [WeightedUpdate(w, arrays(k)) for k, w in enumerate(weights)]
    mean = weighted_mean(given)
    found = product_residual(given, mean)
    assert found == pytest.approx(dense_residual(given, mean), rel=1e-6)
    assert found > 0.05  # mean(B)·mean(A) ≠ mean(BA)


def test_small_and_large_products_are_computed_in_the_cheaper_way_with_one_result() -> None:
    rng = np.random.default_rng(0)
    for n, wide in ((4, False), (40, True)):
        factors = Factors(rng.normal(size=(30, n)), rng.normal(size=(n, 20)))
        mean = Factors(rng.normal(size=(30, 2)), rng.normal(size=(2, 20)))
        assert factors.product_is_cheaper is wide
        assert gram_squares(factors, mean) == pytest.approx(dense_squares(factors, mean))


def test_the_residual_of_opposite_sites_by_hand() -> None:
    """B = ±1, A = ±1: every product is 1 and every mean is 0, so everything is lost. With A fixed nothing is."""

    def site(a: float, b: float) -> WeightedUpdate:
        one = {"q.lora_A.weight": np.array([[a]], np.float32), "q.lora_B.weight": np.array([[b]], np.float32)}
        return WeightedUpdate(1.0, one)

    opposite, fixed = [site(1, 1), site(-1, -1)], [site(1, 1), site(1, -3)]
    assert product_residual(opposite, weighted_mean(opposite)) == pytest.approx(1.0)
    assert product_residual(fixed, weighted_mean(fixed)) == pytest.approx(0.0, abs=1e-7)


def test_the_residual_is_zero_for_one_site_and_before_anyone_moved() -> None:
    one = [WeightedUpdate(5.0, arrays(0))]
    assert product_residual(one, weighted_mean(one)) == pytest.approx(0.0, abs=1e-7)
    still = [WeightedUpdate(1.0, {k: v * ("_A" in k) for k, v in arrays(s).items()}) for s in (0, 1)]  # B = 0
    assert product_residual(still, weighted_mean(still)) == 0.0


# --- the mean of the products -----------------------------------------------------------------------------------------


def best_approximations(given: list[WeightedUpdate], rank: int) -> dict[str, np.ndarray]:
    """The best approximation of Σ p B A by a matrix of this rank, of every layer, by the SVD of the dense matrix."""
    total, found = sum(update.weight for update in given), {}
    for layer in ("q", "v"):
        products = [u.weight * u.arrays[f"{layer}.lora_B.weight"] @ u.arrays[f"{layer}.lora_A.weight"] for u in given]
        left, values, right = np.linalg.svd(np.sum(products, axis=0, dtype=np.float64) / total)
        found[layer] = (left[:, :rank] * values[:rank]) @ right[:rank]
    return found


def product_mean(given: list[WeightedUpdate]) -> Arrays:
    return aggregate(iter(given), RoundState(1, {}, ServerSettings(aggregator="product"))).shared


@pytest.mark.parametrize("weights", [(1,), (1, 1), (3, 5, 2), (1, 100, 7, 9, 30)])
def test_the_product_mean_is_the_best_approximation_of_its_rank(weights: tuple[int, ...]) -> None:
    given = [WeightedUpdate(w, arrays(k)) for k, w in enumerate(weights)]
    found, mean = product_mean(given), weighted_mean(given)
    rank = len(mean["q.lora_A.weight"])
    for layer, best in best_approximations(given, rank).items():
        np.testing.assert_allclose(found[f"{layer}.lora_B.weight"] @ found[f"{layer}.lora_A.weight"], best, atol=2e-6)
    assert product_residual(given, found) <= product_residual(given, mean) + 1e-7
    assert {key: array.dtype for key, array in found.items()} == {key: array.dtype for key, array in mean.items()}
    assert all(np.array_equal(product_mean(given)[key], array) for key, array in found.items())


def test_the_product_mean_of_equal_updates_is_the_update() -> None:
    """In its own basis, so that the cores of the sites keep their meaning."""
    found = product_mean([WeightedUpdate(w, arrays(0)) for w in (3, 1)])
    for key, array in arrays(0).items():
        np.testing.assert_allclose(found[key], array, atol=1e-5)


def test_the_product_mean_of_zero_products_keeps_a() -> None:
    """Before the first step B is zero. With A zero as well, nothing could be learned from there."""
    empty = {key: np.zeros_like(a) if "lora_B" in key else a for key, a in arrays(0).items()}
    found = product_mean([WeightedUpdate(1, empty), WeightedUpdate(1, empty)])
    for key, array in empty.items():
        np.testing.assert_allclose(found[key], array, atol=1e-6)


def test_the_product_mean_of_opposite_factors_keeps_what_the_mean_loses() -> None:
    """(B, A) and (−B, −A) are one product, and the means of their factors are zero."""
    one = arrays(0)
    given = [WeightedUpdate(1, one), WeightedUpdate(1, {key: -a if "lora" in key else a for key, a in one.items()})]
    assert product_residual(given, weighted_mean(given)) == pytest.approx(1)
    assert product_residual(given, product_mean(given)) < 1e-6


# --- multi-Krum -------------------------------------------------------------------------------------------------------


def krum(values: list[float], trim: float = 0.1) -> tuple[float, list[int]]:
    """The aggregate of updates that are one number each, and the positions of those left out."""
    given = [WeightedUpdate(9.0, {"x": np.full(1, value, np.float32)}) for value in values]
    made = aggregate(iter(given), RoundState(1, {}, ServerSettings(aggregator="krum", trim=trim)))
    return float(made.shared["x"][0]), made.left_out


def test_krum_by_hand() -> None:
    """Five updates, one is left out: each is judged by its two nearest. Weights count for nothing."""
    assert krum([1.0, 2.0, 3.0, 4.0, 1000.0]) == (2.5, [4])
    assert krum([-50.0, 2.0, 3.0, 4.0, 1.0]) == (2.5, [0])


@pytest.mark.parametrize(
    ("count", "trim", "left_out"), [(3, 0.4, 0), (4, 0.4, 0), (5, 0.1, 1), (7, 0.4, 2), (20, 0.1, 2)]
)
def test_krum_leaves_out_so_many(count: int, trim: float, left_out: int) -> None:
    values = [float(np.random.default_rng(0).normal(i)) for i in range(count)]
    assert len(krum(values, trim)[1]) == left_out


def test_krum_is_not_moved_by_two_of_seven_that_agree() -> None:
    honest = [1.0, 1.1, 0.9, 1.05, 0.95]
    value, left_out = krum([*honest, -30.0, -30.0], trim=0.3)
    assert left_out == [5, 6]
    assert value == pytest.approx(1.0)
