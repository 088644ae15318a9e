"""Shamir's secret sharing (1979): any ``threshold`` shares give the secret, and fewer say nothing about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

PRIME = 2**521 - 1  # a Mersenne prime; secrets of 256 bits fit
SHARE_BYTES = 66
SECRET_BYTES = 32


def split(secret: bytes, count: int, coefficients: Sequence[int]) -> list[int]:
    """Return the values of a polynomial at 1 … ``count``: its constant term is the secret (at most 32 bytes).

    ``coefficients`` are the others, random numbers below ``PRIME``: one less than the threshold.
    """
    polynomial = [int.from_bytes(secret, "big"), *coefficients]
    return [value_at(polynomial, x) for x in range(1, count + 1)]


def value_at(polynomial: Sequence[int], x: int) -> int:
    """Return the value of a polynomial, whose constant term comes first."""
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % PRIME
    return value


@lru_cache(maxsize=16)
def lagrange_at_zero(points: tuple[int, ...]) -> list[int]:
    """Return what the values at these distinct points are multiplied with, so that their sum is the value at 0."""
    weights = []
    for i, x in enumerate(points):
        above = below = 1
        for j, other in enumerate(points):
            if i != j:
                above, below = above * other % PRIME, below * (other - x) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return weights


def combine(shares: Mapping[int, int]) -> bytes | None:
    """Return the secret (32 bytes) from shares by point, or None if these are not the shares of one.

    Fewer shares than the threshold, or a changed one, give another secret or None: the caller checks it.
    """
    weights = lagrange_at_zero(tuple(shares))
    return secret_of(sum(weight * value for weight, value in zip(weights, shares.values(), strict=True)) % PRIME)


def secret_of(value: int) -> bytes | None:
    """Return the secret (32 bytes) that is the value of a polynomial at 0, or None if it is not that of one."""
    return value.to_bytes(SECRET_BYTES, "big") if value.bit_length() <= 8 * SECRET_BYTES else None
