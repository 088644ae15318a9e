"""Which metrics of a reply leave the site, by ``allow.metrics`` and ``allow.max_evaluations``.

The stored reply keeps all metrics exactly. What is sent is a function of it, so a repeated request gets the same bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ...common.protocol.types import BENEFIT, TrainReply
from ..training.benefit import MAX_EXAMPLES

SHARES = ("accuracy", "macro_f1", "micro_f1", "subset_accuracy", "exact_match", "rouge_l")  # between 0 and 1
DIGITS = 2  # significant digits of all other metrics, which are not bounded


@dataclass(frozen=True)
class ReleasedReply:
    """The reply to send, and the names of the metrics that were left out of it or rounded in it."""

    reply: TrainReply
    withheld: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()


@dataclass(frozen=True)
class SiteSize:
    """Numbers of the site's training and test examples."""

    train: int
    test: int


def release(
    reply: TrainReply, rule: Literal["all", "rounded", "none"], size: SiteSize, *, evaluates: bool = True
) -> ReleasedReply:
    """Apply the site's rule. Without ``evaluates`` the reply holds no metrics, whatever the rule."""
    if rule == "none" or not evaluates:
        return ReleasedReply(dataclasses.replace(reply, metrics={}), withheld=tuple(sorted(reply.metrics)))
    if rule == "all":
        return ReleasedReply(reply)
    metrics = rounded_metrics(reply.metrics, size)
    changed = tuple(sorted(metrics))
    return ReleasedReply(dataclasses.replace(reply, metrics=metrics), rounded=changed)


def rounded_metrics(metrics: Mapping[str, float], size: SiteSize) -> dict[str, float]:
    """Round every metric so far that the lost digits were uncertain anyway.

    A share of n examples has a standard error of up to 1/(2√n), so shares are rounded to multiples of 1/m, where m is
    √n as a whole number. One example changes a share by 1/n. The benefit ratio is rounded in the same way, with the n
    that it was measured on. Losses, errors and the clip factor keep two significant digits.
    """
    return {name: _rounded(name, value, size) for name, value in metrics.items()}


def _rounded(name: str, value: float, size: SiteSize) -> float:
    if not math.isfinite(value):
        return value
    if name == BENEFIT:
        return _to_grid(value, min(size.train, MAX_EXAMPLES))
    if name.rpartition(".")[2] in SHARES:
        return _to_grid(value, size.test)
    return float(f"{value:.{DIGITS}g}")


def _to_grid(value: float, n: int) -> float:
    parts = max(1, round(math.sqrt(n)))
    return round(value * parts) / parts
