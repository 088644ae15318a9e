"""Products of LoRA factors: B·A of every adapted layer, without the dense matrices where they are large."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from typing import NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

SMALL = 10**9  # multiplications; for a smaller product BLAS threads cost more than they save
NEGLIGIBLE = 1e-10  # of the largest singular value
CONDITION = 1e3  # at most, of the matrix that relates the new factor A to the mean one


class Factors(NamedTuple):
    """A product of two thin matrices: ``left`` (d_out, n) and ``right`` (n, d_in)."""

    left: np.ndarray
    right: np.ndarray

    @property
    def product_is_cheaper(self) -> bool:
        """Whether the product itself takes fewer operations than two Gram matrices of size n²."""
        d_out, n, d_in = *self.left.shape, self.right.shape[1]
        return n * (d_out + d_in) > 2 * d_out * d_in


def factor_names(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The names of A and B of every adapted layer among these names, in name order."""
    for a_key in sorted(key for key in names if ".lora_A." in key):
        yield a_key, a_key.replace(".lora_A.", ".lora_B.")


def truncate(products: Factors, like: np.ndarray) -> Factors:
    """The best approximation of a product by factors of the rank of ``like`` (Eckart and Young), in a similar basis.

    ``like`` (rank, d_in) is a factor A.
    A' is ``like``, projected on the rows of the approximation. B' is the matrix with which B'·A' is the
    approximation. So factors that need no truncation come back unchanged, and a site's core, which stands between B and
    A, keeps its meaning as far as possible. Takes O(d n²) for n columns of ``products``, with d its longer side.
    """
    rank, width = like.shape
    with _threads(products):
        left, left_rest = np.linalg.qr(products.left)
        right, right_rest = np.linalg.qr(products.right.T)
        u, values, v = np.linalg.svd(left_rest @ right_rest.T)
        kept = int(np.sum(values[:rank] > NEGLIGIBLE * max(values[0], np.finfo(float).tiny)))
        rows = right @ v[:kept].T  # (d_in, kept), orthonormal
        rest = like - (like @ rows) @ rows.T
        others = np.linalg.svd(rest, full_matrices=False)[2][: rank - kept]  # for products of a lower rank
        none = np.zeros((width, rank - kept - len(others)))  # where the rank exceeds the rows there can be
        basis = np.hstack([rows, others.T, none])  # (d_in, rank)
        x, scales, y = np.linalg.svd(like @ basis)
        largest = scales[0] or np.sqrt(values[0]) or 1.0  # factors A may cancel, although the products do not
        scales = np.maximum(scales, largest / CONDITION)
        targets = np.zeros((len(left), rank))
        targets[:, :kept] = left @ (u[:, :kept] * values[:kept])
        return Factors((targets @ y.T / scales) @ x.T, (x * scales) @ y @ basis.T)


def dense_squares(products: Factors, mean: Factors) -> tuple[float, float]:
    """‖P‖²_F and ‖P − M‖²_F."""
    with _threads(products):
        whole = products.left @ products.right
        difference = whole - mean.left @ mean.right
        return float(np.vdot(whole, whole)), float(np.vdot(difference, difference))


def gram_squares(products: Factors, mean: Factors) -> tuple[float, float]:
    """‖P‖²_F and ‖P − M‖²_F as sums of ⟨l_i r_i, l_j r_j⟩ over the rank-one terms of P, and of P − M."""
    left, right = np.hstack([products.left, -mean.left]), np.vstack([products.right, mean.right])
    with _threads(products):
        terms = (left.T @ left) * (right @ right.T)
    rank = len(mean.right)
    return float(np.sum(terms[:-rank, :-rank])), float(np.sum(terms))


def _threads(factors: Factors) -> AbstractContextManager[object]:
    """Limit small products to one BLAS thread: on a busy machine several threads wait for each other."""
    threads = 1 if factors.left.shape[1] * max(factors.left.size, factors.right.size) < SMALL else None
    return _blas().limit(limits=threads, user_api="blas")


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()
