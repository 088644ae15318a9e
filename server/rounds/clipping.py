"""Clipping of updates that are much larger than those of the other sites in a round, so that no site decides alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

MIN_SITES = 3  # in a round: the median of two norms lies half way to the larger one


def norm_bound(norms: Mapping[str, float], ratio: float) -> float:
    """The largest norm that an update keeps: ``ratio`` times the median. Infinite with too few sites."""
    if len(norms) < MIN_SITES:
        return float("inf")
    return ratio * statistics.median(norms.values())


@dataclass(frozen=True)
class Clipped(Mapping[str, np.ndarray]):
    """A site's arrays with the update scaled: start + factor · (arrays − start), computed on access."""

    arrays: Mapping[str, np.ndarray]
    start: Mapping[str, np.ndarray]
    factor: float

    def __getitem__(self, key: str) -> np.ndarray:
        array, start = self.arrays[key], self.start[key].astype(np.float64)
        return (start + self.factor * (array - start)).astype(array.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)
