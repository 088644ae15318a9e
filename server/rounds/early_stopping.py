"""Early stopping, and the choice of the best round, by the loss on the sites' validation rows.

After round t every site reports the mean loss of its personal model on rows that it does not train on. Rounds are
compared by the mean over the sites that measured both, and a loss that is not finite counts as not measured. No test
row is involved.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Mapping

from ...common.errors import StateError
from ...common.protocol.limits import measured
from ...common.protocol.types import VALIDATION_LOSS
from .checkpoint import BestRound, Checkpoints, ServerState
from .strategy import AdapterStrategy, PendingRequest

logger = logging.getLogger("colora.validation")


def is_over(strategy: AdapterStrategy, state: ServerState) -> bool:
    """Whether there are no more rounds: all are done, the loss has not improved for ``server.patience`` rounds, or the
    privacy budget is spent.
    """
    patience, best = strategy.settings.patience, state.best
    exhausted = patience is not None and best is not None and state.round - best.round >= patience
    return state.round >= strategy.recipe.rounds or exhausted or strategy.budget_is_spent(state)


def is_due(strategy: AdapterStrategy, state: ServerState) -> bool:
    """Whether the validation loss after the last round is still to be measured."""
    return strategy.settings.validates and state.validated < state.round


def validate(strategy: AdapterStrategy, state: ServerState) -> ServerState:
    """Return the state in which the last round has been compared with the best one before it."""
    return strategy.retry_until_quorum(lambda: aggregate_validate(strategy, state, configure_validate(strategy, state)))


def configure_validate(strategy: AdapterStrategy, state: ServerState) -> dict[str, PendingRequest]:
    """Make the requests: to all connected sites that have a personal model."""
    strategy.membership.update(state.round)
    sites = [m.site for m in strategy.roster if m.site in strategy.membership.sites and m.site in state.admitted]
    return strategy.requests(sites, state, state.round + 1, "validate", False)


def aggregate_validate(
    strategy: AdapterStrategy, state: ServerState, asked: Mapping[str, PendingRequest]
) -> ServerState:
    """Compare the losses of the admitted replies with those of the best round. Raises QuorumError."""
    replies = strategy.collect(asked, state.round + 1, "validate")
    losses = measured({site: found.reply.metrics[VALIDATION_LOSS] for site, found in replies.items()})
    known = {site: loss for site, loss in losses.items() if loss is not None}
    best = state.best
    if best is None or is_better(known, best.losses):
        best = BestRound(state.round, known)
    mean = statistics.mean(known.values()) if known else None
    strategy.recorder.emit("validated", round=state.round, losses=losses, loss=mean, best=best.round)
    return dataclasses.replace(state, validated=state.round, best=best)


def is_better(losses: Mapping[str, float], before: Mapping[str, float]) -> bool:
    """Whether the mean loss over the sites that measured both is lower.

    A loss that is not finite, or beyond the range of a metric, counts as not measured, so no site can hold the best
    round with it. A round with a measured loss is better than one without any.
    """
    now, then = ({site: x for site, x in measured(each).items() if x is not None} for each in (losses, before))
    if not then:
        return bool(now)
    return sum(now[site] - then[site] for site in sorted(now.keys() & then.keys())) < 0


def select(strategy: AdapterStrategy, checkpoints: Checkpoints, state: ServerState) -> ServerState:
    """Return the state to finalize: that of the last round or, with ``server.keep = "best"``, of the best one."""
    if not strategy.settings.validates:
        return state
    kept, number = state, state.round
    if strategy.settings.keep == "best" and state.best:
        try:
            chosen = checkpoints.read(state.best.round)
            kept = dataclasses.replace(state, adapters=chosen.adapters, admitted=chosen.admitted)
            number = state.best.round
        except StateError as error:
            logger.error("The last round is kept, because the best one cannot be read: %s", error)
    early = state.round < strategy.recipe.rounds
    strategy.recorder.emit("selected", round=state.round, kept=number, early=early)
    return kept
