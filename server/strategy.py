"""Flower's verbs for one shared adapter: join, configure, aggregate, close. No arithmetic and no model code.

It is no subclass of Flower's ``Strategy``: that class's ``start`` sends two messages a round, begins at round 1
and cannot go on from a checkpoint. The loop is in ``app.py``.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from ..common import messages
from ..common.errors import ColoraError, QuorumError, RefusedError
from ..common.files import ArrayFile, save_arrays
from ..common.protocol import Description, Order, Reply, hash_layout
from ..common.seeds import seed_from
from ..common.settings import Recipe, to_json
from . import aggregation
from .admission import PINNED, admit_reply, admit_site
from .aggregation import Weighed
from .asking import Asker, Patience
from .checkpoint import State
from .events import EventLog
from .roll import Present, Roll, wait_for_nodes

INTERVAL = 0.25  # seconds between two questions to a SuperLink whether answers have come
GRACE = 30.0  # seconds for sites that are here to introduce themselves once there is a quorum without them


@dataclass(frozen=True)
class Member:
    """A site of the roster: its name and the first round that asks it."""

    site: str
    from_round: int = 1


@dataclass(frozen=True)
class Replay:
    """What a federation's log says of who counted: ``admitted`` sites by round (the close is the last round + 1).

    A run in which only those are asked comes to the same bits.
    """

    admitted: Mapping[int, Sequence[str]]
    weights: str


@dataclass(frozen=True)
class Conduct:
    """How a federation is led.

    ``enduring``: with sites in processes of their own; too few of them are waited for, and what fails is tried again.
    ``stop`` is asked between rounds.
    """

    enduring: bool = False
    stop: Callable[[], bool] = lambda: False
    replay: Replay | None = None


class Stopped(Exception):
    """Somebody asked the federation to stop while it waited."""


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
        self.conduct = conduct or Conduct()
        self.row, self.settings = recipe.method.row(), recipe.server
        self.plan = to_json(recipe.plan)
        self.sites: dict[str, Present] = {}  # admitted ones
        self.judged: dict[str, Present] = {}
        self.missing: list[str] | None = None
        self.pins: dict[str, str] = {}
        self.layout: dict[str, tuple[int, ...]] = {}
        self.troubles: list[str] = []  # of the round under way

    # --- joining -----------------------------------------------------------------------------------------------

    def join(self, grid: Grid, state: State | None, first: Callable[[int], dict[str, np.ndarray]]) -> State:
        """Meets the sites, refuses those that do not fit, and returns the state to go on from.

        ``first`` makes S_0 from the number of classes (for a shared head). Raises QuorumError.
        """
        names = [member.site for member in self.roster]
        self.roll = Roll(
            grid, names, lambda node: messages.join_message(self.recipe.name, self.plan, node), self.settings.attempts
        )
        enduring = self.conduct.enduring
        patience = Patience(self.settings.timeout, self.settings.attempts, enduring, INTERVAL if enduring else 0.05)
        self.asker = Asker(grid, self.roll, patience, self._tell_late)
        quorum = self.settings.quorum or len(self.roster) // 2 + 1
        self._gather(grid, quorum)
        met = [self.roll.met[name].description for name in names if name in self.roll.met]
        state = state or State(0, first(max((description.classes for description in met), default=0)))
        self.layout = {key: tuple(array.shape) for key, array in state.shared.items()}
        self.pins = dict(state.pins) or most_common(met)
        self.meet(state.round)
        while len(self.sites) < quorum and self.conduct.enduring:
            self._wait("join", quorum, list(self.sites))
            self.meet(state.round)
        self._need(quorum, list(self.sites), "join")
        weights = state.weights or self._weights()
        self.events.emit("agreed", weights=weights, pins=self.pins)
        return dataclasses.replace(state, pins=self.pins, weights=weights)

    def _weights(self) -> str:
        if self.conduct.replay:
            return self.conduct.replay.weights
        mixed = len({present.description.task for present in self.sites.values()}) > 1
        return self.settings.weights or ("uniform" if mixed else "tokens")

    def _gather(self, grid: Grid, quorum: int) -> None:
        """Until enough sites have introduced themselves and nobody who is here is still asked."""
        enduring, began = self.conduct.enduring, time.monotonic()
        limit = GRACE if enduring else self.settings.timeout or float("inf")
        if not enduring:
            wait_for_nodes(grid, len(self.roster))
        self.roll.look()
        while enduring and len(self.roll.met) < quorum:
            self._tell_roll(0)
            self._wait("join", quorum, list(self.roll.met))
            self.roll.look()
        while self.roll.asking and time.monotonic() < began + limit:
            time.sleep(0.1)
            self.roll.look()

    def meet(self, t: int) -> None:
        """Takes in the sites that came, or came back, since; waits for none."""
        self.roll.look()
        self._judge(t)

    def _judge(self, t: int) -> None:
        """Admits to the federation who fits it, and tells who does not."""
        self._tell_roll(t)
        for member in self.roster:
            present = self.roll.met.get(member.site)
            if present is None or present is self.judged.get(member.site):
                continue
            self.judged[member.site] = present
            self.sites.pop(member.site, None)
            try:
                admit_site(present.description, {**self.pins, "layout": hash_layout(self.layout)})
            except RefusedError as error:
                self._refuse(t, error)
                continue
            self.sites[member.site] = present
            told = dataclasses.asdict(present.description)
            self.events.emit(
                "joined", **{k: told[k] for k in ("site", "task", "train", "test", "truncated", "dropped")}
            )

    def _tell_roll(self, t: int) -> None:
        for name, reason in self.roll.failures:
            self._fail(t, name, reason)
        for error in self.roll.refusals:
            self._refuse(t, error)
        self.roll.failures.clear()
        self.roll.refusals.clear()

    def _wait(self, when: str, quorum: int, present: list[str]) -> None:
        """A second of patience, told once for each set of missing sites. Raises Stopped."""
        if self.conduct.stop():
            raise Stopped
        missing = [member.site for member in self.roster if member.site not in present]
        if self.missing != missing:
            self.missing = missing
            self.events.emit("waiting", when=when, quorum=quorum, present=present, missing=missing)
        time.sleep(1.0)

    def insist(self, attempt: Callable[[], State]) -> State:
        """One round, or, where that is the conduct, as many tries as it takes to reach the quorum. Raises Stopped."""
        while True:
            try:
                return attempt()
            except QuorumError as error:
                if not self.conduct.enduring:
                    raise
                self.events.emit("waiting", when=error.field, reason=str(error))
                self.troubles.clear()
                if self.conduct.stop():
                    raise Stopped from None
                time.sleep(self.settings.retry)

    # --- a round -----------------------------------------------------------------------------------------------

    def configure_train(self, t: int, state: State) -> dict[str, Asked]:
        """The orders of round t, for a seeded sample of the roster, whoever of it happens to be there."""
        self.meet(t)
        chosen = self._chosen(t)
        every = self.recipe.evaluation.every
        evaluate = bool(every) and (t == 1 or (t - 1) % every == 0)
        self.events.emit("round_started", round=t, sites=chosen)
        return self._orders([site for site in chosen if site in self.sites], state, t, "train", evaluate)

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
        self._need(quorum, list(weights), f"round {t}")
        order = [site for site in asked if site in weights]
        mean = aggregation.weighted_mean(self._spooled(order, weights))
        shared, memory = aggregation.apply_rule(dict(state.shared), mean, dict(state.memory), self.settings, t)
        residual = None
        if self.row.averages_products:
            residual = aggregation.product_residual(list(self._spooled(order, weights)), mean)
        shutil.rmtree(self.spool, ignore_errors=True)
        seconds = time.monotonic() - started
        self.events.emit("round", round=t, admitted=order, weights=weights, residual=residual, seconds=seconds)
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
        self.meet(state.round)
        replay = self.conduct.replay
        closing = [m.site for m in self.roster if not replay or m.site in replay.admitted.get(state.round + 1, ())]
        return self._orders([site for site in closing if site in self.sites], state, state.round + 1, "close", True)

    def aggregate_close(self, state: State, asked: Mapping[str, Asked]) -> State:
        """The closed state: the adapter of the last round, and who personalised on it."""
        closed: dict[str, Reply] = {}
        quorum = self.settings.quorum or len(asked) // 2 + 1
        for site, reply in self._admitted(asked, state.round + 1, lambda: len(closed) >= quorum):
            closed[site] = reply
        self._need(quorum, list(closed), "close")
        self.events.emit("closed", round=state.round, sites=list(closed))
        admitted = {**state.admitted, **dict.fromkeys(closed, state.round + 1)}
        return dataclasses.replace(state, admitted=admitted, closed=True)

    # --- between ------------------------------------------------------------------------------------------------

    def _orders(self, sites: list[str], state: State, t: int, phase: str, evaluate: bool) -> dict[str, Asked]:
        packed, asked = messages.pack_arrays(state.shared), {}
        for site in sites:
            admitted = state.admitted.get(site, 0)
            order = Order(self.recipe.name, t, phase, admitted, self.plan, state.shared, evaluate)  # type: ignore[arg-type]
            asked[site] = Asked(order, lambda o=order, s=site: messages.order_message(o, packed, self.roll.met[s].node))
        return asked

    def _admitted(self, asked: Mapping[str, Asked], t: int, enough: Callable[[], bool]) -> Iterator[tuple[str, Reply]]:
        """Admitted replies as they come; failures, refusals and silence are told and left out."""
        down = {site: messages.size(a.message()) for site, a in asked.items()}
        silent = set(asked)
        self.asked_in = t
        for site, message in self.asker.ask({site: a.message for site, a in asked.items()}, enough):
            silent.discard(site)
            self._judge(t)
            if message.has_error():
                self._fail(t, site, message.error.reason)
                continue
            if site not in self.sites:  # it came back as another one
                continue
            order = asked[site].order
            try:
                reply = messages.reply_of(message)
                layout = self.layout if order.phase == "train" else {}
                admit_reply(reply, site, order, layout, self.settings.max_update_norm)
            except RefusedError as error:
                self._refuse(t, error.at(site))
                continue
            told = {
                "phase": order.phase,
                "metrics": dict(reply.metrics),
                "terms": reply.terms,
                "fresh": reply.fresh,
            }
            size = {"bytes_down": down[site], "bytes_up": messages.size(message), "seconds": reply.seconds}
            self.events.emit("reply", round=t, site=site, **told, **size)
            yield site, reply
        for site in [s for s in asked if s in silent]:
            limit = self.settings.timeout
            self._fail(t, site, f"no answer within {limit:g} s" if limit else "not there")

    def _tell_late(self, site: str) -> None:
        self.events.emit("late", round=self.asked_in, site=site, reason="answered after its round had ended: ignored")

    def _fail(self, t: int, site: str, reason: str | None) -> None:
        self.troubles.append(f"{site}: {reason}")
        self.events.emit("failed", round=t, site=site, reason=reason)

    def _refuse(self, t: int, error: ColoraError) -> None:
        self.troubles.append(str(error))
        about = {key: getattr(error, key) for key in ("site", "field", "expected", "found")}
        self.events.emit("refused", round=t, **about, reason=str(error))

    def _need(self, quorum: int, present: list[str], when: str) -> None:
        """Raises QuorumError with the first reason where too few sites are present."""
        if len(present) < quorum:
            why = f"; first trouble: {self.troubles[0]}" if self.troubles else ""
            where = f"see events.jsonl and log.txt in {self.spool.parent}"
            found = f"{len(present)} ({', '.join(present) or 'none'}){why}; {where}"
            raise QuorumError(f"server.quorum at {when}", f"at least {quorum} sites", found)
        self.troubles.clear()


def most_common(descriptions: list[Description]) -> dict[str, str]:
    """The fingerprints that most sites have; of equally many, those of the earlier site in the roster."""
    prints = [tuple(getattr(description, name) for name in PINNED) for description in descriptions]
    return dict(zip(PINNED, max(prints, key=prints.count), strict=True)) if prints else {}


def sample(sites: list[str], fraction: float, seed: int) -> list[str]:
    """A seeded sample of the sites, at least one, in their own order."""
    count = max(1, round(fraction * len(sites))) if sites else 0
    chosen = set(np.random.default_rng(seed).permutation(len(sites))[:count].tolist())
    return [site for i, site in enumerate(sites) if i in chosen]
