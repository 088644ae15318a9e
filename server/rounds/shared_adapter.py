"""One shared adapter at the coordinator, and its step from one round to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ...common.config.schema import ServerSettings
from ...common.protocol.codec import as_received
from . import aggregation
from .aggregation import AGGREGATORS, Aggregate, RoundState, WeightedUpdate
from .broadcast import Difference, broadcast
from .site_privacy import PrivateMean


@dataclass(frozen=True)
class SharedAdapter:
    """The shared arrays of one group of sites, with the arrays of its server optimizer and of its aggregator.

    With ``communication.broadcast_bits`` also what the shared arrays lack of the aggregate, and their difference to
    those of the round before.
    """

    shared: Mapping[str, np.ndarray]
    optimizer_state: Mapping[str, np.ndarray] = field(default_factory=dict)
    aggregator_state: Mapping[str, np.ndarray] = field(default_factory=dict)
    feedback: Mapping[str, np.ndarray] = field(default_factory=dict)
    difference: Difference | None = None


class StepResult(NamedTuple):
    """The adapter after a round, the product residual where it has a meaning, and the positions of updates left out."""

    adapter: SharedAdapter
    residual: float | None
    left_out: list[int]


@dataclass(frozen=True)
class ServerStep:
    """S_{t-1} → S_t: the aggregator, the server optimizer, and the codec in which the sites receive the result."""

    round: int
    settings: ServerSettings
    codec: str
    averages_products: bool  # of the method: mean(B)·mean(A) is not mean(BA)
    bits: int | None = None  # of each number in the differences that the sites receive
    private_mean: PrivateMean | None = None  # takes the place of the aggregator

    def __call__(self, adapter: SharedAdapter, updates: Callable[[], Iterable[WeightedUpdate]]) -> StepResult:
        """Make the next adapter from the updates of a round."""
        before = RoundState(self.round, adapter.shared, self.settings, adapter.aggregator_state)
        if self.private_mean:
            aggregate = Aggregate(self.private_mean(updates(), adapter.shared), {}, [])
        else:
            aggregate = aggregation.aggregate(updates(), before)
        aggregated, aggregator_state, left_out = aggregate
        before = RoundState(self.round, adapter.shared, self.settings, adapter.optimizer_state)
        shared, optimizer_state = aggregation.apply_optimizer(aggregated, before)
        residual = None
        if self.averages_products and not self.private_mean and AGGREGATORS[self.settings.aggregator].averages:
            residual = aggregation.product_residual(list(updates()), aggregated)
        if self.bits is None:
            after = SharedAdapter(as_received(self.codec, shared), optimizer_state, aggregator_state)
            return StepResult(after, residual, left_out)
        sent = broadcast(shared, adapter.feedback, adapter.shared, self.bits, self.round)
        after = SharedAdapter(sent.shared, optimizer_state, aggregator_state, sent.feedback, sent.difference)
        return StepResult(after, residual, left_out)
