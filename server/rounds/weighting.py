"""How much each admitted reply weighs in the mean. A new rule is one function and one row of ``WEIGHTS``.

Benefit weights find the sites that have something in common, without comparing their updates: each site reports one
number, the ratio of the loss with the shared adapter to the loss without it (``client/training/benefit.py``). A site
that the adapter does not help pulls it elsewhere, so its weight falls. The rule is our own, not a published one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MEMORY = 0.8  # share of the old value in the running mean of a site's ratio
SHARPNESS = 8.0  # β of softmax(−β · ratio) from half of the rounds on; it rises linearly from 0


@dataclass(frozen=True)
class Contribution:
    """What a rule may read of a site's reply: loss terms, examples, and the running mean of its benefit ratio."""

    terms: int
    examples: int
    benefit: float = 1.0


Weights = dict[str, float]
WeightRule = Callable[[Mapping[str, Contribution], float], Weights]  # (by site, elapsed fraction of the rounds)


def running_mean(before: float | None, ratio: float) -> float:
    """The running mean of a site's benefit ratio; the first ratio starts it."""
    return ratio if before is None else MEMORY * before + (1 - MEMORY) * ratio


def benefit_weights(replies: Mapping[str, Contribution], progress: float) -> Weights:
    """softmax(−β · ratio) over the sites. β is 0 in the first round, where all sites weigh the same."""
    beta = SHARPNESS * min(1.0, 2 * progress)
    least = min(reply.benefit for reply in replies.values())
    powers = {site: math.exp(-beta * (reply.benefit - least)) for site, reply in replies.items()}
    total = math.fsum(powers.values())
    return {site: power / total for site, power in powers.items()}


def _each(weigh: Callable[[Contribution], float]) -> WeightRule:
    return lambda replies, progress: {site: weigh(reply) for site, reply in replies.items()}


WEIGHTS: dict[str, WeightRule] = {
    "tokens": _each(lambda reply: float(reply.terms)),
    "examples": _each(lambda reply: float(reply.examples)),
    "uniform": _each(lambda reply: 1.0),
    "benefit": benefit_weights,
}
