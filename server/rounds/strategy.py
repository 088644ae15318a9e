"""Flower's verbs for one shared adapter: join, configure, aggregate, close. No arithmetic and no model code.

It is no subclass of Flower's ``Strategy``: that class's ``start`` sends two messages a round, begins at round 1
and cannot go on from a checkpoint. The loop is in ``app.py``.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from ...common.atomic_io import ArrayFile, save_arrays
from ...common.config.schema import Recipe, to_json
from ...common.errors import QuorumError, RefusedError
from ...common.protocol import flower_messages as messages
from ...common.protocol.types import SiteInfo, TrainReply, TrainRequest, hash_layout
from ...common.seeds import seed_from
from ..reporting.events import EventLog, EventRecorder
from . import aggregation
from .admission import PINNED, admit_reply
from .aggregation import WeightedUpdate
from .checkpoint import ServerState
from .dispatch import Dispatcher, RetryPolicy
from .membership import Membership
from .registry import JoinQuery, NodeRegistry, wait_for_nodes
from .run_options import RosterEntry, RunOptions, StopRequested

INTERVAL = 0.25  # seconds between two questions to a SuperLink whether answers have come


@dataclass(frozen=True)
class PendingRequest:
    """One order under way to a site."""

    request: TrainRequest
    message: Callable[[], Message]


class AdapterStrategy:
    """Samples, orders, admits and folds by one recipe. ``roster`` fixes names and order of the sites."""

    def __init__(
        self,
        recipe: Recipe,
        roster: tuple[RosterEntry, ...],
        events: EventLog,
        spool: Path,
        conduct: RunOptions | None = None,
    ) -> None:
        self.recipe, self.roster, self.events, self.spool = recipe, roster, events, spool
        self.options, self.recorder = conduct or RunOptions(), EventRecorder(events)
        self.method, self.settings = recipe.row(), recipe.server
        self.plan = to_json(recipe.plan)
        self.layout: dict[str, tuple[int, ...]] = {}

    def join(self, grid: Grid, state: ServerState | None, first: Callable[[int], dict[str, np.ndarray]]) -> ServerState:
        """Meets the sites, refuses those that do not fit, and returns the state to go on from.

        ``first`` makes S_0 from the number of classes (for a shared head). Raises QuorumError, Stopped.
        """
        names, attempts, deployed = [m.site for m in self.roster], self.settings.max_attempts, self.options.deployed
        inquiry = JoinQuery(lambda node: messages.join_message(self.recipe.name, self.plan, node), attempts)
        memory = self.spool.with_name("roll.json") if deployed else None
        moving = (
            state is None and self.recipe.transfer.source_federation is not None
        )  # a site has its texts when it is met
        roll = NodeRegistry(grid, names, inquiry, memory, self._tell_met if moving else None)
        self.membership = Membership(roll, names, self.recorder, self.options)
        patience = RetryPolicy(self.settings.timeout, attempts, deployed, INTERVAL if deployed else 0.05)
        self.dispatcher = Dispatcher(grid, roll, patience, self._tell_late)
        quorum = self.settings.quorum or len(names) // 2 + 1
        if moving:
            self.recorder.emit(
                "transfer_started", source_federation=self.recipe.transfer.source_federation, sites=names
            )
        if not deployed:
            wait_for_nodes(grid, len(names))
        met = self.membership.wait_for_quorum(quorum, self.settings.timeout)
        state = state or ServerState(0, first(max((description.classes for description in met), default=0)))
        self.layout = {key: tuple(array.shape) for key, array in state.shared.items()}
        pins = dict(state.pins) or most_common(met)
        self.membership.pin(pins, hash_layout(self.layout), quorum, state.round)
        tasks = {present.info.task for present in self.membership.sites.values()}
        weights = state.weights or self._weights(mixed=len(tasks) > 1)
        task = state.task or (tasks.pop() if len(tasks) == 1 else "")
        self.recorder.emit("agreed", weights=weights, pins=pins)
        return dataclasses.replace(state, pins=pins, weights=weights, task=task)

    def _weights(self, *, mixed: bool) -> str:
        if self.options.replay:
            return self.options.replay.weights
        return self.settings.weights or ("uniform" if mixed else "tokens")

    def retry_until_quorum(self, attempt: Callable[[], ServerState]) -> ServerState:
        """One round, or, where that is the conduct, as many tries as it takes to reach the quorum. Raises Stopped."""
        while True:
            try:
                return attempt()
            except QuorumError as error:
                if not self.options.deployed:
                    raise
                self.recorder.emit("waiting", when=error.field, reason=str(error))
                self.recorder.failures.clear()
                if self.options.should_stop():
                    raise StopRequested from None
                time.sleep(self.settings.retry_interval)

    # --- a round -----------------------------------------------------------------------------------------------

    def configure_train(self, t: int, state: ServerState) -> dict[str, PendingRequest]:
        """The orders of round t, for a seeded sample of the roster, whoever of it happens to be there."""
        self.membership.update(t)
        chosen = self._chosen(t)
        every = self.recipe.evaluation.every
        evaluate = bool(every) and (t == 1 or (t - 1) % every == 0)
        self.recorder.emit("round_started", round=t, sites=chosen)
        return self._requests([site for site in chosen if self.membership.can_train(site)], state, t, "train", evaluate)

    def _chosen(self, t: int) -> list[str]:
        if self.options.replay:
            return [member.site for member in self.roster if member.site in self.options.replay.admitted.get(t, ())]
        eligible = [m.site for m in self.roster if m.from_round <= t]
        return sample(eligible, self.settings.fraction, seed_from(self.recipe.seed, self.recipe.name, "sample", t))

    def aggregate_train(self, t: int, state: ServerState, asked: Mapping[str, PendingRequest]) -> ServerState:
        """S_t from the admitted replies, which wait on disk and are folded in roster order. Raises QuorumError."""
        started = time.monotonic()
        shutil.rmtree(self.spool, ignore_errors=True)
        weights: dict[str, float] = {}
        quorum = self.settings.quorum or len(asked) // 2 + 1
        for site, reply in self._admitted(asked, t, lambda: len(weights) >= quorum):
            weights[site] = aggregation.WEIGHTS[state.weights](reply.terms, reply.examples)
            save_arrays(self.spool / f"{site}.safetensors", dict(reply.shared), {}, lasting=False)
        self.recorder.require_quorum(quorum, list(weights), f"round {t}")
        order = [site for site in asked if site in weights]
        mean = aggregation.weighted_mean(self._spooled(order, weights))
        shared, memory = aggregation.apply_rule(dict(state.shared), mean, dict(state.optimizer_state), self.settings, t)
        residual = None
        if self.method.averages_products:
            residual = aggregation.product_residual(list(self._spooled(order, weights)), mean)
        shutil.rmtree(self.spool, ignore_errors=True)
        seconds = time.monotonic() - started
        self.recorder.emit("round", round=t, admitted=order, weights=weights, residual=residual, seconds=seconds)
        return dataclasses.replace(
            state,
            round=t,
            shared=shared,
            optimizer_state=memory,
            admitted={**state.admitted, **dict.fromkeys(order, t)},
        )

    def _spooled(self, order: list[str], weights: Mapping[str, float]) -> Iterator[WeightedUpdate]:
        for site in order:
            yield WeightedUpdate(weights[site], ArrayFile(self.spool / f"{site}.safetensors"))

    # --- the end -----------------------------------------------------------------------------------------------

    def configure_finalize(self, state: ServerState) -> dict[str, PendingRequest]:
        """The closing orders: final personalisation and metrics, no arrays back."""
        self.membership.update(state.round)
        replay = self.options.replay
        closing = [m.site for m in self.roster if not replay or m.site in replay.admitted.get(state.round + 1, ())]
        here = [site for site in closing if site in self.membership.sites]
        self.recorder.emit("finalizing", round=state.round, sites=here, prepares=self.recipe.transfer.prepare)
        return self._requests(here, state, state.round + 1, "finalize", True)

    def aggregate_finalize(self, state: ServerState, asked: Mapping[str, PendingRequest]) -> ServerState:
        """The closed state: the adapter of the last round, and who personalised on it."""
        closed: dict[str, TrainReply] = {}
        quorum = self.settings.quorum or len(asked) // 2 + 1
        for site, reply in self._admitted(asked, state.round + 1, lambda: len(closed) >= quorum):
            closed[site] = reply
        self.recorder.require_quorum(quorum, list(closed), "finalize")
        self.recorder.emit("finalized", round=state.round, sites=list(closed))
        admitted = {**state.admitted, **dict.fromkeys(closed, state.round + 1)}
        return dataclasses.replace(state, admitted=admitted, finalized=True)

    # --- between ------------------------------------------------------------------------------------------------

    def _requests(
        self, sites: list[str], state: ServerState, t: int, phase: str, evaluate: bool
    ) -> dict[str, PendingRequest]:
        packed, asked = messages.pack_arrays(state.shared), {}
        for site in sites:
            admitted = state.admitted.get(site, 0)
            order = TrainRequest(self.recipe.name, t, phase, admitted, self.plan, state.shared, evaluate)  # type: ignore[arg-type]
            asked[site] = PendingRequest(
                order,
                lambda o=order, s=site: messages.train_message(o, packed, self.membership.registry.connected[s].node),
            )
        return asked

    def _admitted(
        self, asked: Mapping[str, PendingRequest], t: int, enough: Callable[[], bool]
    ) -> Iterator[tuple[str, TrainReply]]:
        """Admitted replies as they come; failures, refusals and silence are told and left out."""
        down = {site: messages.payload_bytes(a.message()) for site, a in asked.items()}
        silent = set(asked)
        self.asked_in = t
        for site, message in self.dispatcher.dispatch({site: a.message for site, a in asked.items()}, enough):
            silent.discard(site)
            self.membership.admit(t)
            if message.has_error():
                self.recorder.failed(t, site, message.error.reason)
                continue
            if site not in self.membership.sites:  # it came back as another one
                continue
            order = asked[site].request
            try:
                reply = messages.reply_from(message)
                layout = self.layout if order.kind == "train" else {}
                admit_reply(reply, site, order, layout, self.settings.max_update_norm)
            except RefusedError as error:
                self.recorder.refused(t, error.at_site(site))
                continue
            told = {
                "kind": order.kind,
                "metrics": dict(reply.metrics),
                "terms": reply.terms,
                "fresh": reply.fresh,
            }
            size = {"bytes_down": down[site], "bytes_up": messages.payload_bytes(message), "seconds": reply.seconds}
            self.recorder.emit("reply", round=t, site=site, **told, **size)
            yield site, reply
        for site in [s for s in asked if s in silent]:
            limit = self.settings.timeout
            self.recorder.failed(t, site, f"no answer within {limit:g} s" if limit else "not there")

    def _tell_met(self, site: str) -> None:
        self.recorder.emit("site_ready", site=site)

    def _tell_late(self, site: str) -> None:
        self.recorder.emit("late", round=self.asked_in, site=site, reason="answered after its round had ended: ignored")


def most_common(descriptions: list[SiteInfo]) -> dict[str, str]:
    """The fingerprints that most sites have; of equally many, those of the earlier site in the roster."""
    prints = [tuple(getattr(description, name) for name in PINNED) for description in descriptions]
    return dict(zip(PINNED, max(prints, key=prints.count), strict=True)) if prints else {}


def sample(sites: list[str], fraction: float, seed: int) -> list[str]:
    """A seeded sample of the sites, at least one, in their own order."""
    count = max(1, round(fraction * len(sites))) if sites else 0
    chosen = set(np.random.default_rng(seed).permutation(len(sites))[:count].tolist())
    return [site for i, site in enumerate(sites) if i in chosen]
