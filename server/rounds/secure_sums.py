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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Message

from ...common.atomic_io import load_arrays, save_arrays
from ...common.config.schema import digest
from ...common.errors import DamagedError, RefusedError
from ...common.protocol import flower_messages as messages
from ...common.protocol.codec import as_received
from ...common.protocol.types import SumReply, SumRequest, SumStep, TrainRequest
from ...common.secure_aggregation.bodies import Opened, Shared, SumBody, Weights, from_bytes, to_bytes
from ...common.secure_aggregation.fixed_point import MAX_SITES, WeightedMean, unflatten
from ...common.secure_aggregation.opening import unmask
from ...common.secure_aggregation.participant import Revealed
from ...common.secure_aggregation.view import Offer, Offers, View
from . import aggregation
from .admission import reply_limits
from .aggregation import RoundState
from .checkpoint import MAX_CHECKPOINTS, ServerState
from .shared_adapter import SharedAdapter
from .strategy import AdapterStrategy, PendingRequest
from .sum_members import SumMembers

FOLDER = "secure"  # beside the spool: the masked sums of the last rounds
FILES = "round-*.safetensors"
SUM = "sum"


@dataclass(frozen=True)
class MaskedSum:
    """The sum (n,) of the survivors' masked vectors modulo 2³², and what is needed to open it.

    ``envelopes`` are the sealed shares by sender and receiver, in hexadecimal digits.
    """

    view: View
    offers: Offers
    envelopes: Mapping[str, Mapping[str, str]]
    survivors: tuple[str, ...]
    total: np.ndarray

    @property
    def dropped(self) -> list[str]:
        """The sites that shared keys and are not in the sum."""
        return [name for name in self.offers if name not in self.survivors]


@dataclass
class Traffic:
    """Bytes of the steps after ``train``, by site."""

    up: dict[str, int]
    down: dict[str, int]


class Round(NamedTuple):
    """The round in progress, with its requests to train by site."""

    t: int
    asked: Mapping[str, PendingRequest]
    traffic: Traffic

    def request(self, site: str, step: SumStep, body: SumBody) -> SumRequest:
        """The request of a step to a site."""
        train = self.asked[site].request
        names = (train.admitted_round, train.plan, train.evaluate, train.reference)
        return SumRequest(train.federation, self.t, step, *names, to_bytes(body))


def aggregate(
    strategy: AdapterStrategy, t: int, state: ServerState, asked: Mapping[str, PendingRequest]
) -> ServerState:
    """Compute S_t from the sum of the updates. Raises QuorumError if too few sites take part in a step."""
    started, path = time.monotonic(), _path(strategy, t)
    round_ = Round(t, asked, Traffic({}, {}))
    masked = read_sum(path, round_)
    if masked is None:
        masked = collect(strategy, state, round_)
        write_sum(path, masked)
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
    admitted = {**state.admitted, **dict.fromkeys(masked.survivors, t)}  # after a lost round, other updates follow
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
    shared = dict(_ask(strategy, round_, "share", dict.fromkeys(trained, body), needed))
    answers = {site: reply for site in trained if (reply := _parse(strategy, t, shared, site, Shared)) is not None}
    strategy.recorder.require_quorum(needed, list(answers), when)
    offers = {site: answer.offer for site, answer in answers.items()}
    body, total, survivors = dataclasses.replace(body, offers=offers), np.zeros(_size(state), np.uint32), []
    for site, reply in _ask(strategy, round_, "mask", dict.fromkeys(offers, body), needed):
        if len(reply.body) != total.nbytes:
            expected = f"{total.nbytes} bytes"
            strategy.recorder.refused(t, RefusedError("masked vector", expected, len(reply.body), site=site))
            continue
        total += np.frombuffer(reply.body, "<u4")
        survivors.append(site)
    strategy.recorder.require_quorum(needed, survivors, when)
    envelopes = {site: answer.envelopes for site, answer in answers.items()}
    return MaskedSum(view, offers, envelopes, tuple(site for site in offers if site in survivors), total)


def open_shares(strategy: AdapterStrategy, round_: Round, masked: MaskedSum) -> dict[str, Revealed]:
    """Ask the survivors for the shares that open the sum. Raises QuorumError for fewer than the threshold."""
    view, t = masked.view, round_.t
    bodies = {
        site: SumBody(
            view.token,
            view.members,
            _rule(view.weights),
            view.max_weight,
            dict(masked.offers),
            masked.survivors,
            {sender: sealed[site] for sender, sealed in masked.envelopes.items() if site in sealed},
        )
        for site in masked.survivors
        if site in round_.asked
    }
    replies = dict(_ask(strategy, round_, "open", bodies, view.threshold))
    opened = {site: answer for site in bodies if (answer := _parse(strategy, t, replies, site, Opened)) is not None}
    revealed: dict[str, Revealed] = {}
    for site, answer in opened.items():
        try:
            revealed[site] = answer.revealed()
        except RefusedError as error:
            strategy.recorder.refused(t, error.at_site(site))
    strategy.recorder.require_quorum(view.threshold, list(revealed), f"round {t}")
    return revealed


def decode(strategy: AdapterStrategy, masked: MaskedSum, revealed: Mapping[str, Revealed]) -> WeightedMean:
    """Take the masks off the sum and return the mean update. Raises RefusedError for an impossible one."""
    total = unmask(masked.total, masked.view, masked.offers, masked.survivors, revealed)
    bound = strategy.recipe.train.max_update_norm
    assert bound is not None  # check_privacy
    return masked.view.fixed_point(bound).decode(total, len(masked.survivors))


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
    strategy: AdapterStrategy, round_: Round, step_: SumStep, bodies: Mapping[str, SumBody], needed: int
) -> Iterator[tuple[str, SumReply]]:
    """Send a step to sites and yield the replies that answer it. Failures are recorded."""
    requests = {site: round_.request(site, step_, body) for site, body in bodies.items()}
    silent, done, t = set(requests), [], round_.t
    replies = strategy.dispatcher.dispatch(
        {site: partial(_message, strategy, request, site) for site, request in requests.items()},
        lambda: len(done) >= needed,
        lambda silence: strategy.emit_silence(silence, t, done, needed),
    )
    for site, message in replies:
        silent.discard(site)
        if message.has_error():
            strategy.recorder.failed(t, site, message.error.reason)
            continue
        try:
            reply = messages.sum_reply_from(message)
            _check(reply, requests[site], site)
        except RefusedError as error:
            strategy.recorder.refused(t, error.at_site(site))
            continue
        down = messages.payload_bytes(_message(strategy, requests[site], site))
        _count(round_.traffic, site, down, messages.payload_bytes(message))
        done.append(site)
        yield site, reply
    for site in (site for site in requests if site in silent):
        strategy.recorder.failed(t, site, f"no reply to the step {step_!r} of the secure sum", silent=True)


def _message(strategy: AdapterStrategy, request: SumRequest, site: str) -> Message:
    return messages.sum_message(request, strategy.membership.registry.connected[site].node)


def _check(reply: SumReply, request: SumRequest, site: str) -> None:
    expected = {"site": site, **{name: getattr(request, name) for name in ("federation", "round", "step", "key")}}
    for field, value in expected.items():
        if getattr(reply, field) != value:
            raise RefusedError(field, str(value), getattr(reply, field), site=site)


def _count(traffic: Traffic, site: str, down: int, up: int) -> None:
    traffic.down[site] = traffic.down.get(site, 0) + down
    traffic.up[site] = traffic.up.get(site, 0) + up


def _parse(strategy: AdapterStrategy, t: int, replies: Mapping[str, SumReply], site: str, kind: type) -> Any:
    """The body of a site's reply; None without one, or for a wrong one, which is recorded."""
    if site not in replies:
        return None
    try:
        return from_bytes(kind, replies[site].body)
    except RefusedError as error:
        strategy.recorder.refused(t, error.at_site(site))
        return None


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


def _weights(state: ServerState) -> Weights:
    return _rule(state.weights)


def _rule(name: str) -> Weights:
    return "examples" if name == "examples" else "uniform" if name == "uniform" else "tokens"


def _size(state: ServerState) -> int:
    return sum(array.size for array in state.shared.values()) + 1


# --- on disk --------------------------------------------------------------------------------------------------------


def _path(strategy: AdapterStrategy, t: int) -> Path:
    return strategy.spool.with_name(FOLDER) / f"round-{t:06d}.safetensors"


def write_sum(path: Path, masked: MaskedSum) -> None:
    """Write a masked sum before it is opened, and delete those of rounds that no checkpoint can repeat."""
    meta = {
        "view": dataclasses.asdict(masked.view),
        "offers": {name: dataclasses.asdict(offer) for name, offer in masked.offers.items()},
        "envelopes": masked.envelopes,
        "survivors": masked.survivors,
    }
    save_arrays(path, {SUM: masked.total}, meta)
    for old in sorted(path.parent.glob(FILES))[: -MAX_CHECKPOINTS - 1]:
        old.unlink(missing_ok=True)


def read_sum(path: Path, round_: Round) -> MaskedSum | None:
    """Return the masked sum that an earlier process wrote for the same requests; None without one.

    Raises DamagedError: if the sum may have been opened already, no other one can be.
    """
    if not path.exists():
        return None
    arrays, meta = load_arrays(path)
    try:
        view = View(**{**meta["view"], "members": tuple(meta["view"]["members"])})
        offers = {name: Offer(**offer) for name, offer in meta["offers"].items()}
        masked = MaskedSum(view, offers, meta["envelopes"], tuple(meta["survivors"]), arrays[SUM])
    except (KeyError, TypeError) as error:
        message = f"{path} is damaged: its metadata have no {error}."
        raise DamagedError(str(path), "complete metadata", error, message=message) from None
    requests = [pending.request for pending in round_.asked.values()]
    same = [(request.reference, digest(request.plan)) == (view.reference, view.plan) for request in requests]
    return masked if all(same) else None
