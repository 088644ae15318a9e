"""Losses on a site's validation rows, which it does not train on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...common.errors import DataError
from ...common.tasks.base import Task

COMPARES_ROUNDS = "server.keep and server.patience compare rounds"


def row_losses(task: Task, examples: Sequence[Any]) -> list[float]:
    """The loss of each example with the model as it is."""
    task.module.eval()
    with torch.no_grad():
        return [float(task.loss(task.collate([example]))[0]) for example in examples]


def require_validation_rows(rows: Sequence[Any], site: str, purpose: str = COMPARES_ROUNDS) -> None:
    """Raise DataError if a site has no validation rows. ``purpose`` begins the sentence that says what needs them."""
    if not rows:
        raise DataError(
            "data.validation_fraction",
            "validation rows",
            "none",
            site=site,
            message=f"{purpose} on validation rows, and the site has none.",
            hint="Set data.validation_fraction, for example to 0.2.",
        )
