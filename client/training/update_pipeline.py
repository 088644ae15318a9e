"""Steps between training and the reply: pure functions on the shared arrays that a site is about to send.

A step sees the trained arrays and the arrays that the site received. ``UPDATE_STEPS`` lists the steps in the order in
which they run; a new step is one function and one row. A reply is stored after the last step, so a repeated request
returns the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

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


UPDATE_STEPS: dict[str, Callable[[TrainSettings], UpdateStep | None]] = {}  # None: the settings do not ask for it


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
