"""Which parameter groups train for how many steps in a request."""

from __future__ import annotations

from collections.abc import Mapping

from ...common.config.schema import Plan
from ...common.methods import PERSONAL, SHARED, Method, group_of
from ...common.protocol.types import RequestKind
from ...common.training.loop import TrainPhase


def phases(
    plan: Plan,
    method: Method,
    trainable: Mapping[str, object],
    kind: RequestKind,
    *,
    examples: int,
    late: bool = False,
) -> list[TrainPhase]:
    """The optimizer steps of a request: all groups jointly, in phases, or personal groups and then shared ones.

    ``examples`` is the site's number of training examples. A finalize request trains personal groups only: those of
    ``train.final_groups``, or all of them at a site that joins ``late``, after the last round.
    """
    everything, settings = frozenset(trainable), plan.train
    personal, shared = (frozenset(method.having(trainable, role)) for role in (PERSONAL, SHARED))
    if kind == "finalize":
        groups = None if late else settings.final_groups
        chosen = personal if groups is None else frozenset(key for key in personal if group_of(key) in groups)
        planned = [TrainPhase(settings.final_steps, chosen)]
    elif settings.schedule == "phases":
        planned = [
            TrainPhase(p.steps, frozenset(k for k in trainable if group_of(k) in p.groups)) for p in settings.phase
        ]
    elif settings.schedule == "joint" or not personal or not shared:  # nothing to alternate with: as many joint steps
        planned = [TrainPhase(settings.steps_per_round(examples), everything)]
    else:
        planned = [TrainPhase(settings.personal_steps, personal), TrainPhase(settings.shared_steps, shared)]
    return [p for p in planned if p.keys and p.steps]
