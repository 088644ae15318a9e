"""Aggregation as pure functions on named fp32 arrays.

A round takes two steps: an aggregator (``AGGREGATORS``) makes one set of arrays from the admitted updates, and a server
optimizer (``SERVER_OPTIMIZERS``) makes S_t from S_{t-1} and these arrays. A new rule is one function and one row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ...common.config.schema import ServerSettings
from ...common.products import Factors, dense_squares, factor_names, gram_squares, truncate

Arrays = dict[str, np.ndarray]
BLOCK = 1 << 15  # numbers that a sum adds at a time


@dataclass(frozen=True)
class WeightedUpdate:
    """One admitted update: its weight, and the site's shared arrays after training."""

    weight: float
    arrays: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class RoundState:
    """What an aggregator or a server optimizer reads besides the updates.

    ``arrays`` are what the same aggregator or optimizer returned as its own in the round before. The checkpoint keeps
    them; they are empty in the first round.
    """

    round: int
    previous: Mapping[str, np.ndarray]  # S_{t-1}
    settings: ServerSettings
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


# --- aggregators ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aggregator:
    """An aggregation rule: ``(updates, state) -> (shared, arrays of its own)``.

    A rule streams unless ``needs_all`` is set: it receives an iterator and keeps one update in memory at a time. A rule
    with ``needs_all`` receives a list. Its arrays are read from disk one at a time, so a coordinate-wise rule holds one
    array of every site. ``choose`` returns the positions of the updates that the rule receives; without it, all are.
    """

    rule: Callable[[Iterable[WeightedUpdate], RoundState], tuple[Arrays, Arrays]]
    needs_all: bool = False
    choose: Callable[[list[WeightedUpdate], RoundState], list[int]] | None = None
    averages: bool = False  # returns A and B of a weighted mean, so the product residual has a meaning


class Aggregate(NamedTuple):
    """What an aggregator made: the shared arrays, arrays of its own, and the positions of updates left out."""

    shared: Arrays
    own: Arrays
    left_out: list[int]


def aggregate(updates: Iterable[WeightedUpdate], state: RoundState) -> Aggregate:
    """Apply the aggregator that the settings name."""
    aggregator = AGGREGATORS[state.settings.aggregator]
    if aggregator.choose is None:
        return Aggregate(*aggregator.rule(list(updates) if aggregator.needs_all else updates, state), [])
    given = list(updates)
    chosen = aggregator.choose(given, state)
    left_out = [i for i in range(len(given)) if i not in chosen]
    return Aggregate(*aggregator.rule([given[i] for i in chosen], state), left_out)


def weighted_mean(updates: Iterable[WeightedUpdate]) -> Arrays:
    """Σ p_k S_k with p_k = weight_k / Σ weight, in the given order with one update in memory at a time.

    Sums are in double precision. A fixed order of the updates gives bit-identical results.
    """
    total, sums, dtypes = 0.0, {}, {}
    for update in updates:
        total += update.weight
        for key, array in update.arrays.items():
            if key not in sums:
                sums[key], dtypes[key] = np.full(array.shape, -0.0), array.dtype  # -0.0 + x is x, also for -0.0
            _add(sums[key], update.weight, array)
    return {key: (value / total).astype(dtypes[key]) for key, value in sums.items()}


def _add(total: np.ndarray, weight: float, array: np.ndarray) -> None:
    """Add weight · array to ``total`` in place, in blocks that stay in the processor's cache.

    ``total`` has the shape of the array, double precision and C order.
    """
    if array.shape != total.shape:
        raise ValueError(f"an array of shape {array.shape} among arrays of shape {total.shape}")
    sums, values, block = total.reshape(-1), np.ascontiguousarray(array).reshape(-1), np.empty(BLOCK)
    for start in range(0, values.size, BLOCK):
        part = values[start : start + BLOCK]
        sums[start : start + BLOCK] += np.multiply(part, weight, out=block[: part.size], dtype=np.float64)


def _mean(updates: Iterable[WeightedUpdate], state: RoundState) -> tuple[Arrays, Arrays]:
    """The weighted mean of FedAvg (McMahan et al. 2017)."""
    return weighted_mean(updates), {}


def _median(updates: Iterable[WeightedUpdate], state: RoundState) -> tuple[Arrays, Arrays]:
    """The coordinate-wise median without weights (Yin et al. 2018): fewer than half of the sites cannot move it."""
    return _per_coordinate(list(updates), lambda values: np.median(values, axis=0)), {}


def _trimmed_mean(updates: Iterable[WeightedUpdate], state: RoundState) -> tuple[Arrays, Arrays]:
    """The coordinate-wise mean without weights, without the smallest and the largest values (Yin et al. 2018).

    A fraction ``server.trim`` of the K values is left out on each side, at least one where K ≥ 3.
    """
    given = list(updates)
    cut = trimmed_per_side(len(given), state.settings.trim)
    return _per_coordinate(given, lambda values: np.sort(values, axis=0)[cut : len(given) - cut].mean(axis=0)), {}


def _product(updates: Iterable[WeightedUpdate], state: RoundState) -> tuple[Arrays, Arrays]:
    """The best approximation of Σ p_k B_k A_k of the adapter's rank: FLoRA's mean (Wang et al. 2024), truncated.

    Other arrays are averaged.
    """
    given = list(updates)
    mean, total = weighted_mean(given), sum(update.weight for update in given)
    for a_key, b_key in factor_names(mean):
        b, a = truncate(_products(given, total, a_key, b_key), mean[a_key].astype(np.float64))
        mean[b_key], mean[a_key] = b.astype(mean[b_key].dtype), a.astype(mean[a_key].dtype)
    return mean, {}


def _unweighted_mean(updates: Iterable[WeightedUpdate], state: RoundState) -> tuple[Arrays, Arrays]:
    return weighted_mean(WeightedUpdate(1.0, update.arrays) for update in updates), {}


def _close_ones(updates: list[WeightedUpdate], state: RoundState) -> list[int]:
    """Multi-Krum (Blanchard et al. 2017): all but the f updates with the largest distances to their K − f − 2 nearest.

    f is a fraction ``server.trim`` of the K updates, at least one, and at most (K − 3) / 2, for which the paper's bound
    holds. So fewer than five updates are all kept.
    """
    count = len(updates)
    far = max(0, min(max(1, math.floor(state.settings.trim * count + 1e-9)), (count - 3) // 2))
    if not far:
        return list(range(count))
    squares = np.zeros((count, count))
    for key in updates[0].arrays:
        values = [update.arrays[key].astype(np.float64) for update in updates]
        for i, j in itertools.combinations(range(count), 2):
            squares[i, j] += np.sum((values[i] - values[j]) ** 2)
    nearest = np.sort(squares + squares.T, axis=1)[:, 1 : count - far - 1]  # without the distance to itself
    return sorted(np.argsort(nearest.sum(axis=1), kind="stable")[: count - far].tolist())


def trimmed_per_side(count: int, fraction: float) -> int:
    """How many of ``count`` values a trimmed mean leaves out on each side; at least one value remains."""
    return 0 if count < 3 else min(max(1, math.floor(fraction * count + 1e-9)), (count - 1) // 2)


def _per_coordinate(updates: list[WeightedUpdate], reduce: Callable[[np.ndarray], np.ndarray]) -> Arrays:
    """Reduce the double-precision values (sites, …) of each array, one array in memory at a time."""
    stacked = ((key, [update.arrays[key] for update in updates]) for key in updates[0].arrays)
    return {key: reduce(np.stack(each).astype(np.float64)).astype(each[0].dtype) for key, each in stacked}


AGGREGATORS: dict[str, Aggregator] = {
    "mean": Aggregator(_mean, averages=True),
    "product": Aggregator(_product, needs_all=True, averages=True),
    "median": Aggregator(_median, needs_all=True),
    "trimmed_mean": Aggregator(_trimmed_mean, needs_all=True),
    "krum": Aggregator(_unweighted_mean, needs_all=True, choose=_close_ones),
}


# --- server optimizers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ServerOptimizer:
    """A server optimizer: ``(aggregated, state, lr) -> (S_t, arrays of its own)``."""

    step: Callable[[Arrays, RoundState, float], tuple[Arrays, Arrays]]
    lr: float  # used where the recipe sets none; Flower's defaults


def apply_optimizer(aggregated: Arrays, state: RoundState) -> tuple[Arrays, Arrays]:
    """Apply the server optimizer that the settings name. Returns S_t and the optimizer's own arrays."""
    optimizer = SERVER_OPTIMIZERS[state.settings.optimizer]
    return optimizer.step(aggregated, state, state.settings.lr or optimizer.lr)


def _replace(aggregated: Arrays, state: RoundState, lr: float) -> tuple[Arrays, Arrays]:
    """S_t is the aggregate; with lr ≠ 1 it is a step of that length towards the aggregate."""
    if lr == 1.0:
        return aggregated, {}
    return {k: x + np.float32(lr) * (aggregated[k] - x) for k, x in state.previous.items()}, {}


def _momentum(aggregated: Arrays, state: RoundState, lr: float) -> tuple[Arrays, Arrays]:
    """FedAvgM (Hsu et al. 2019): v ← β v + (S_{t-1} − aggregate); S_t = S_{t-1} − lr · v."""
    beta, old, previous = np.float32(state.settings.momentum), state.arrays, state.previous
    v = {k: (beta * old[f"v/{k}"] if old else 0) + (x - aggregated[k]) for k, x in previous.items()}
    return {k: x - np.float32(lr) * v[k] for k, x in previous.items()}, {f"v/{k}": a for k, a in v.items()}


def _adam(aggregated: Arrays, state: RoundState, lr: float) -> tuple[Arrays, Arrays]:
    """FedAdam (Reddi et al. 2021) with Flower's bias-corrected rate."""
    s, t = state.settings, state.round
    delta, m, v = _first_moment(aggregated, state)
    b2 = np.float32(s.beta_2)
    v = {k: b2 * v[k] + (1 - b2) * d**2 for k, d in delta.items()}
    rate = np.float32(lr * np.sqrt(1 - s.beta_2 ** (t + 1.0)) / (1 - s.beta_1 ** (t + 1.0)))
    return _adaptive_step(state, m, v, rate)


def _yogi(aggregated: Arrays, state: RoundState, lr: float) -> tuple[Arrays, Arrays]:
    """FedYogi (Reddi et al. 2021)."""
    delta, m, v = _first_moment(aggregated, state)
    b2 = np.float32(state.settings.beta_2)
    v = {k: v[k] - (1 - b2) * d**2 * np.sign(v[k] - d**2) for k, d in delta.items()}
    return _adaptive_step(state, m, v, np.float32(lr))


def _first_moment(aggregated: Arrays, state: RoundState) -> tuple[Arrays, Arrays, Arrays]:
    """The change since S_{t-1}, its updated first moment, and the old second moment."""
    old, b1 = state.arrays, np.float32(state.settings.beta_1)
    delta = {k: aggregated[k] - x for k, x in state.previous.items()}
    m = {k: b1 * old.get(f"m/{k}", np.zeros_like(d)) + (1 - b1) * d for k, d in delta.items()}
    return delta, m, {k: old.get(f"v/{k}", np.zeros_like(d)) for k, d in delta.items()}


def _adaptive_step(state: RoundState, m: Arrays, v: Arrays, rate: np.floating) -> tuple[Arrays, Arrays]:
    tau = np.float32(state.settings.tau)
    new = {k: x + rate * m[k] / (np.sqrt(v[k]) + tau) for k, x in state.previous.items()}
    return new, {f"m/{k}": a for k, a in m.items()} | {f"v/{k}": a for k, a in v.items()}


SERVER_OPTIMIZERS: dict[str, ServerOptimizer] = {
    "mean": ServerOptimizer(_replace, 1.0),
    "momentum": ServerOptimizer(_momentum, 1.0),
    "adam": ServerOptimizer(_adam, 0.1),
    "yogi": ServerOptimizer(_yogi, 0.01),
}


# --- products -------------------------------------------------------------------------------------------------------


def product_residual(updates: list[WeightedUpdate], mean: Mapping[str, np.ndarray]) -> float:
    """The relative distance between the product of the aggregated factors and the mean of the products.

    √(Σ_layers ‖Σ p_k B_k A_k − B̄ Ā‖²_F ÷ Σ_layers ‖Σ p_k B_k A_k‖²_F). It is 0 where averaging A and B separately loses
    nothing. Gram matrices of size (K·r)² replace the products where they take fewer operations.
    """
    total = sum(update.weight for update in updates)
    difference, whole = 0.0, 0.0
    for a_key, b_key in factor_names(mean):
        products = _products(updates, total, a_key, b_key)
        squares = dense_squares if products.product_is_cheaper else gram_squares
        of_products, of_difference = squares(products, Factors(_scaled(mean, b_key), mean[a_key].astype(np.float64)))
        whole += of_products
        difference += of_difference
    return float(np.sqrt(max(difference, 0.0) / whole)) if whole else 0.0


def _products(updates: list[WeightedUpdate], total: float, a_key: str, b_key: str) -> Factors:
    """Σ p_k B_k A_k of one layer as two factors, the sites' factors side by side."""
    b = [update.weight / total * _scaled(update.arrays, b_key) for update in updates]
    return Factors(np.hstack(b), np.vstack([update.arrays[a_key].astype(np.float64) for update in updates]))


def _scaled(arrays: Mapping[str, np.ndarray], b_key: str) -> np.ndarray:
    """Factor B in double precision, multiplied by MultiLoRA's scales (n, d_out) where they exist."""
    b, scale = arrays[b_key].astype(np.float64), arrays.get(b_key.replace(".lora_B.weight", ".lora_scale"))
    return b if scale is None else (b.reshape(len(b), len(scale), -1) * scale.T[:, :, None]).reshape(b.shape)
