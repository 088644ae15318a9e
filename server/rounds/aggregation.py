"""Aggregation as pure functions on named fp32 arrays. A new rule is one function and one row of ``RULES``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from ...common.config.schema import ServerSettings

Arrays = dict[str, np.ndarray]
SMALL = 10**9  # multiplications; in a smaller product BLAS threads cost more than they save


@dataclass(frozen=True)
class WeightedUpdate:
    """One admitted update: what it weighs, and its arrays."""

    weight: float
    arrays: Mapping[str, np.ndarray]


WEIGHTS: dict[str, Callable[[int, int], float]] = {
    "tokens": lambda terms, examples: float(terms),
    "examples": lambda terms, examples: float(examples),
    "uniform": lambda terms, examples: 1.0,
}


def weighted_mean(updates: Iterable[WeightedUpdate]) -> Arrays:
    """Σ p_k S_k with p_k = weight_k / Σ weight, folded in the order given, one update in memory at a time.

    Sums are in double precision; a fixed order makes them repeat to the bit.
    """
    total, sums, dtypes = 0.0, {}, {}
    for update in updates:
        total += update.weight
        for key, array in update.arrays.items():
            term = update.weight * array.astype(np.float64)
            sums[key] = sums[key] + term if key in sums else term
            dtypes[key] = array.dtype
    return {key: (value / total).astype(dtypes[key]) for key, value in sums.items()}


@dataclass(frozen=True)
class Rule:
    """A server optimiser: (previous, mean, memory, settings with lr, round) → (next, memory)."""

    step: Callable[[Arrays, Arrays, Arrays, ServerSettings, float, int], tuple[Arrays, Arrays]]
    lr: float  # used where the recipe names none; Flower's defaults


def apply_rule(
    previous: Arrays, mean: Arrays, memory: Arrays, settings: ServerSettings, round_number: int
) -> tuple[Arrays, Arrays]:
    """S_t and the optimiser's memory from S_{t-1} and the weighted mean of what the sites made of it."""
    rule = RULES[settings.optimizer]
    return rule.step(previous, mean, memory, settings, settings.lr or rule.lr, round_number)


def _mean(
    previous: Arrays, mean: Arrays, memory: Arrays, s: ServerSettings, lr: float, t: int
) -> tuple[Arrays, Arrays]:
    """FedAvg (McMahan et al. 2017); with lr ≠ 1 a step of that length towards the mean."""
    if lr == 1.0:
        return mean, {}
    return {k: x + np.float32(lr) * (mean[k] - x) for k, x in previous.items()}, {}


def _momentum(
    previous: Arrays, mean: Arrays, memory: Arrays, s: ServerSettings, lr: float, t: int
) -> tuple[Arrays, Arrays]:
    """FedAvgM (Hsu et al. 2019): v ← β v + (S_{t-1} − mean); S_t = S_{t-1} − lr · v."""
    beta = np.float32(s.momentum)
    v = {k: (beta * memory[f"v/{k}"] if memory else 0) + (x - mean[k]) for k, x in previous.items()}
    return {k: x - np.float32(lr) * v[k] for k, x in previous.items()}, {f"v/{k}": a for k, a in v.items()}


def _first_moment(previous: Arrays, mean: Arrays, memory: Arrays, s: ServerSettings) -> tuple[Arrays, Arrays, Arrays]:
    delta = {k: mean[k] - x for k, x in previous.items()}
    b1 = np.float32(s.beta_1)
    m = {k: b1 * memory.get(f"m/{k}", np.zeros_like(d)) + (1 - b1) * d for k, d in delta.items()}
    return delta, m, {k: memory.get(f"v/{k}", np.zeros_like(d)) for k, d in delta.items()}


def _adam(
    previous: Arrays, mean: Arrays, memory: Arrays, s: ServerSettings, lr: float, t: int
) -> tuple[Arrays, Arrays]:
    """FedAdam (Reddi et al. 2021) with Flower's bias-corrected rate."""
    delta, m, v = _first_moment(previous, mean, memory, s)
    b2 = np.float32(s.beta_2)
    v = {k: b2 * v[k] + (1 - b2) * d**2 for k, d in delta.items()}
    rate = np.float32(lr * np.sqrt(1 - s.beta_2 ** (t + 1.0)) / (1 - s.beta_1 ** (t + 1.0)))
    return _adaptive_step(previous, m, v, rate, s)


def _yogi(
    previous: Arrays, mean: Arrays, memory: Arrays, s: ServerSettings, lr: float, t: int
) -> tuple[Arrays, Arrays]:
    """FedYogi (Reddi et al. 2021)."""
    delta, m, v = _first_moment(previous, mean, memory, s)
    b2 = np.float32(s.beta_2)
    v = {k: v[k] - (1 - b2) * d**2 * np.sign(v[k] - d**2) for k, d in delta.items()}
    return _adaptive_step(previous, m, v, np.float32(lr), s)


def _adaptive_step(
    previous: Arrays, m: Arrays, v: Arrays, rate: np.floating, s: ServerSettings
) -> tuple[Arrays, Arrays]:
    new = {k: x + rate * m[k] / (np.sqrt(v[k]) + np.float32(s.tau)) for k, x in previous.items()}
    return new, {f"m/{k}": a for k, a in m.items()} | {f"v/{k}": a for k, a in v.items()}


RULES: dict[str, Rule] = {
    "mean": Rule(_mean, 1.0),
    "momentum": Rule(_momentum, 1.0),
    "adam": Rule(_adam, 0.1),
    "yogi": Rule(_yogi, 0.01),
}


def product_residual(updates: list[WeightedUpdate], mean: Mapping[str, np.ndarray]) -> float:
    """How far the mean of the factors is from the mean of the products.

    √(Σ_layers ‖Σ p_k B_k A_k − B̄ Ā‖²_F ÷ Σ_layers ‖Σ p_k B_k A_k‖²_F): 0 when averaging A and B apart loses nothing.
    Computed through Gram matrices of size (K·r)² where these take fewer steps than the products.
    """
    total = sum(update.weight for update in updates)
    off, whole = 0.0, 0.0
    for a_key, b_key in _pairs(mean):
        b = [update.weight / total * _scaled(update.arrays, b_key) for update in updates]
        a = [update.arrays[a_key].astype(np.float64) for update in updates]
        products = Factors(np.hstack(b), np.vstack(a))
        squares = _dense_squares if products.product_is_cheaper else _gram_squares
        of_products, of_difference = squares(products, Factors(_scaled(mean, b_key), mean[a_key].astype(np.float64)))
        whole += of_products
        off += of_difference
    return float(np.sqrt(max(off, 0.0) / whole)) if whole else 0.0


class Factors(NamedTuple):
    """A product of two thin matrices: ``left`` (d_out, n) and ``right`` (n, d_in)."""

    left: np.ndarray
    right: np.ndarray

    @property
    def product_is_cheaper(self) -> bool:
        """Whether n is so large that the product itself takes fewer steps than two Gram matrices of n²."""
        d_out, n, d_in = *self.left.shape, self.right.shape[1]
        return n * (d_out + d_in) > 2 * d_out * d_in


def _dense_squares(products: Factors, mean: Factors) -> tuple[float, float]:
    """‖P‖²_F and ‖P − M‖²_F."""
    with _threads(products):
        whole = products.left @ products.right
        off = whole - mean.left @ mean.right
        return float(np.vdot(whole, whole)), float(np.vdot(off, off))


def _gram_squares(products: Factors, mean: Factors) -> tuple[float, float]:
    """The same as sums of ⟨l_i r_i, l_j r_j⟩ over the rank-one terms of P, and of P − M."""
    left, right = np.hstack([products.left, -mean.left]), np.vstack([products.right, mean.right])
    with _threads(products):
        terms = (left.T @ left) * (right @ right.T)
    rank = len(mean.right)
    return float(np.sum(terms[:-rank, :-rank])), float(np.sum(terms))


def _pairs(arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, str]]:
    for a_key in sorted(key for key in arrays if ".lora_A." in key):
        yield a_key, a_key.replace(".lora_A.", ".lora_B.")


def _scaled(arrays: Mapping[str, np.ndarray], b_key: str) -> np.ndarray:
    """A factor B in double precision, with MultiLoRA's scales (n, d_out) in it where there are some."""
    b, scale = arrays[b_key].astype(np.float64), arrays.get(b_key.replace(".lora_B.weight", ".lora_scale"))
    return b if scale is None else (b.reshape(len(b), len(scale), -1) * scale.T[:, :, None]).reshape(b.shape)


def _threads(factors: Factors) -> AbstractContextManager[object]:
    """Small products stay on one thread: on a busy machine several wait for each other."""
    threads = 1 if factors.left.shape[1] * max(factors.left.size, factors.right.size) < SMALL else None
    return _blas().limit(limits=threads, user_api="blas")


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()
