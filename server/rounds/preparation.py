"""What a federation does before round 1: divide the sites into groups, or make the spectral start."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping

from ...common.atomic_io import ArrayFile
from ...common.protocol.codec import as_received
from ...common.protocol.types import RequestKind
from ...common.seeds import seed_from
from . import aggregation
from .checkpoint import ServerState
from .grouping import find_groups, update_cosines
from .shared_adapter import SharedAdapter
from .spectral import POWER_ITERATIONS, orthonormalize
from .strategy import AdapterStrategy, PendingRequest


def is_needed(strategy: AdapterStrategy) -> bool:
    """Whether the recipe asks for something before round 1."""
    return strategy.spectral or (strategy.settings.groups != "none" and strategy.method.shares)


def prepare(strategy: AdapterStrategy, state: ServerState) -> ServerState:
    """Return S_0 with the spectral start or with groups of sites, as the recipe says."""
    return start_spectrally(strategy, state) if strategy.spectral else form_groups(strategy, state)


def form_groups(strategy: AdapterStrategy, state: ServerState) -> ServerState:
    """Return the state in which each group of sites has a copy of S_0. A replay takes the groups of its run."""
    if strategy.options.replay:
        return state.divided(strategy.options.replay.groups)
    return strategy.retry_until_quorum(lambda: aggregate_trial(strategy, state, configure(strategy, state, "trial")))


def aggregate_trial(strategy: AdapterStrategy, state: ServerState, asked: Mapping[str, PendingRequest]) -> ServerState:
    """Compare the updates of the admitted replies, and return the state with the groups. Raises QuorumError."""
    sites = list(strategy.collect(asked, 0, "trial"))
    cosines = update_cosines([ArrayFile(strategy.spool / f"{site}.safetensors") for site in sites], state.shared)
    shutil.rmtree(strategy.spool, ignore_errors=True)
    grouping = find_groups(sites, cosines, seed_from(strategy.recipe.seed, strategy.recipe.name, "groups"))
    strategy.recorder.emit("grouped", **grouping.fields(sites, cosines))
    return state.divided(grouping.groups)


def start_spectrally(strategy: AdapterStrategy, state: ServerState) -> ServerState:
    """Return the state whose A and B are the subspaces that the sites' gradients have in common."""
    for _ in range(POWER_ITERATIONS):
        state = strategy.retry_until_quorum(
            lambda s=state: aggregate_initialize(strategy, s, configure(strategy, s, "initialize"))
        )
    sites = [member.site for member in strategy.roster if member.site in strategy.membership.sites]
    strategy.recorder.emit("initialized", sites=sites)
    return state


def aggregate_initialize(
    strategy: AdapterStrategy, state: ServerState, asked: Mapping[str, PendingRequest]
) -> ServerState:
    """Return the state with the next orthonormal A and B. Raises QuorumError."""
    order = list(strategy.collect(asked, 0, "initialize"))
    total = aggregation.weighted_mean(strategy.spooled(dict.fromkeys(order, 1.0), dict.fromkeys(order), state.shared))
    shutil.rmtree(strategy.spool, ignore_errors=True)
    shared = as_received(strategy.codec, orthonormalize(total))
    return dataclasses.replace(state, adapters=(SharedAdapter(shared),))


def configure(strategy: AdapterStrategy, state: ServerState, kind: RequestKind) -> dict[str, PendingRequest]:
    """Make the requests of a step before round 1: to all sites of the first round that are connected.

    A trial compares updates, so sites with adapters of a smaller rank have no part in it unless all have.
    """
    strategy.membership.update(0)
    first = [m.site for m in strategy.roster if m.from_round == 1 and strategy.membership.can_train(m.site)]
    if kind == "trial":
        first = [site for site in first if not strategy.membership.sites[site].info.rank] or first
    return strategy.requests(first, state, 0, kind, False)
