"""Shamir's secret sharing (1979): any ``threshold`` shares give the secret, and fewer say nothing about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PRIME = 2**521 - 1  # a Mersenne prime; secrets of 256 bits fit
SHARE_BYTES = 66
SECRET_BYTES = 32


def split(secret: bytes, count: int, coefficients: Sequence[int]) -> list[int]:
    """Return the values of a polynomial at 1 … ``count``: its constant term is the secret (at most 32 bytes).

    ``coefficients`` are the others, random numbers below ``PRIME``: one less than the threshold.
    """
    polynomial = [int.from_bytes(secret, "big"), *coefficients]
    return [_value(polynomial, x) for x in range(1, count + 1)]


def _value(polynomial: Sequence[int], x: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % PRIME
    return value


def lagrange_at_zero(points: Sequence[int]) -> list[int]:
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
    weights = lagrange_at_zero(list(shares))
    secret = sum(weight * value for weight, value in zip(weights, shares.values(), strict=True)) % PRIME
    return secret.to_bytes(SECRET_BYTES, "big") if secret.bit_length() <= 8 * SECRET_BYTES else None
