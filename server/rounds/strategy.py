"""The steps of a federation with one shared adapter: join, configure, aggregate, finalize.

Arithmetic is in ``aggregation.py``, the loop over rounds in ``server_app.py``. The class does not derive from Flower's
``Strategy``, whose ``start`` sends two messages per round, begins at round 1 and cannot resume from a checkpoint.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from ...common.atomic_io import ArrayFile, save_arrays
from ...common.config.schema import Recipe, to_json
from ...common.errors import QuorumError, RefusedError
from ...common.event_log import EventLog
from ...common.protocol import flower_messages as messages
from ...common.protocol.broadcast import unchanged
from ...common.protocol.codec import as_received
from ...common.protocol.limits import measured
from ...common.protocol.types import BENEFIT, WITHOUT_ARRAYS, RequestKind, TrainReply, TrainRequest, hash_layout
from ...common.seeds import seed_from
from ..reporting.events import EventRecorder
from .admission import admit_reply, reply_limits
from .aggregation import WeightedUpdate
from .agreement import agree_on_pins, agreed_tasks, has_mixed_tasks, number_of_classes
from .broadcast import Difference, holds_reference
from .checkpoint import ServerState
from .clipping import Clipped, norm_bound
from .dispatch import Dispatcher, RetryPolicy, Silence
from .membership import Membership
from .registry import JoinQuery, NodeRegistry, wait_for_nodes
from .run_options import RosterEntry, RunOptions, StopRequested
from .shared_adapter import ServerStep, SharedAdapter
from .site_privacy import SitePrivacy
from .spectral import orthonormalize
from .weighting import WEIGHTS, Contribution, running_mean

INTERVAL = 0.25  # seconds between two polls of a SuperLink for replies


@dataclass(frozen=True)
class PendingRequest:
    """A request to one site, and how to make a message of it for the node that the site has at that moment."""

    request: TrainRequest
    message: Callable[[], Message]
    as_difference: bool = False  # the message holds a difference to the adapter of the site's last admitted round


class AdmittedReply(NamedTuple):
    """A reply that was admitted, and the norm of its update."""

    reply: TrainReply
    norm: float


class AdapterStrategy:
    """Samples sites, sends requests, admits replies and aggregates them, as one recipe says.

    ``roster`` fixes the names and the order of the sites. Replies wait on disk in ``spool`` until a round ends.
    """

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
        self.plan, self.codec = to_json(recipe.plan), recipe.communication.codec
        self.spectral = recipe.adapter.init == "spectral"
        self.layout: dict[str, tuple[int, ...]] = {}
        private = self.settings.privacy is not None and self.method.shares
        names = [member.site for member in roster]
        self.privacy = SitePrivacy(recipe, names, spool.parent, self.sampled) if private else None
        self.bits = recipe.communication.broadcast_bits
        self._whole: dict[str, int] = {}  # site → the round in which it receives the whole adapter for its request

    def join(self, grid: Grid, state: ServerState | None, first: Callable[[int], dict[str, np.ndarray]]) -> ServerState:
        """Register the sites, refuse those that do not match, and return the state to continue from.

        ``first`` makes S_0 from the number of classes (for a shared head). Raises QuorumError and StopRequested.
        """
        names, attempts, deployed = [m.site for m in self.roster], self.settings.max_attempts, self.options.deployed
        spent = (state.spent if state else None) or (self.privacy.begin() if self.privacy else None)
        inquiry = JoinQuery(lambda node: messages.join_message(self.recipe.name, self.plan, node), attempts)
        folder = self.spool.parent if deployed else None
        transfers = (
            state is None and self.recipe.transfer.source_federation is not None
        )  # sites join once they have their texts
        registry = NodeRegistry(grid, names, inquiry, folder, self._emit_ready if transfers else None)
        self.membership = Membership(registry, self.recipe.train, names, self.recorder, self.options)
        policy = RetryPolicy(self.settings.timeout, attempts, deployed, INTERVAL if deployed else 0.05)
        self.dispatcher = Dispatcher(grid, registry, policy, self._emit_late)
        quorum = self.settings.quorum or len(names) // 2 + 1
        if transfers:
            self.recorder.emit(
                "transfer_started", source_federation=self.recipe.transfer.source_federation, sites=names
            )
        if not deployed:
            wait_for_nodes(grid, len(names))
        joined = self.membership.wait_for_quorum(quorum, self.settings.timeout)
        pins = dict(state.pins if state else {})
        pins = pins or agree_on_pins(self.recipe, joined, self.options.fingerprints(self.recipe))
        if state is None:
            initial = first(number_of_classes(self.recipe, joined, pins))
            initial = orthonormalize(initial) if self.spectral else initial
            difference = Difference(0, unchanged(initial)) if self.bits and initial and not self.spectral else None
            state = ServerState(0, (SharedAdapter(as_received(self.codec, initial), difference=difference),))
        self.layout = {key: tuple(array.shape) for key, array in state.shared.items()}
        self.membership.pin(pins, hash_layout(self.layout), quorum, state.round)
        admitted = [site.info for site in self.membership.sites.values()]
        weights = state.weights or self._weights(mixed=has_mixed_tasks(self.recipe, admitted))
        self.membership.require_tasks(agreed_tasks(self.recipe, weights, admitted, state.task), state.round)
        tasks = {site.info.task for site in self.membership.sites.values()}
        task = state.task or (tasks.pop() if len(tasks) == 1 else "")
        self.recorder.emit("agreed", weights=weights, pins=pins)
        return dataclasses.replace(state, pins=pins, weights=weights, task=task, spent=spent)

    def _weights(self, *, mixed: bool) -> str:
        if self.options.replay:
            return self.options.replay.weights
        return self.settings.weights or ("uniform" if mixed or self.settings.privacy else "tokens")

    def retry_until_quorum(self, attempt: Callable[[], ServerState]) -> ServerState:
        """Run one round; in a deployment, repeat it until the quorum is reached. Raises QuorumError, StopRequested."""
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

    # --- a round ---

    def configure_train(self, t: int, state: ServerState) -> dict[str, PendingRequest]:
        """Make the requests of round t for a seeded sample of the roster, which does not depend on who is connected."""
        self.membership.update(t)
        chosen = self._chosen(t)
        every = self.recipe.evaluation.every
        evaluate = bool(every) and (t == 1 or (t - 1) % every == 0)
        self.recorder.emit("round_started", round=t, sites=chosen)
        return self.requests([site for site in chosen if self.membership.can_train(site)], state, t, "train", evaluate)

    def _chosen(self, t: int) -> list[str]:
        if self.options.replay:
            return [member.site for member in self.roster if member.site in self.options.replay.admitted.get(t, ())]
        return self.sampled(t)

    def sampled(self, t: int) -> list[str]:
        """Return the sites of round t by the recipe and the roster, whoever is connected."""
        eligible = [m.site for m in self.roster if m.from_round <= t]
        return sample(eligible, self.settings.fraction, seed_from(self.recipe.seed, self.recipe.name, "sample", t))

    def aggregate_train(self, t: int, state: ServerState, asked: Mapping[str, PendingRequest]) -> ServerState:
        """Compute S_t from the admitted replies, read from disk in roster order. Raises QuorumError."""
        started = time.monotonic()
        collected = self.collect(asked, t, f"round {t}")
        replies = {
            site: Contribution(found.reply.terms, found.reply.examples, self._benefit(state, site, found.reply))
            for site, found in collected.items()
        }
        order, adapters, weights, residuals = list(replies), list(state.adapters), {}, []
        private = self.privacy.mean_of(t, state.spent) if self.privacy and state.spent else None
        step = ServerStep(t, self.settings, self.codec, self.method.averages_products, self.bits, private)
        for group, members in state.by_group(order).items():
            weigh = WEIGHTS[state.weights]
            weights |= weigh({site: replies[site] for site in members}, (t - 1) / self.recipe.rounds)
            factors = {} if private else self._scale_down(t, {site: collected[site].norm for site in members})
            updates = partial(
                self.spooled, weights, {site: factors.get(site) for site in members}, adapters[group].shared
            )
            result = step(adapters[group], updates)
            adapters[group] = result.adapter
            residuals += [] if result.residual is None else [result.residual]
            for site in (members[i] for i in result.left_out):
                weights[site] = 0.0
                self.recorder.emit("distant", round=t, site=site)
        shutil.rmtree(self.spool, ignore_errors=True)
        spent = state.spent.plus(self.sampled(t)) if state.spent else None
        if self.privacy and private and spent:
            norms = {site: found.norm for site, found in collected.items()}
            self.recorder.emit("noised", round=t, **self.privacy.fields(private, spent, norms))
        seconds, residual = time.monotonic() - started, max(residuals, default=None)
        self.recorder.emit("round", round=t, admitted=order, weights=weights, residual=residual, seconds=seconds)
        return dataclasses.replace(
            state,
            round=t,
            finalized=False,
            adapters=tuple(adapters),
            admitted={**state.admitted, **dict.fromkeys(order, t)},
            benefit={**state.benefit, **{site: replies[site].benefit for site in order}},
            spent=spent,
        )

    def _scale_down(self, t: int, norms: Mapping[str, float]) -> dict[str, float]:
        """Return a factor for each site whose update is much larger than those of the others."""
        bound = norm_bound(norms, self.settings.max_relative_norm)
        factors = {site: bound / norm for site, norm in norms.items() if norm > bound}
        for site in factors:
            self.recorder.emit("clipped", round=t, site=site, norm=norms[site], bound=bound)
        return factors

    def budget_is_spent(self, state: ServerState) -> bool:
        """Whether the recipe has a next round, which would exceed the privacy budget of the sites."""
        if not self.privacy or not state.spent or state.round >= self.recipe.rounds:
            return False
        return self.privacy.is_over(state.spent, state.round + 1)

    def _benefit(self, state: ServerState, site: str, reply: TrainReply) -> float:
        return running_mean(state.benefit.get(site), reply.metrics.get(BENEFIT, 1.0))

    def collect(
        self, asked: Mapping[str, PendingRequest], t: int, when: str, quorum: int | None = None
    ) -> dict[str, AdmittedReply]:
        """Write the arrays of admitted replies to disk, and return the replies without them, in roster order.

        ``quorum`` is that of the recipe by default. Raises QuorumError.
        """
        shutil.rmtree(self.spool, ignore_errors=True)
        quorum, replies = quorum or self.settings.quorum or len(asked) // 2 + 1, {}
        for site, found in self._admitted(asked, t, quorum):
            save_arrays(self.spool / f"{site}.safetensors", dict(found.reply.shared), {}, lasting=False)
            replies[site] = AdmittedReply(dataclasses.replace(found.reply, shared={}), found.norm)
        self.recorder.require_quorum(quorum, list(replies), when)
        return {site: replies[site] for site in asked if site in replies}

    def spooled(
        self, weights: Mapping[str, float], factors: Mapping[str, float | None], start: Mapping[str, np.ndarray]
    ) -> Iterator[WeightedUpdate]:
        """Yield the updates of these sites from disk, in the given order. One with a factor is scaled."""
        for site, factor in factors.items():
            arrays = ArrayFile(self.spool / f"{site}.safetensors")
            yield WeightedUpdate(weights[site], arrays if factor is None else Clipped(arrays, start, factor))

    # --- finalization ---

    def configure_finalize(self, state: ServerState) -> dict[str, PendingRequest]:
        """Make the last requests: final personalization and metrics, without arrays in the reply."""
        self.membership.update(state.round)
        replay = self.options.replay
        chosen = [m.site for m in self.roster if not replay or m.site in replay.admitted.get(state.round + 1, ())]
        connected = [site for site in chosen if site in self.membership.sites]
        self.recorder.emit("finalizing", round=state.round, sites=connected, prepares=self.recipe.transfer.prepare)
        return self.requests(connected, state, state.round + 1, "finalize", True)

    def aggregate_finalize(self, state: ServerState, asked: Mapping[str, PendingRequest]) -> ServerState:
        """Return the final state. ``admitted`` stays: further rounds begin at the states before the final steps."""
        quorum = self.settings.quorum or len(asked) // 2 + 1
        finalized = [site for site, _ in self._admitted(asked, state.round + 1, quorum)]
        self.recorder.require_quorum(quorum, finalized, "finalize")
        self.recorder.emit("finalized", round=state.round, sites=finalized)
        return dataclasses.replace(state, finalized=True)

    # --- requests and replies ---

    def requests(
        self, sites: list[str], state: ServerState, t: int, kind: RequestKind, evaluate: bool, plan: str | None = None
    ) -> dict[str, PendingRequest]:
        """Make a request to each of these sites with the shared adapter of its group.

        ``plan`` is that of the recipe by default.
        """
        asked: dict[str, PendingRequest] = {}
        for group, members in state.by_group(sites).items():
            shared, difference = state.adapters[group].shared, state.adapters[group].difference
            whole = messages.pack_arrays(shared, self.codec)
            packed = messages.pack_difference(difference.data, self.bits) if difference and self.bits else whole
            self.dispatcher.expect_replies(4 * sum(array.nbytes for array in shared.values()))
            for site in members:
                request = TrainRequest(
                    self.recipe.name, t, kind, state.admitted.get(site, 0), plan or self.plan, shared, evaluate
                )
                as_difference = holds_reference(difference, request)
                records = (whole, packed if as_difference else whole)
                asked[site] = PendingRequest(request, partial(self._message, request, records, site), as_difference)
        return {site: asked[site] for site in sites}

    def _message(self, request: TrainRequest, records: tuple[ArrayRecord, ArrayRecord], site: str) -> Message:
        """A message with the second of the records or, to a site that lacks the reference, with the whole adapter."""
        packed = records[0] if self._whole.get(site) == request.round else records[1]
        return messages.train_message(request, packed, self.membership.registry.connected[site].node)

    def _send_whole(self, site: str, asked: PendingRequest) -> bool:
        """Send the whole adapter to a site from now on in this round. Returns False if it was sent already."""
        if not asked.as_difference or self._whole.get(site) == asked.request.round:
            return False
        self._whole[site] = asked.request.round
        return True

    def _admitted(
        self, asked: Mapping[str, PendingRequest], t: int, quorum: int
    ) -> Iterator[tuple[str, AdmittedReply]]:
        """Yield admitted replies as they arrive. Failures, refusals and missing replies are emitted and left out."""
        silent, admitted = set(asked), []
        self.current_round = t
        replies = self.dispatcher.dispatch(
            {site: a.message for site, a in asked.items()},
            lambda: len(admitted) >= quorum,
            lambda silence: self.emit_silence(silence, t, admitted, quorum),
            lambda site: self._send_whole(site, asked[site]),
        )
        for site, message in replies:
            silent.discard(site)
            self.membership.admit(t)
            if message.has_error():
                self.recorder.failed(t, site, message.error.reason)
                continue
            if site not in self.membership.sites:  # it rejoined with other fingerprints
                continue
            request = asked[site].request
            try:
                reply = messages.reply_from(message, request)
                secure = self.recipe.privacy.secure_aggregation
                layout = {} if secure or request.kind in WITHOUT_ARRAYS else self.layout
                limits = reply_limits(self.recipe, self.membership.sites[site].info)
                limits = limits.without_update() if secure else limits
                norm = admit_reply(reply, site, request, layout, limits)
            except RefusedError as error:
                self.recorder.refused(t, error.at_site(site))
                continue
            limit = None if self.options.deployed else self.settings.timeout
            if limit and reply.seconds > limit:
                self.recorder.failed(t, site, f"no reply within {limit:g} s")
                continue
            results = {
                "kind": request.kind,
                "metrics": measured(reply.metrics),
                "terms": reply.terms,
                "fresh": reply.fresh,
            }
            if self.bits:
                results["whole"] = not asked[site].as_difference or self._whole.get(site) == request.round
            costs = {"bytes_down": self.dispatcher.bytes_down[site], "bytes_up": messages.payload_bytes(message)}
            costs |= {"seconds": reply.seconds, "measuring": min(reply.measuring, reply.seconds)}
            self.recorder.emit("reply", round=t, site=site, **results, **costs)
            admitted.append(site)
            yield site, AdmittedReply(reply, norm)
        for site in [s for s in asked if s in silent]:
            limit = self.settings.timeout
            self.recorder.failed(t, site, f"no reply within {limit:g} s" if limit else "not connected", silent=True)

    def emit_silence(self, silence: Silence, t: int, admitted: list[str], quorum: int) -> None:
        """Record who is waited for."""
        who = {"missing": silence.sites, "offline": silence.offline, "present": list(admitted), "quorum": quorum}
        when = f"round {t}" if 1 <= t <= self.recipe.rounds else "finalize" if t else "before round 1"
        self.recorder.emit("waiting", when=when, round=t, **who, seconds=round(silence.seconds))

    def _emit_ready(self, site: str) -> None:
        self.recorder.emit("site_ready", site=site)

    def _emit_late(self, site: str) -> None:
        reason = "replied after its round had ended: ignored"
        self.recorder.emit("late", round=self.current_round, site=site, reason=reason)


def sample(sites: list[str], fraction: float, seed: int) -> list[str]:
    """A seeded sample of at least one site, in the given order."""
    count = max(1, round(fraction * len(sites))) if sites else 0
    chosen = set(np.random.default_rng(seed).permutation(len(sites))[:count].tolist())
    return [site for i, site in enumerate(sites) if i in chosen]
