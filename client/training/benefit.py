"""The benefit ratio: how much the shared adapter helps a site, as one number.

ratio = loss with the shared adapter ÷ loss without any adapter, on the site's training examples. Both losses are
cross-fitted, so no example has to be held out of training: the personal parameters are fitted to one half of the
examples and the loss is taken on the other half, and then the other way round. Below 1 the adapter helps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...common.protocol.types import MAX_BENEFIT
from ...common.seeds import seed_from
from ...common.tasks.base import Encoded, Task

MAX_EXAMPLES = 64  # examples that are used, a seeded sample of a larger site
ITERATIONS = 10  # of L-BFGS


@dataclass(frozen=True)
class PersonalFit:
    """How personal parameters are fitted: a linear head by regression, and ``parameters`` by L-BFGS.

    The second is left out where the head was fitted, unless ``always`` is set, since cores that start as the identity
    need no fit.
    """

    parameters: Mapping[str, nn.Parameter]
    always: bool = False

    def __call__(self, task: Task) -> None:
        """Fit the parameters to ``task.train``."""
        if (not task.fit_head() or self.always) and self.parameters:
            _minimize(task, self.parameters)


def cross_fitted_loss(task: Task, reset: Callable[[], None], fit: PersonalFit, seed: int) -> float:
    """The mean loss per example on training examples, with personal parameters fitted to other ones.

    ``reset`` gives all parameters their values before a fit. Returns NaN for fewer than two examples. ``task.train`` is
    unchanged afterwards.
    """
    generator = torch.Generator().manual_seed(seed_from(seed, "benefit"))
    order = torch.randperm(len(task.train.examples), generator=generator)[:MAX_EXAMPLES].tolist()
    halves = [[task.train.examples[i] for i in order[k::2]] for k in (0, 1)]
    if not all(halves):
        return math.nan
    total = 0.0
    for fitted, measured in (halves, halves[::-1]):
        reset()
        with _training_on(task, fitted):
            fit(task)
        task.module.eval()
        with torch.no_grad():
            total += task.mean_loss(measured) * len(measured)
    return total / len(order)


def benefit_ratio(with_adapter: float, without_adapter: float) -> float:
    """The ratio of the two losses within [0, ``MAX_BENEFIT``]; 1 (no difference) where it is undefined."""
    if not (math.isfinite(with_adapter) and math.isfinite(without_adapter)) or without_adapter <= 0:
        return 1.0
    return min(with_adapter / without_adapter, MAX_BENEFIT)


@contextmanager
def _training_on(task: Task, examples: list[Any]) -> Iterator[None]:
    whole = task.train
    task.train = Encoded(tuple(examples))
    try:
        yield
    finally:
        task.train = whole


def _minimize(task: Task, parameters: Mapping[str, nn.Parameter]) -> None:
    """Minimize the mean loss on ``task.train`` over these parameters alone."""
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.LBFGS(list(parameters.values()), max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        total, count = 0.0, len(task.train.examples)
        for batch in task.batches(task.train.examples):
            loss, terms = task.loss(batch)
            (loss * (terms / count)).backward()
            total += loss.item() * terms / count
        return total

    task.module.eval()
    optimizer.step(closure)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None
