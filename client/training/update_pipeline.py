"""Steps between training and the reply: pure functions on the shared arrays that a site is about to send.

A step sees the trained arrays and the arrays that the site received. ``UPDATE_STEPS`` lists the steps in the order in
which they run; a new step is one function and one row. A reply is stored after the last step, so a repeated request
returns the same bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ...common.config.schema import TrainSettings
from ...common.protocol.types import UPDATE_SCALE, Arrays
from ...common.seeds import seed_from


@dataclass(frozen=True)
class UpdateContext:
    """The round, and the seed of everything random in it: a pure function of federation, site, round and step."""

    round: int
    seed: int


class UpdateStep(Protocol):
    """One step of the pipeline."""

    def __call__(self, arrays: Arrays, reference: Arrays, context: UpdateContext) -> tuple[Arrays, float]:
        """Return the arrays to send, and the factor by which the step scaled ``arrays - reference`` (1.0: not at all).

        ``reference`` are the arrays that the site received. Neither argument is changed.
        """
        ...


@dataclass(frozen=True)
class Clip:
    """Clip the Frobenius norm of the update over all arrays together to ``bound``: scale it, keep its direction.

    The fp32 arrays that are sent never exceed the bound, so clipping twice is the same as once. An update within the
    bound passes unchanged, and so does one with NaN or infinity, which the coordinator refuses.
    """

    bound: float

    def __call__(self, arrays: Arrays, reference: Arrays, context: UpdateContext) -> tuple[Arrays, float]:
        """Return the clipped arrays and the clip factor."""
        norm = update_norm(arrays, reference)
        if norm <= self.bound or not math.isfinite(norm):
            return arrays, 1.0
        margin = 0.0  # rounding to fp32 may lengthen an update: shorten it a little more until it fits
        while True:
            factor = self.bound / norm * (1.0 - margin)
            clipped = {key: _towards(reference[key], value, factor) for key, value in arrays.items()}
            if update_norm(clipped, reference) <= self.bound:
                return clipped, factor
            margin = min(1.0, 2 * margin or 2.0**-30)


def update_norm(arrays: Arrays, reference: Arrays) -> float:
    """The Frobenius norm of ``arrays - reference`` over all arrays together, in double precision."""
    squares = (float(np.sum(np.square(value.astype(np.float64) - reference[key]))) for key, value in arrays.items())
    return math.sqrt(sum(squares))


def _towards(start: np.ndarray, end: np.ndarray, factor: float) -> np.ndarray:
    return (start + factor * (end.astype(np.float64) - start)).astype(end.dtype)


UPDATE_STEPS: dict[str, Callable[[TrainSettings], UpdateStep | None]] = {  # None: the settings do not ask for it
    "clip": lambda settings: Clip(settings.max_update_norm) if settings.max_update_norm is not None else None,
}


def process_update(
    arrays: Arrays, reference: Arrays, settings: TrainSettings, context: UpdateContext
) -> tuple[Arrays, dict[str, float]]:
    """Run the steps that the settings ask for. Returns the arrays to send, and the scale as a metric if below 1."""
    scale = 1.0
    for name, make_step in UPDATE_STEPS.items():
        step = make_step(settings)
        if step is not None:
            of_step = dataclasses.replace(context, seed=seed_from(context.seed, name))
            arrays, factor = step(arrays, reference, of_step)
            scale *= factor
    return arrays, {UPDATE_SCALE: scale} if scale < 1 else {}
