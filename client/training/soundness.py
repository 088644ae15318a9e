"""What a site keeps and sends after training is finite; otherwise it keeps its last state and refuses the round."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ...common.errors import RefusedError
from ...common.training.loop import TrainOutcome

LOWER_RATES = "Lower train.lr, core_lr, head_lr and private_lr, or set train.max_grad_norm."
OTHER_PRECISION = 'Use model.precision = "bf16" or "fp32".'


def check_trained(outcome: TrainOutcome, values: Mapping[str, torch.Tensor], site: str) -> None:
    """Check the loss and the trained values of a round. Raises RefusedError, which says what to do."""
    if outcome.steps and not outcome.applied:
        raise RefusedError(
            "training steps overflowed",
            "at least one optimizer step",
            f"{outcome.steps} steps that overflowed",
            site=site,
            message=f"The fp16 gradients of all {outcome.steps} optimizer steps overflowed, so nothing was trained.",
            hint=OTHER_PRECISION,
        )
    if outcome.steps and not math.isfinite(outcome.loss):
        raise _not_finite("training loss", "The training loss", outcome, site)
    for key, value in values.items():
        if not bool(value.isfinite().all()):
            raise _not_finite(key, f"{key} after training", outcome, site)


def _not_finite(field: str, subject: str, outcome: TrainOutcome, site: str) -> RefusedError:
    return RefusedError(
        f"{field} not finite",
        "finite numbers",
        outcome.loss,
        site=site,
        message=f"{subject} is not finite. The site keeps its last state.",
        hint=f"{LOWER_RATES} {OTHER_PRECISION}" if outcome.overflows else LOWER_RATES,
    )
