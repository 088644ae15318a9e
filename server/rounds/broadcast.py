"""The coordinator's part in sending the shared adapter as differences in few bits, with error feedback.

P_t = P_{t-1} + Q(S_t − P_{t-1}): all sites train from P, and what Q leaves out of S_t is added to the next aggregate
(DoubleSqueeze, Tang et al. 2019). P_0 is S_0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...common.protocol.broadcast import encode_difference
from ...common.protocol.types import TrainRequest

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Difference:
    """The adapter after ``round`` as bytes, for the sites that were admitted in it; of round 0 for all new sites."""

    round: int
    data: bytes


class Broadcast(NamedTuple):
    """What the sites receive of an aggregate: the arrays, what they lack of it, and their difference to the last ones.

    Without a difference the arrays must be sent whole.
    """

    shared: Arrays
    feedback: Arrays
    difference: Difference | None


def broadcast(aggregate: Arrays, feedback: Arrays, previous: Arrays, bits: int, t: int) -> Broadcast:
    """Round an aggregate of round t, and what the adapter of the round before lacked, to ``bits`` bits a number.

    The feedback is kept in fp32. Where few bits cannot represent the result, all of it is sent whole.
    """
    if not aggregate:
        return Broadcast(aggregate, {}, None)
    wanted = {key: value.astype(np.float64) + feedback.get(key, 0.0) for key, value in aggregate.items()}
    data, shared = encode_difference(wanted, previous, bits)
    with np.errstate(over="ignore", invalid="ignore"):
        lacking = {key: (value - shared[key]).astype(np.float32) for key, value in wanted.items()}
        if all(np.isfinite(shared[key]).all() and np.isfinite(lacking[key]).all() for key in shared):
            return Broadcast(shared, lacking, Difference(t, data))
        return Broadcast({key: value.astype(np.float32) for key, value in wanted.items()}, {}, None)


def holds_reference(difference: Difference | None, request: TrainRequest) -> bool:
    """Whether the site of a request received, in its last admitted round, what the difference is applied to."""
    return difference is not None and difference.round == request.admitted_round
