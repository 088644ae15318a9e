"""An adapter of a smaller rank than the federation's, at a site whose ``allow.max_rank`` is below ``adapter.rank``.

The site receives and sends factors of the federation's rank R, so all messages have one layout. In between it trains
factors of its own rank r. What arrives is approximated by a product of rank r (Eckart and Young). What leaves is the
product that arrived plus what training changed of its approximation, so the part that the site cannot hold stays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...common.config.schema import Plan
from ...common.errors import RefusedError
from ...common.methods import ABSENT, PERSONAL, SHARED
from ...common.products import Factors, factor_names, truncate
from ...common.protocol.types import Arrays

INITIAL = ("kaiming", "gaussian")  # values of adapter.init that do not depend on other sites
LARGEST = 8  # times the site's rank: messages have the federation's, so it costs memory and traffic


def plan_at_rank(plan: Plan, max_rank: int | None) -> Plan:
    """Return the plan with a rank of at most ``max_rank`` and equal scaling, or the plan itself if that cannot be."""
    if max_rank is None or not max_rank < plan.adapter.rank <= LARGEST * max_rank or not can_be_smaller(plan):
        return plan
    ratio = max_rank / plan.adapter.rank
    alpha = plan.adapter.alpha * (math.sqrt(ratio) if plan.adapter.rslora else ratio)
    return dataclasses.replace(plan, adapter=dataclasses.replace(plan.adapter, rank=max_rank, alpha=alpha))


def can_be_smaller(plan: Plan) -> bool:
    """Whether sites can train adapters of a smaller rank.

    Only a product B·A can be approximated, so a method shares both or neither. Patterns for single layers, and
    differences to the last adapter (``broadcast_bits``), need the federation's rank.
    """
    method, adapter = plan.row(), plan.adapter
    as_product = method.A is method.B and method.A in (SHARED, PERSONAL) and method.scale is ABSENT
    of_layers = adapter.rank_pattern or adapter.alpha_pattern
    return bool(as_product and adapter.init in INITIAL and not of_layers and plan.communication.broadcast_bits is None)


@dataclass
class SmallerRank:
    """Converts shared arrays between the federation's rank and the site's, in fp32. Other arrays stay as they are."""

    federation: int
    site: int
    _last: tuple[Arrays, Arrays] | None = None  # what arrived last, in both ranks: a round loads it more than once

    def layout(self, layout: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return a layout of the site's rank as it is in the federation's."""
        shapes = dict(layout)
        for a, b in factor_names(layout):
            shapes[a], shapes[b] = (self.federation, layout[a][1]), (layout[b][0], self.federation)
        return shapes

    def received(self, arrays: Arrays) -> Arrays:
        """Return arrays of the federation's rank as the best approximation of the site's rank."""
        if self._last is None or self._last[0] is not arrays:
            converted = dict(arrays)
            for a, b in factor_names(arrays):
                converted[a], converted[b] = _factors([_product(arrays, a, b)], arrays[a][: self.site])
            self._last = arrays, converted
        return self._last[1]

    def sent(self, trained: Arrays, received: Arrays) -> Arrays:
        """Return ``received`` (rank R) plus what training changed of its approximation, truncated to rank R.

        ``trained`` has the site's rank. The basis is as close as possible to that of ``received``, so arrays that did
        not change come out as they arrived.
        """
        before, converted = self.received(received), dict(trained)
        for a, b in factor_names(trained):
            parts = _product(received, a, b), _product(trained, a, b), _product(before, a, b, sign=-1.0)
            converted[a], converted[b] = _factors(parts, received[a])
        return converted


def _product(arrays: Arrays, a: str, b: str, sign: float = 1.0) -> Factors:
    """A layer's product in double precision. Raises RefusedError where it is not finite."""
    for key in (a, b):
        if not np.isfinite(arrays[key]).all():
            raise RefusedError(key, "finite values", "NaN or infinity")
    return Factors(sign * arrays[b].astype(np.float64), arrays[a].astype(np.float64))


def _factors(products: Sequence[Factors], like: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A and B of the sum of these products, truncated to the rank of ``like``, a factor A."""
    lefts, rights = zip(*products, strict=True)
    factors = truncate(Factors(np.hstack(lefts), np.vstack(rights)), like.astype(np.float64))
    return factors.right.astype(np.float32), factors.left.astype(np.float32)
