"""An adapter of a smaller rank than the federation's, at a site whose ``allow.max_rank`` is below ``adapter.rank``.

The site receives and sends factors of the federation's rank R, so all messages have one layout. In between it trains
factors of its own rank r. What arrives is approximated by a product of rank r (Eckart and Young). What leaves is the
trained product in factors of rank R, in a basis that is as close as possible to the one that arrived.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ...common.config.schema import Plan
from ...common.methods import ABSENT, SHARED
from ...common.products import Factors, truncate
from ...common.protocol.types import Arrays

A, B = "lora_A.weight", "lora_B.weight"
INITIAL = ("kaiming", "gaussian")  # values of adapter.init that do not depend on other sites
LARGEST = 8  # times the site's rank: messages have the federation's, so it costs memory and traffic


def plan_at_rank(plan: Plan, most: int | None) -> Plan:
    """Return the plan with a rank of at most ``most`` and the same scaling factor, or the plan itself if it cannot."""
    if most is None or not most < plan.adapter.rank <= LARGEST * most or not can_be_smaller(plan):
        return plan
    ratio = most / plan.adapter.rank
    alpha = plan.adapter.alpha * (math.sqrt(ratio) if plan.adapter.rslora else ratio)
    return dataclasses.replace(plan, adapter=dataclasses.replace(plan.adapter, rank=most, alpha=alpha))


def can_be_smaller(plan: Plan) -> bool:
    """Whether sites can train adapters of a smaller rank.

    Only a product B·A can be approximated, so the method must share both. Patterns for single layers, and differences
    to the last adapter (``broadcast_bits``), need the federation's rank.
    """
    method, adapter = plan.row(), plan.adapter
    shares_products = method.A is method.B is SHARED and method.scale is ABSENT
    of_layers = adapter.rank_pattern or adapter.alpha_pattern
    return bool(
        shares_products and adapter.init in INITIAL and not of_layers and plan.communication.broadcast_bits is None
    )


@dataclass
class SmallerRank:
    """Converts shared arrays between the federation's rank and the site's, in fp32. Other arrays stay as they are."""

    federation: int
    site: int
    _last: tuple[Arrays, Arrays] | None = None  # what arrived last, which a round loads more than once, in both ranks

    def layout(self, layout: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return a layout of the site's rank as it is in the federation's."""
        shapes = dict(layout)
        for a, b in _layers(layout):
            shapes[a], shapes[b] = (self.federation, layout[a][1]), (layout[b][0], self.federation)
        return shapes

    def received(self, arrays: Arrays) -> Arrays:
        """Return arrays of the federation's rank as the best approximation of the site's rank."""
        if self._last is None or self._last[0] is not arrays:
            self._last = arrays, self._convert(arrays, arrays, self.site)
        return self._last[1]

    def sent(self, trained: Arrays, received: Arrays) -> Arrays:
        """Return arrays of the site's rank in the federation's rank, in a basis like that of ``received``.

        Arrays that did not change, and whose product has the site's rank, come out as they arrived.
        """
        return self._convert(trained, received, self.federation)

    def _convert(self, arrays: Arrays, like: Arrays, rank: int) -> Arrays:
        converted = dict(arrays)
        for a, b in _layers(arrays):
            product = Factors(arrays[b].astype(np.float64), arrays[a].astype(np.float64))
            factors = truncate(product, like[a][:rank].astype(np.float64))
            converted[a], converted[b] = (np.ascontiguousarray(x, np.float32) for x in (factors.right, factors.left))
        return converted


def _layers(names: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """The names of A and B of every layer."""
    for name in names:
        if name.endswith(A):
            yield name, name.removesuffix(A) + B
