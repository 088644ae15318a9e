"""A site's rows in the one form that tasks read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = dict[str, Any]
TaskKind = Literal["classification", "generation", "regression"]

PRIMARY_METRICS: dict[str, str] = {  # the metric that tables show for a task
    "classification": "accuracy",
    "generation": "rouge_l",
    "regression": "relative_error",
}
LOWER_IS_BETTER = frozenset({"regression"})
METRICS = ("accuracy", "macro_f1", "loss", "exact_match", "rouge_l", "relative_error")
EVAL_MODES = ("base", "shared", "personal")  # of the model that is measured


@dataclass(frozen=True)
class SiteDataset:
    """Training and test rows of one site.

    classification: ``{"text", "label"}``; generation: ``{"messages": [{"role", "content"}, …]}`` or
    ``{"prompt", "completion"}``; regression: ``{"x", "y"}``.
    """

    site: str
    task: TaskKind
    train: Sequence[Row]
    test: Sequence[Row]
    labels: tuple[str, ...] = ()
