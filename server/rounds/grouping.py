"""Groups of sites whose first updates have similar directions; each group then trains its own shared adapter.

All sites train once from the same S_0, with a fitted head, and the cosines between their updates are compared. A cosine
also depends on how noisy the two updates are, so an additive model of the sites, c_ij ≈ a + m_i + m_j, is taken out
first. The best division of the rest into two groups is kept if few random permutations of it can be divided as well;
then each group is divided further in the same way. Clustering by the cosine of updates is that of Sattler et al. 2020
(clustered federated learning); the additive model and the permutation test are our own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PERMUTATIONS = 1999
SIGNIFICANCE = 0.005  # share of permutations that may be divided as well; the six airlines of the demo stay above .02
MIN_SITES = 6  # of a pool that is divided: with fewer, too few permutations differ
TINY = 1e-9  # a residual below it is rounding
MIN_GROUP = 2  # sites; the additive model explains any single site


@dataclass(frozen=True)
class Division:
    """A tested division of ``sites`` into two groups. ``p_value`` is the share of permutations divided as well."""

    sites: tuple[str, ...]
    groups: tuple[tuple[str, ...], tuple[str, ...]]
    p_value: float


@dataclass(frozen=True)
class Grouping:
    """The groups, the largest first, and the divisions that were tested, whether or not they were kept."""

    groups: tuple[tuple[str, ...], ...]
    divisions: tuple[Division, ...] = ()

    def fields(self, sites: Sequence[str], cosines: np.ndarray) -> dict[str, Any]:
        """Return the fields of the event ``grouped``."""
        tests = [{"groups": [list(group) for group in d.groups], "p_value": d.p_value} for d in self.divisions]
        rows = [dict(zip(sites, np.round(row, 3).tolist(), strict=True)) for row in cosines]
        return {
            "groups": [list(group) for group in self.groups],
            "tests": tests,
            "cosines": dict(zip(sites, rows, strict=True)),
        }


def update_cosines(updates: Sequence[Mapping[str, np.ndarray]], start: Mapping[str, np.ndarray]) -> np.ndarray:
    """The cosines (K, K) between the updates of K sites that trained from ``start``; 0 for a site that did not move.

    Of A and B only B counts where both are shared: B begins at zero, so only its first update has a direction that does
    not depend on the random A. Arrays are read one name at a time.
    """
    names = [key for key in start if ".lora_B." in key] or list(start)
    products = np.zeros((len(updates), len(updates)))
    for name in names:
        changes = np.stack([(u[name] - start[name]).astype(np.float64).ravel() for u in updates])
        products += changes @ changes.T
    norms = np.sqrt(np.diag(products))
    norms[norms == 0] = np.inf
    return products / np.outer(norms, norms)


def find_groups(sites: Sequence[str], cosines: np.ndarray, seed: int) -> Grouping:
    """Divide the sites as long as the permutation test supports it. ``sites`` are in roster order."""
    divisions: list[Division] = []

    def divided(members: list[int]) -> list[list[int]]:
        if len(members) < MIN_SITES:
            return [members]
        signs, p_value = best_division(cosines[np.ix_(members, members)], np.random.default_rng(seed))
        halves = [[m for m, sign in zip(members, signs, strict=True) if sign == side] for side in (signs[0], -signs[0])]
        names = [tuple(sites[m] for m in half) for half in halves]
        divisions.append(Division(tuple(sites[m] for m in members), (names[0], names[1]), p_value))
        if p_value > SIGNIFICANCE or min(map(len, halves)) < MIN_GROUP:
            return [members]
        return [group for half in halves for group in divided(half)]

    groups = sorted(divided(list(range(len(sites)))), key=lambda group: (-len(group), group[0]))
    return Grouping(tuple(tuple(sites[m] for m in group) for group in groups), tuple(divisions))


def best_division(cosines: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, float]:
    """The division as signs (K,), and the share of permutations of the residuals that can be divided as well."""
    residuals = _residuals(cosines)
    signs, score = _divide(residuals)
    pairs = np.triu_indices(len(cosines), 1)
    as_good = 0
    for _ in range(PERMUTATIONS):
        shuffled = np.zeros_like(residuals)
        shuffled[pairs] = generator.permutation(residuals[pairs])
        as_good += _divide(_residuals(shuffled + shuffled.T))[1] >= score
    return signs, (as_good + 1) / (PERMUTATIONS + 1)


def _residuals(cosines: np.ndarray) -> np.ndarray:
    """The off-diagonal entries without their least-squares fit by a + m_i + m_j; the diagonal is 0."""
    count = len(cosines)
    others = cosines - np.diag(np.diag(cosines))
    rows = others.sum(axis=1)
    mean = rows.sum() / (count * (count - 1))
    effects = (rows - (count - 1) * mean) / (count - 2)
    residuals = others - mean - effects[:, None] - effects[None, :]
    np.fill_diagonal(residuals, 0.0)
    return np.where(np.abs(residuals) < TINY, 0.0, residuals)


def _divide(residuals: np.ndarray) -> tuple[np.ndarray, float]:
    """Signs s that maximize sᵀ R s, and that maximum: the leading eigenvector's signs, improved one site at a time."""
    signs = np.where(np.linalg.eigh(residuals)[1][:, -1] >= 0, 1.0, -1.0)
    while True:
        gains = -4 * signs * (residuals @ signs)
        site = int(gains.argmax())
        if gains[site] <= 1e-12:
            return signs, float(signs @ residuals @ signs)
        signs[site] = -signs[site]
