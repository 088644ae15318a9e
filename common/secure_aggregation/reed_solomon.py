"""Decoding of Reed–Solomon codes (Gao 2003): the polynomial on which most of the shares of a secret lie.

A polynomial is the list of its coefficients, integers modulo ``PRIME``, constant term first. That of zero is empty.
"""

from __future__ import annotations

from collections.abc import Mapping

from .shamir import PRIME, value_at

Polynomial = list[int]


def decode(shares: Mapping[int, int], threshold: int) -> Polynomial | None:
    """Return the polynomial of degree below ``threshold`` on which all but (m - threshold) // 2 of m shares lie.

    ``shares`` are values by point, at least ``threshold`` of them. Returns None if there is no such polynomial. It
    takes O(m²) multiplications.
    """
    zeros, values = _interpolate(shares)
    factors: tuple[Polynomial, Polynomial] = ([], [1])  # of ``values`` in the two rests of Euclid's algorithm
    while 2 * (len(values) - 1) >= len(shares) + threshold:
        quotient, rest = _divide(zeros, values)
        zeros, values = values, rest
        factors = factors[1], _minus_product(factors[0], quotient, factors[1])
    result, rest = _divide(values, factors[1])
    return result if not rest and len(result) <= threshold else None


def _interpolate(shares: Mapping[int, int]) -> tuple[Polynomial, Polynomial]:
    """The product of all x - point, and the polynomial through all shares."""
    zeros = [1]
    for point in shares:
        zeros = [(low - point * high) % PRIME for low, high in zip([0, *zeros], [*zeros, 0], strict=True)]
    values = [0] * len(shares)
    for point, share in shares.items():
        others = _without(zeros, point)
        weight = share * pow(value_at(others, point), -1, PRIME) % PRIME
        values = [(value + weight * other) % PRIME for value, other in zip(values, others, strict=True)]
    return zeros, _trimmed(values)


def _without(zeros: Polynomial, point: int) -> Polynomial:
    """``zeros`` divided by x - point, by Horner's rule."""
    quotient, carry = [], 0
    for coefficient in reversed(zeros[1:]):
        carry = (carry * point + coefficient) % PRIME
        quotient.append(carry)
    return quotient[::-1]


def _divide(dividend: Polynomial, divisor: Polynomial) -> tuple[Polynomial, Polynomial]:
    """Quotient and rest."""
    rest, inverse, degree = list(dividend), pow(divisor[-1], -1, PRIME), len(divisor) - 1
    quotient = [0] * max(0, len(dividend) - degree)
    for i in reversed(range(len(quotient))):
        quotient[i] = factor = rest[i + degree] * inverse % PRIME
        for j, coefficient in enumerate(divisor):
            rest[i + j] = (rest[i + j] - factor * coefficient) % PRIME
    return quotient, _trimmed(rest)


def _minus_product(minuend: Polynomial, one: Polynomial, other: Polynomial) -> Polynomial:
    result = [*minuend, *[0] * max(0, len(one) + len(other) - 1 - len(minuend))]
    for i, factor in enumerate(one):
        for j, coefficient in enumerate(other):
            result[i + j] = (result[i + j] - factor * coefficient) % PRIME
    return _trimmed(result)


def _trimmed(polynomial: Polynomial) -> Polynomial:
    """Without zeros at the end."""
    while polynomial and not polynomial[-1]:
        polynomial.pop()
    return polynomial
