"""Weighted updates as integers modulo 2³², so that the sum of the sites' vectors is exact and cannot overflow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import RefusedError

LARGEST = 2**31 - 1  # of the sum's absolute values, so that a signed 32-bit number holds each element
MAX_SITES = 1000  # of a sum: each keeps more than 2²¹ levels, and a message to a trainer fits into 1 MiB
Shapes = Mapping[str, tuple[int, ...]]


class WeightedMean(NamedTuple):
    """The mean update (n,) in fp64, and the sum of the levels that the sites' weights have."""

    update: np.ndarray
    weight: int


@dataclass(frozen=True)
class FixedPoint:
    """The integers in which ``sites`` sites send their weighted updates.

    ``bound`` is the largest absolute value of an update's element; the largest norm is such a bound. A weight of
    ``max_weight`` has ``levels`` levels. A site with u levels sends round(x·u / bound) for each element x, and u itself
    as one more element. No absolute value exceeds u ≤ ``levels`` ≤ ``LARGEST`` / ``sites``, so no sum overflows.
    """

    bound: float
    max_weight: int
    sites: int

    @property
    def levels(self) -> int:
        """The number of levels of the largest weight."""
        return LARGEST // self.sites

    @property
    def step(self) -> float:
        """The distance of two neighbouring values of an update with the largest weight."""
        return self.bound / self.levels

    def level(self, weight: int) -> int:
        """The level of a weight, at least 1. A weight above ``max_weight`` counts as ``max_weight``.

        A refusal would tell the coordinator, who chooses ``max_weight``, whether the weight is above it. With a small
        one, all sites have the same weight. Raises RefusedError for a weight below 1.
        """
        if weight < 1:
            raise RefusedError("weight", "at least 1", weight)
        weight = min(weight, self.max_weight)
        return max(1, (2 * weight * self.levels + self.max_weight) // (2 * self.max_weight))

    def encode(self, update: np.ndarray, weight: int) -> np.ndarray:
        """Return a site's weighted update (n,) as uint32 (n + 1,); the last element is the level of its weight.

        Raises RefusedError for values that are not finite or beyond the bound.
        """
        level = self.level(weight)
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = np.rint(update.astype(np.float64) * (level / self.bound))
        largest = float(np.abs(scaled).max(initial=0.0))  # NaN stays NaN
        if not largest <= level:
            raise RefusedError("update", f"values of at most {self.bound:g} (train.max_update_norm)", largest)
        return np.append(scaled.astype(np.int32), np.int32(level)).view(np.uint32)

    def decode(self, total: np.ndarray, sites: int) -> WeightedMean:
        """Return the weighted mean of ``sites`` updates whose vectors have this sum (n + 1,).

        Raises RefusedError for a sum that so many sites cannot have, as when a site masked with a wrong key.
        """
        weight = int(total[-1])
        if not sites <= weight <= sites * self.levels:
            raise RefusedError("weight of the sum", f"{sites} to {sites * self.levels} levels", weight)
        update = total[:-1].view(np.int32) * (self.bound / weight)
        norm, slack = float(np.linalg.norm(update)), self.bound * sites / weight * len(update) ** 0.5
        if norm > self.bound + slack:  # the mean of updates within the bound, and their rounding
            raise RefusedError("norm of the sum", f"at most {self.bound:g}", f"{norm:.3g}")
        return WeightedMean(update, weight)


def flatten(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return all elements in fp64, array after array in name order."""
    return np.concatenate([np.asarray(arrays[key], np.float64).ravel() for key in sorted(arrays)] or [np.empty(0)])


def unflatten(values: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    """Return the arrays whose elements ``flatten`` put into one vector."""
    sizes = [int(np.prod(shapes[key], dtype=np.int64)) for key in sorted(shapes)]
    parts = np.split(values, np.cumsum(sizes)[:-1]) if sizes else []
    return {key: part.reshape(shapes[key]) for key, part in zip(sorted(shapes), parts, strict=True)}
