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
from ..common.errors import ColoraError, QuorumError, RefusedError
from ..common.files import ArrayFile, save_arrays
from ..common.protocol import Description, Order, Reply, hash_layout
from ..common.seeds import seed_from
from ..common.settings import Recipe, to_json
from . import aggregation
from .admission import PINNED, admit_reply, admit_site
from .aggregation import Weighed
from .asking import Patience, ask
from .checkpoint import State
from .events import EventLog


@dataclass(frozen=True)
class Member:
    """A site of the roster: its name and the first round that asks it."""

    site: str
    from_round: int = 1


@dataclass(frozen=True)
class Asked:
    """One order under way to a site."""

    order: Order
    message: Callable[[], Message]


class AdapterStrategy:
    """Samples, orders, admits and folds by one recipe. ``roster`` fixes names and order of the sites."""

    def __init__(self, recipe: Recipe, roster: tuple[Member, ...], events: EventLog, spool: Path) -> None:
        self.recipe, self.roster, self.events, self.spool = recipe, roster, events, spool
        self.row, self.settings = recipe.method.row(), recipe.server
        self.plan = to_json(recipe.plan)
        self.sites: dict[str, tuple[int, Description]] = {}
        self.layout: dict[str, tuple[int, ...]] = {}
        self.troubles: list[str] = []  # of the round under way

    # --- joining -----------------------------------------------------------------------------------------------

    def join(self, grid: Grid, state: State | None, first: Callable[[int], dict[str, np.ndarray]]) -> State:
        """Meets every site, refuses those that do not fit, and returns the state to go on from.

        ``first`` makes S_0 from the number of classes (for a shared head). Raises QuorumError.
        """
        met = self._meet(grid)
        state = state or State(0, first(max((d.classes for _, d in met.values()), default=0)))
        self.layout = {key: tuple(array.shape) for key, array in state.shared.items()}
        pins = dict(state.pins) or most_common([description for _, description in met.values()])
        for site, (node, description) in met.items():
            try:
                admit_site(description, {**pins, "layout": hash_layout(self.layout)})
            except RefusedError as error:
                self._refuse(state.round, error)
                continue
            self.sites[site] = node, description
            told = dataclasses.asdict(description)
            self.events.emit(
                "joined", **{k: told[k] for k in ("site", "task", "train", "test", "truncated", "dropped")}
            )
        self._need(self.settings.quorum or len(self.roster) // 2 + 1, list(self.sites), "join")
        mixed = len({description.task for _, description in self.sites.values()}) > 1
        weights = state.weights or self.settings.weights or ("uniform" if mixed else "tokens")
        return dataclasses.replace(state, pins=pins, weights=weights)

    def _meet(self, grid: Grid) -> dict[str, tuple[int, Description]]:
        """Descriptions by name in roster order; a site that comes twice is the same as once."""
        nodes = {str(node): node for node in wait_for_nodes(grid, len(self.roster))}
        questions = {
            name: (lambda node=node: messages.join_message(self.recipe.name, self.plan, node))
            for name, node in nodes.items()
        }
        found: dict[str, tuple[int, Description]] = {}
        names = {member.site for member in self.roster}
        for name, message in ask(grid, questions, self._patience()):
            if message.has_error():
                self._fail(0, f"node {name}", message.error.reason)
                continue
            try:
                description = messages.description_of(message)
            except RefusedError as error:
                self._refuse(0, error.at(f"node {name}"))
                continue
            if description.site in names:
                found[description.site] = nodes[name], description
            else:
                self._refuse(0, RefusedError("site", "a name of the roster", description.site))
        return {member.site: found[member.site] for member in self.roster if member.site in found}

    # --- a round -----------------------------------------------------------------------------------------------

    def configure_train(self, t: int, state: State) -> dict[str, Asked]:
        """The orders of round t, for a seeded sample of the roster, whoever of it happens to be there."""
        eligible = [m.site for m in self.roster if m.from_round <= t]
        chosen = sample(eligible, self.settings.fraction, seed_from(self.recipe.seed, self.recipe.name, "sample", t))
        every = self.recipe.evaluation.every
        evaluate = bool(every) and (t == 1 or (t - 1) % every == 0)
        self.events.emit("round_started", round=t, sites=chosen)
        return self._orders([site for site in chosen if site in self.sites], state, t, "train", evaluate)

    def aggregate_train(self, t: int, state: State, asked: Mapping[str, Asked], grid: Grid) -> State:
        """S_t from the admitted replies, which wait on disk and are folded in roster order. Raises QuorumError."""
        started = time.monotonic()
        shutil.rmtree(self.spool, ignore_errors=True)
        weights: dict[str, float] = {}
        for site, reply in self._admitted(grid, asked, t):
            weights[site] = aggregation.WEIGHTS[state.weights](reply.terms, reply.examples)
            save_arrays(self.spool / f"{site}.safetensors", dict(reply.shared), {}, lasting=False)
        self._need(self.settings.quorum or len(asked) // 2 + 1, list(weights), f"round {t}")
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
        return self._orders(list(self.sites), state, state.round + 1, "close", True)

    def aggregate_close(self, state: State, asked: Mapping[str, Asked], grid: Grid) -> State:
        """The closed state: the adapter of the last round, and who personalised on it."""
        closed = dict(self._admitted(grid, asked, state.round + 1))
        self._need(self.settings.quorum or len(asked) // 2 + 1, list(closed), "close")
        self.events.emit("closed", round=state.round, sites=list(closed))
        admitted = {**state.admitted, **dict.fromkeys(closed, state.round + 1)}
        return dataclasses.replace(state, admitted=admitted, closed=True)

    # --- between ------------------------------------------------------------------------------------------------

    def _orders(self, sites: list[str], state: State, t: int, phase: str, evaluate: bool) -> dict[str, Asked]:
        packed, asked = messages.pack_arrays(state.shared), {}
        for site in sites:
            admitted = state.admitted.get(site, 0)
            order = Order(self.recipe.name, t, phase, admitted, self.plan, state.shared, evaluate)  # type: ignore[arg-type]
            node = self.sites[site][0]
            asked[site] = Asked(order, lambda o=order, n=node: messages.order_message(o, packed, n))
        return asked

    def _admitted(self, grid: Grid, asked: Mapping[str, Asked], t: int) -> Iterator[tuple[str, Reply]]:
        """Admitted replies as they come; failures, refusals and silence are told and left out."""
        down = {site: messages.size(a.message()) for site, a in asked.items()}
        silent = set(asked)
        for site, message in ask(grid, {site: a.message for site, a in asked.items()}, self._patience()):
            silent.discard(site)
            if message.has_error():
                self._fail(t, site, message.error.reason)
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
            self._fail(t, site, f"no answer within {self.settings.timeout:g} s")

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

    def _patience(self) -> Patience:
        return Patience(self.settings.timeout, self.settings.attempts)


def wait_for_nodes(grid: Grid, wanted: int, patience: float = 60.0, pause: float = 0.5) -> list[int]:
    """Node ids once ``wanted`` are there, or once some are there and no more came within a ``pause`` (seconds).

    Flower's simulation runtime starts the ServerApp before it has registered its nodes.
    """
    ends, before = time.monotonic() + patience, -1
    while len(nodes := list(grid.get_node_ids())) < wanted and time.monotonic() < ends:
        if nodes and len(nodes) == before:
            break
        before = len(nodes)
        time.sleep(pause)
    return nodes


def most_common(descriptions: list[Description]) -> dict[str, str]:
    """The fingerprints that most sites have; of equally many, those of the earlier site in the roster."""
    prints = [tuple(getattr(description, name) for name in PINNED) for description in descriptions]
    return dict(zip(PINNED, max(prints, key=prints.count), strict=True)) if prints else {}


def sample(sites: list[str], fraction: float, seed: int) -> list[str]:
    """A seeded sample of the sites, at least one, in their own order."""
    count = max(1, round(fraction * len(sites))) if sites else 0
    chosen = set(np.random.default_rng(seed).permutation(len(sites))[:count].tolist())
    return [site for i, site in enumerate(sites) if i in chosen]
