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

from ..common import messages
from ..common.errors import QuorumError, RefusedError
from ..common.files import ArrayFile, save_arrays
from ..common.protocol import Description, Order, Reply, hash_layout
from ..common.seeds import seed_from
from ..common.settings import Recipe, to_json
from . import aggregation
from .admission import PINNED, admit_reply
from .aggregation import Weighed
from .asking import Asker, Patience
from .checkpoint import State
from .chronicle import Chronicle
from .conduct import Conduct, Member, Stopped
from .events import EventLog
from .members import Members
from .roll import Inquiry, Roll, wait_for_nodes

INTERVAL = 0.25  # seconds between two questions to a SuperLink whether answers have come


@dataclass(frozen=True)
class Asked:
    """One order under way to a site."""

    order: Order
    message: Callable[[], Message]


class AdapterStrategy:
    """Samples, orders, admits and folds by one recipe. ``roster`` fixes names and order of the sites."""

    def __init__(
        self, recipe: Recipe, roster: tuple[Member, ...], events: EventLog, spool: Path, conduct: Conduct | None = None
    ) -> None:
        self.recipe, self.roster, self.events, self.spool = recipe, roster, events, spool
        self.conduct, self.chronicle = conduct or Conduct(), Chronicle(events)
        self.row, self.settings = recipe.row(), recipe.server
        self.plan = to_json(recipe.plan)
        self.layout: dict[str, tuple[int, ...]] = {}

    def join(self, grid: Grid, state: State | None, first: Callable[[int], dict[str, np.ndarray]]) -> State:
        """Meets the sites, refuses those that do not fit, and returns the state to go on from.

        ``first`` makes S_0 from the number of classes (for a shared head). Raises QuorumError, Stopped.
        """
        names, attempts, enduring = [m.site for m in self.roster], self.settings.attempts, self.conduct.enduring
        inquiry = Inquiry(lambda node: messages.join_message(self.recipe.name, self.plan, node), attempts)
        memory = self.spool.with_name("roll.json") if enduring else None
        moving = state is None and self.recipe.transfer.of is not None  # a site has its texts when it is met
        roll = Roll(grid, names, inquiry, memory, self._tell_met if moving else None)
        self.members = Members(roll, names, self.chronicle, self.conduct)
        patience = Patience(self.settings.timeout, attempts, enduring, INTERVAL if enduring else 0.05)
        self.asker = Asker(grid, roll, patience, self._tell_late)
        quorum = self.settings.quorum or len(names) // 2 + 1
        if moving:
            self.chronicle.tell("moving", of=self.recipe.transfer.of, sites=names)
        if not enduring:
            wait_for_nodes(grid, len(names))
        met = self.members.gather(quorum, self.settings.timeout)
        state = state or State(0, first(max((description.classes for description in met), default=0)))
        self.layout = {key: tuple(array.shape) for key, array in state.shared.items()}
        pins = dict(state.pins) or most_common(met)
        self.members.agree(pins, hash_layout(self.layout), quorum, state.round)
        tasks = {present.description.task for present in self.members.sites.values()}
        weights = state.weights or self._weights(mixed=len(tasks) > 1)
        task = state.task or (tasks.pop() if len(tasks) == 1 else "")
        self.chronicle.tell("agreed", weights=weights, pins=pins)
        return dataclasses.replace(state, pins=pins, weights=weights, task=task)

    def _weights(self, *, mixed: bool) -> str:
        if self.conduct.replay:
            return self.conduct.replay.weights
        return self.settings.weights or ("uniform" if mixed else "tokens")

    def insist(self, attempt: Callable[[], State]) -> State:
        """One round, or, where that is the conduct, as many tries as it takes to reach the quorum. Raises Stopped."""
        while True:
            try:
                return attempt()
            except QuorumError as error:
                if not self.conduct.enduring:
                    raise
                self.chronicle.tell("waiting", when=error.field, reason=str(error))
                self.chronicle.troubles.clear()
                if self.conduct.stop():
                    raise Stopped from None
                time.sleep(self.settings.retry)

    # --- a round -----------------------------------------------------------------------------------------------

    def configure_train(self, t: int, state: State) -> dict[str, Asked]:
        """The orders of round t, for a seeded sample of the roster, whoever of it happens to be there."""
        self.members.meet(t)
        chosen = self._chosen(t)
        every = self.recipe.evaluation.every
        evaluate = bool(every) and (t == 1 or (t - 1) % every == 0)
        self.chronicle.tell("round_started", round=t, sites=chosen)
        return self._orders([site for site in chosen if self.members.trains(site)], state, t, "train", evaluate)

    def _chosen(self, t: int) -> list[str]:
        if self.conduct.replay:
            return [member.site for member in self.roster if member.site in self.conduct.replay.admitted.get(t, ())]
        eligible = [m.site for m in self.roster if m.from_round <= t]
        return sample(eligible, self.settings.fraction, seed_from(self.recipe.seed, self.recipe.name, "sample", t))

    def aggregate_train(self, t: int, state: State, asked: Mapping[str, Asked]) -> State:
        """S_t from the admitted replies, which wait on disk and are folded in roster order. Raises QuorumError."""
        started = time.monotonic()
        shutil.rmtree(self.spool, ignore_errors=True)
        weights: dict[str, float] = {}
        quorum = self.settings.quorum or len(asked) // 2 + 1
        for site, reply in self._admitted(asked, t, lambda: len(weights) >= quorum):
            weights[site] = aggregation.WEIGHTS[state.weights](reply.terms, reply.examples)
            save_arrays(self.spool / f"{site}.safetensors", dict(reply.shared), {}, lasting=False)
        self.chronicle.need(quorum, list(weights), f"round {t}")
        order = [site for site in asked if site in weights]
        mean = aggregation.weighted_mean(self._spooled(order, weights))
        shared, memory = aggregation.apply_rule(dict(state.shared), mean, dict(state.memory), self.settings, t)
        residual = None
        if self.row.averages_products:
            residual = aggregation.product_residual(list(self._spooled(order, weights)), mean)
        shutil.rmtree(self.spool, ignore_errors=True)
        seconds = time.monotonic() - started
        self.chronicle.tell("round", round=t, admitted=order, weights=weights, residual=residual, seconds=seconds)
        return dataclasses.replace(
            state,
            round=t,
            shared=shared,
            memory=memory,
            admitted={**state.admitted, **dict.fromkeys(order, t)},
        )

    def _spooled(self, order: list[str], weights: Mapping[str, float]) -> Iterator[Weighed]:
        for site in order:
            yield Weighed(weights[site], ArrayFile(self.spool / f"{site}.safetensors"))

    # --- the end -----------------------------------------------------------------------------------------------

    def configure_close(self, state: State) -> dict[str, Asked]:
        """The closing orders: final personalisation and metrics, no arrays back."""
        self.members.meet(state.round)
        replay = self.conduct.replay
        closing = [m.site for m in self.roster if not replay or m.site in replay.admitted.get(state.round + 1, ())]
        here = [site for site in closing if site in self.members.sites]
        self.chronicle.tell("closing", round=state.round, sites=here, prepares=self.recipe.transfer.prepare)
        return self._orders(here, state, state.round + 1, "close", True)

    def aggregate_close(self, state: State, asked: Mapping[str, Asked]) -> State:
        """The closed state: the adapter of the last round, and who personalised on it."""
        closed: dict[str, Reply] = {}
        quorum = self.settings.quorum or len(asked) // 2 + 1
        for site, reply in self._admitted(asked, state.round + 1, lambda: len(closed) >= quorum):
            closed[site] = reply
        self.chronicle.need(quorum, list(closed), "close")
        self.chronicle.tell("closed", round=state.round, sites=list(closed))
        admitted = {**state.admitted, **dict.fromkeys(closed, state.round + 1)}
        return dataclasses.replace(state, admitted=admitted, closed=True)

    # --- between ------------------------------------------------------------------------------------------------

    def _orders(self, sites: list[str], state: State, t: int, phase: str, evaluate: bool) -> dict[str, Asked]:
        packed, asked = messages.pack_arrays(state.shared), {}
        for site in sites:
            admitted = state.admitted.get(site, 0)
            order = Order(self.recipe.name, t, phase, admitted, self.plan, state.shared, evaluate)  # type: ignore[arg-type]
            asked[site] = Asked(
                order, lambda o=order, s=site: messages.order_message(o, packed, self.members.roll.met[s].node)
            )
        return asked

    def _admitted(self, asked: Mapping[str, Asked], t: int, enough: Callable[[], bool]) -> Iterator[tuple[str, Reply]]:
        """Admitted replies as they come; failures, refusals and silence are told and left out."""
        down = {site: messages.size(a.message()) for site, a in asked.items()}
        silent = set(asked)
        self.asked_in = t
        for site, message in self.asker.ask({site: a.message for site, a in asked.items()}, enough):
            silent.discard(site)
            self.members.judge(t)
            if message.has_error():
                self.chronicle.failed(t, site, message.error.reason)
                continue
            if site not in self.members.sites:  # it came back as another one
                continue
            order = asked[site].order
            try:
                reply = messages.reply_of(message)
                layout = self.layout if order.phase == "train" else {}
                admit_reply(reply, site, order, layout, self.settings.max_update_norm)
            except RefusedError as error:
                self.chronicle.refused(t, error.at(site))
                continue
            told = {
                "phase": order.phase,
                "metrics": dict(reply.metrics),
                "terms": reply.terms,
                "fresh": reply.fresh,
            }
            size = {"bytes_down": down[site], "bytes_up": messages.size(message), "seconds": reply.seconds}
            self.chronicle.tell("reply", round=t, site=site, **told, **size)
            yield site, reply
        for site in [s for s in asked if s in silent]:
            limit = self.settings.timeout
            self.chronicle.failed(t, site, f"no answer within {limit:g} s" if limit else "not there")

    def _tell_met(self, site: str) -> None:
        self.chronicle.tell("met", site=site)

    def _tell_late(self, site: str) -> None:
        self.chronicle.tell(
            "late", round=self.asked_in, site=site, reason="answered after its round had ended: ignored"
        )


def most_common(descriptions: list[Description]) -> dict[str, str]:
    """The fingerprints that most sites have; of equally many, those of the earlier site in the roster."""
    prints = [tuple(getattr(description, name) for name in PINNED) for description in descriptions]
    return dict(zip(PINNED, max(prints, key=prints.count), strict=True)) if prints else {}


def sample(sites: list[str], fraction: float, seed: int) -> list[str]:
    """A seeded sample of the sites, at least one, in their own order."""
    count = max(1, round(fraction * len(sites))) if sites else 0
    chosen = set(np.random.default_rng(seed).permutation(len(sites))[:count].tolist())
    return [site for i, site in enumerate(sites) if i in chosen]
