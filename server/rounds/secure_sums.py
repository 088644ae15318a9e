"""Rounds with secure aggregation: the coordinator opens the weighted sum of the updates, and no single update.

A round has four steps. In ``train`` the sites train and send their metrics. In ``share`` they send the keys of one
attempt and sealed shares of their secrets, in ``mask`` their masked vectors, and in ``open`` the shares by which the
masks of the sum are taken off. A site that fails after ``share`` is left out of the sum. As long as nothing is opened,
a new attempt with other keys can begin. The masked sum is written to disk before the first site is asked to open it,
and from then on only this one can be opened, also after a restart.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from flwr.app import Message

from ...common.digest import digest
from ...common.errors import RefusedError
from ...common.protocol import flower_messages as messages
from ...common.protocol.codec import as_received
from ...common.protocol.types import SumReply, SumRequest, SumStep, TrainRequest, hash_arrays
from ...common.secure_aggregation.bodies import Opened, Shared, SumBody, Weights, from_bytes, to_bytes
from ...common.secure_aggregation.fixed_point import MAX_SITES, WeightedMean, unflatten
from ...common.secure_aggregation.identity import PublicKeys
from ...common.secure_aggregation.opening import check_offer, unmask
from ...common.secure_aggregation.participant import Revealed
from ...common.secure_aggregation.view import Offer, View
from . import aggregation
from .admission import reply_limits
from .aggregation import RoundState
from .checkpoint import ServerState
from .masked_sum import MaskedSum, read_sum, sealed_by, write_sum
from .shared_adapter import SharedAdapter
from .strategy import AdapterStrategy, PendingRequest
from .sum_members import SumMembers

FOLDER = "secure"  # beside the spool: the masked sums of the last rounds
T = TypeVar("T")


@dataclass
class Traffic:
    """Bytes of the steps after ``train``, by site."""

    up: dict[str, int]
    down: dict[str, int]

    def count(self, site: str, down: int, up: int) -> None:
        """Add the bytes of a step."""
        self.down[site] = self.down.get(site, 0) + down
        self.up[site] = self.up.get(site, 0) + up


@dataclass(frozen=True)
class Exchange(Generic[T]):
    """A step for all its sites: how many are needed, what each is sent, and how its reply is read.

    ``read`` takes the site and its reply. It raises RefusedError.
    """

    step: SumStep
    needed: int
    body: Callable[[str], bytes]
    read: Callable[[str, bytes], T]


class Round(NamedTuple):
    """The round in progress, with its requests to train by site."""

    t: int
    asked: Mapping[str, PendingRequest]
    traffic: Traffic

    def request(self, site: str, step: SumStep, body: bytes) -> SumRequest:
        """The request of a step to a site."""
        train = self.asked[site].request
        names = (train.admitted_round, train.plan, train.evaluate, train.reference)
        return SumRequest(train.federation, self.t, step, *names, body)


def aggregate(
    strategy: AdapterStrategy, t: int, state: ServerState, asked: Mapping[str, PendingRequest]
) -> ServerState:
    """Compute S_t from the sum of the updates. Raises StateError, and QuorumError if too few sites take part."""
    started, path = time.monotonic(), _path(strategy, t)
    round_ = Round(t, asked, Traffic({}, {}))
    masked = read_sum(path, hash_arrays(state.shared))
    if masked is None:
        masked = collect(strategy, state, round_)
        write_sum(path, masked)
    else:
        round_ = repeat(strategy, state, round_, masked)
    revealed = open_shares(strategy, round_, masked)
    survivors = list(masked.survivors)
    try:
        mean = decode(strategy, masked, revealed)
    except RefusedError as error:  # of a dishonest site: the round is lost, since no second sum of it can be opened
        strategy.recorder.refused(t, error)
        survivors, adapter = [], state.adapters[0]
    else:
        adapter = step(strategy, t, state.adapters[0], mean)
    traffic = {"bytes_up": round_.traffic.up, "bytes_down": round_.traffic.down}
    strategy.recorder.emit(
        "secure_sum", round=t, sites=survivors, dropped=masked.dropped, threshold=masked.view.threshold, **traffic
    )
    seconds = time.monotonic() - started
    strategy.recorder.emit("round", round=t, admitted=survivors, weights={}, residual=None, seconds=seconds)
    kept = hash_arrays(adapter.shared) == masked.view.reference
    advanced = masked.view.members if kept else masked.survivors  # no site sends the same update in a second round
    admitted = {**state.admitted, **dict.fromkeys(advanced, t)}
    return dataclasses.replace(state, round=t, finalized=False, adapters=(adapter,), admitted=admitted)


def collect(strategy: AdapterStrategy, state: ServerState, round_: Round) -> MaskedSum:
    """Let the sites train, share keys and send their masked vectors. Raises QuorumError."""
    t, when = round_.t, f"round {round_.t}"
    trained, lists = list(strategy.collect(round_.asked, t, when))[:MAX_SITES], SumMembers(_path(strategy, t).parent)
    members = lists.of(t) or tuple(trained)
    trained = [site for site in trained if site in members]
    view = _view(strategy, state, round_.asked, members, trained)
    needed = max(view.threshold, strategy.settings.quorum or 0)
    strategy.recorder.require_quorum(needed, trained, when)
    lists.keep(t, members)
    body = SumBody(view.token, view.members, _weights(state), view.max_weight)
    share = Exchange("share", needed, _same(body), partial(_shared, view, strategy.options.public_keys))
    answers = dict(_ask(strategy, round_, trained, share))
    strategy.recorder.require_quorum(needed, list(answers), when)
    offers = {site: answers[site][0] for site in trained if site in answers}
    body, total, survivors = dataclasses.replace(body, offers=offers), np.zeros(_size(state), np.uint32), set()
    mask = Exchange("mask", needed, _same(body), partial(_masked, len(total)))
    for site, vector in _ask(strategy, round_, offers, mask):
        total += vector
        survivors.add(site)
    strategy.recorder.require_quorum(needed, [site for site in offers if site in survivors], when)
    envelopes = np.stack([answers[site][1] for site in offers])
    return MaskedSum(strategy.plan, view, offers, envelopes, tuple(site for site in offers if site in survivors), total)


def repeat(strategy: AdapterStrategy, state: ServerState, round_: Round, masked: MaskedSum) -> Round:
    """Send the train requests of a sum from disk to its sites again, and return the round with those that reply.

    The sites may have gone on from this round, or have lost it, before the coordinator went back to it. A site that
    has its reply does not train again. The requests have the plan of the sum, as ``--rounds`` may have changed it
    since: the sites open no sum of another plan. Raises QuorumError for fewer sites than it takes to open the sum.
    """
    evaluate = any(pending.request.evaluate for pending in round_.asked.values())
    sites = [site for site in masked.survivors if site in round_.asked]
    asked = strategy.requests(sites, state, round_.t, "train", evaluate, masked.plan)
    replied = strategy.collect(asked, round_.t, f"round {round_.t}", masked.view.threshold)
    return round_._replace(asked={site: asked[site] for site in replied})


def open_shares(strategy: AdapterStrategy, round_: Round, masked: MaskedSum) -> dict[str, Revealed]:
    """Ask the survivors for the shares that open the sum. Raises QuorumError for fewer than the threshold."""
    view, offers = masked.view, dict(masked.offers)

    def body(site: str) -> bytes:
        names = (view.token, view.members, _rule(view.weights), view.max_weight)
        return to_bytes(SumBody(*names, offers, masked.survivors, masked.envelopes_for(site)))

    sites = [site for site in masked.survivors if site in round_.asked]
    revealed = dict(_ask(strategy, round_, sites, Exchange("open", view.threshold, body, partial(_opened, view))))
    strategy.recorder.require_quorum(view.threshold, list(revealed), f"round {round_.t}")
    return revealed


def decode(strategy: AdapterStrategy, masked: MaskedSum, revealed: Mapping[str, Revealed]) -> WeightedMean:
    """Take the masks off the sum and return the mean update. Raises RefusedError for an impossible one."""
    total, wrong = unmask(masked.total, masked.view, masked.offers, masked.survivors, revealed)
    for site, owners in wrong.items():
        strategy.recorder.refused(masked.view.round, _wrong_shares(site, owners))
    bound = strategy.recipe.train.max_update_norm
    assert bound is not None  # check_privacy
    return masked.view.fixed_point(bound).decode(total, len(masked.survivors))


def _wrong_shares(site: str, owners: Sequence[str]) -> RefusedError:
    names = ", ".join(owners)
    message = (
        f"Its share of the secret of {names} does not fit the other shares. Either {site} or {names} has changed it."
    )
    return RefusedError(f"share of {owners[0]}", "one that fits the others", "another", site=site, message=message)


def step(strategy: AdapterStrategy, t: int, adapter: SharedAdapter, mean: WeightedMean) -> SharedAdapter:
    """S_{t-1} → S_t: the server optimizer with S_{t-1} and the mean update as the aggregate."""
    shapes = {key: array.shape for key, array in adapter.shared.items()}
    update = unflatten(mean.update, shapes)
    aggregated = {key: (array + update[key]).astype(array.dtype) for key, array in adapter.shared.items()}
    before = RoundState(t, adapter.shared, strategy.settings, adapter.optimizer_state)
    shared, optimizer_state = aggregation.apply_optimizer(aggregated, before)
    return SharedAdapter(as_received(strategy.codec, shared), optimizer_state, adapter.aggregator_state)


# --- messages -------------------------------------------------------------------------------------------------------


def _ask(
    strategy: AdapterStrategy, round_: Round, sites: Collection[str], exchange: Exchange[T]
) -> Iterator[tuple[str, T]]:
    """Send a step to sites and yield what their replies hold. Failures and refusals are recorded."""
    silent, done, t = set(sites), [], round_.t
    replies = strategy.dispatcher.dispatch(
        {site: partial(_message, strategy, round_, exchange, site) for site in sites},
        lambda: len(done) >= exchange.needed,
        lambda silence: strategy.emit_silence(silence, t, done, exchange.needed),
    )
    for site, message in replies:
        silent.discard(site)
        if message.has_error():
            strategy.recorder.failed(t, site, message.error.reason)
            continue
        try:
            reply = messages.sum_reply_from(message)
            _check(reply, round_.request(site, exchange.step, b""), site)
            answer = exchange.read(site, reply.body)
        except RefusedError as error:
            strategy.recorder.refused(t, error.at_site(site))
            continue
        round_.traffic.count(site, strategy.dispatcher.bytes_down[site], messages.payload_bytes(message))
        done.append(site)
        yield site, answer
    for site in (site for site in sites if site in silent):
        strategy.recorder.failed(t, site, f"no reply to the step {exchange.step!r} of the secure sum", silent=True)


def _message(strategy: AdapterStrategy, round_: Round, exchange: Exchange[Any], site: str) -> Message:
    request = round_.request(site, exchange.step, exchange.body(site))
    return messages.sum_message(request, strategy.membership.registry.connected[site].node)


def _check(reply: SumReply, request: SumRequest, site: str) -> None:
    expected = {"site": site, **{name: getattr(request, name) for name in ("federation", "round", "step", "key")}}
    for field, value in expected.items():
        if getattr(reply, field) != value:
            raise RefusedError(field, str(value), getattr(reply, field), site=site)


def _shared(view: View, roster: PublicKeys, site: str, data: bytes) -> tuple[Offer, np.ndarray]:
    """The keys and envelopes in a reply to ``share``. Raises RefusedError for those that would stop other sites."""
    shared = from_bytes(Shared, data, len(view.members))
    check_offer(view, site, shared.offer, roster)
    return shared.offer, sealed_by(site, shared.envelopes, view)


def _masked(size: int, site: str, data: bytes) -> np.ndarray:
    """The vector (size,) in a reply to ``mask``. Raises RefusedError."""
    if len(data) != 4 * size:
        raise RefusedError("masked vector", f"{4 * size} bytes", len(data), site=site)
    return np.frombuffer(data, "<u4")


def _opened(view: View, site: str, data: bytes) -> Revealed:
    """The shares in a reply to ``open``. Raises RefusedError, also for none."""
    revealed = from_bytes(Opened, data, len(view.members)).revealed()
    if not revealed.self_masks and not revealed.mask_keys:
        raise RefusedError("shares", "some", "none", site=site)
    return revealed


# --- the view -------------------------------------------------------------------------------------------------------


def _view(
    strategy: AdapterStrategy,
    state: ServerState,
    asked: Mapping[str, PendingRequest],
    members: tuple[str, ...],
    trained: Sequence[str],
) -> View:
    train: TrainRequest = next(iter(asked.values())).request
    limits = [reply_limits(strategy.recipe, strategy.membership.sites[site].info) for site in trained]
    most = {
        "tokens": max((limit.terms for limit in limits), default=1),
        "examples": max((limit.examples for limit in limits), default=1),
        "uniform": 1,
    }[_weights(state)]
    names = (train.federation, train.round, secrets.token_hex(16), digest(train.plan), train.reference)
    return View(*names, _weights(state), most, members, strategy.recipe.privacy.min_sites)


def _same(body: SumBody) -> Callable[[str], bytes]:
    """One body for all sites."""
    data = to_bytes(body)
    return lambda site: data


def _weights(state: ServerState) -> Weights:
    return _rule(state.weights)


def _rule(name: str) -> Weights:
    return "examples" if name == "examples" else "uniform" if name == "uniform" else "tokens"


def _size(state: ServerState) -> int:
    return sum(array.size for array in state.shared.values()) + 1


def _path(strategy: AdapterStrategy, t: int) -> Path:
    return strategy.spool.with_name(FOLDER) / f"round-{t:06d}.safetensors"
