"""A deployed coordinator: sites that connect and disconnect, lost messages and resent requests."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo

from colora.client.client_app import make_app
from colora.common.adapters.initialization import initial_shared_state
from colora.common.config.loader import recipe_from
from colora.common.config.schema import CommunicationSettings, Recipe
from colora.common.event_log import Event, EventLog
from colora.common.processes.supervised import write_services
from colora.common.protocol.flower_messages import REFERENCE_MISSING
from colora.common.protocol.types import PROTOCOL, SiteInfo, TrainReply, TrainRequest, hash_layout
from colora.server.reporting.events import read_events
from colora.server.reporting.summary import note_of
from colora.server.rounds import dispatch, membership
from colora.server.rounds.checkpoint import Checkpoints, ServerState
from colora.server.rounds.run_options import RosterEntry, RunOptions, StopRequested, read_replay
from colora.server.rounds.strategy import AdapterStrategy
from colora.server.server_app import train_federation
from colora.simulation.local_grid import LocalGrid

NAMES = ("ada", "bob", "cyd")


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every wait a hundred times shorter."""
    wait = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: wait(seconds / 100))
    monkeypatch.setattr(dispatch, "RETRY_PAUSE", 0.01)
    monkeypatch.setattr(dispatch, "REFRESH_INTERVAL", 0.0)
    monkeypatch.setattr(membership, "GRACE", 0.5)


@dataclass
class FakeSite:
    """A fake site whose training adds a constant to the shared adapter."""

    name: str
    layout: str
    model: str = "model"
    train: int = 20
    introduced: int = 0
    rounds: list[int] = field(default_factory=list)

    def site_info(self, federation: str, plan: str) -> SiteInfo:
        self.introduced += 1
        return SiteInfo(
            self.name, PROTOCOL, self.model, "tokenizer", "template", self.layout, "regression", self.train, 5, 0, 0
        )

    def handle(self, request: TrainRequest) -> TrainReply:
        self.rounds.append(request.round)
        trained = {k: v + (1 + NAMES.index(self.name)) * request.round for k, v in request.shared.items()}
        shared = {} if request.kind == "finalize" else {k: v.astype("float32") for k, v in trained.items()}
        return TrainReply(
            self.name, request.federation, request.round, request.key, shared, 10, 5, {"personal.loss": 1}
        )


class FakeGrid(LocalGrid):
    """A grid with named nodes. Requests to nodes in ``swallow`` are lost; ``errors`` are error codes to answer with.

    ``later`` has (condition, action) pairs; an action runs once when its condition holds.
    """

    def __init__(self, sites: list[FakeSite]) -> None:
        def connect(context: Context) -> FakeSite:
            return sites[int(context.node_config["partition-id"])]

        super().__init__(make_app(connect), len(sites))
        self.since = {k + 1: "monday" for k in range(len(sites))}
        self.keys = {k + 1: site.name for k, site in enumerate(sites)}
        self.swallow: set[int] = set()
        self.errors: dict[int, list[int]] = {}
        self.later: list[tuple[Callable[[], bool], Callable[[], object]]] = []
        self.lost: list[Message] = []

    def get_nodes(self) -> Iterable[NodeInfo]:
        for event in [e for e in self.later if e[0]()]:
            self.later.remove(event)
            event[1]()
        return [
            NodeInfo(node_id=node, last_activated_at=since, name=self.keys[node]) for node, since in self.since.items()
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = list(super().push_messages(messages))
        for message_id in ids:
            message = self._pending[message_id]
            if message.metadata.dst_node_id in self.swallow and message.metadata.group_id != "join":
                self.lost.append(self._pending.pop(message_id))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._answer(self._pending.pop(each)) for each in list(message_ids) if each in self._pending]

    def _answer(self, message: Message) -> Message:
        codes = self.errors.get(message.metadata.dst_node_id)
        if codes and message.metadata.group_id != "join":
            reply = Message(Error(code=codes.pop(), reason="lost"), reply_to=message)
            reply.metadata.__dict__["_message_id"] = f"error-{time.monotonic_ns()}"
            return reply
        return super()._answer(message)


def recipe(rounds: int = 3, **server: Any) -> Recipe:
    sites = [{"name": name, "source": "none.npz"} for name in NAMES]
    model, adapter = {"source": "synthetic:bilinear-6"}, {"rank": 2, "target_modules": ["proj"]}
    raw = {"name": "fed", "rounds": rounds, "model": model, "adapter": adapter, "data": {"task": "regression"}}
    return recipe_from({**raw, "site": sites, "server": {"quorum": 3, "retry_interval": 0.1, **server}})


def fake_sites(settings: Recipe) -> list[FakeSite]:
    layout = hash_layout({key: value.shape for key, value in initial_shared_state(settings.plan).items()})
    return [FakeSite(name, layout) for name in NAMES]


def run(settings: Recipe, grid: FakeGrid, folder: Path, options: RunOptions | None = None) -> ServerState:
    events = EventLog(folder / "events.jsonl")
    options = options or RunOptions(deployed=True)
    strategy = AdapterStrategy(settings, tuple(map(RosterEntry, NAMES)), events, folder / "spool", options)
    return train_federation(grid, strategy, Checkpoints(folder / "checkpoints", settings))


def recorded(folder: Path, kind: str) -> list[Event]:
    return [event for event in read_events(folder / "events.jsonl") if event["event"] == kind]


def test_a_message_that_is_lost_with_its_site_is_asked_again_when_the_site_is_back(tmp_path: Path) -> None:
    settings = recipe()
    sites = fake_sites(settings)
    grid = FakeGrid(sites)
    grid.swallow.add(2)

    def back() -> None:
        grid.swallow.clear()
        grid.since[2] = "tuesday"

    grid.later.append((lambda: bool(grid.lost), back))
    assert run(settings, grid, tmp_path).finalized
    assert [event["admitted"] for event in recorded(tmp_path, "round")] == [list(NAMES)] * 3
    assert sites[1].introduced == 2


@pytest.mark.parametrize("group", ["train", "join"])
def test_a_message_that_is_lost_with_the_gateway_is_asked_again_when_the_gateway_is_back(
    tmp_path: Path, group: str
) -> None:
    """The sites stay connected: nothing else says that their messages are lost."""

    class Lossy(FakeGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            asked = list(messages)
            ids = list(super().push_messages(asked))
            if not self.lost and (asked[0].metadata.group_id == "join") == (group == "join"):
                self.lost += [self._pending.pop(message_id) for message_id in ids]
            return ids

    def restart(pid: int) -> None:
        write_services(tmp_path / "services.json", {"pids": {"gateway": pid}})

    settings = recipe()
    grid = Lossy(fake_sites(settings))
    restart(1)
    grid.later.append((lambda: bool(grid.lost), lambda: restart(2)))
    assert run(settings, grid, tmp_path).finalized
    assert [event["admitted"] for event in recorded(tmp_path, "round")] == [list(NAMES)] * 3
    assert len(recorded(tmp_path, "joined")) == len(NAMES)


def test_an_error_for_a_message_that_was_asked_again_since_asks_nobody_a_third_time(tmp_path: Path) -> None:
    settings = recipe()

    class Slow(FakeGrid):
        pushed, given_up = 0, float("inf")

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            asked = list(messages)
            self.pushed += sum(m.metadata.dst_node_id == 2 and m.metadata.group_id == "1" for m in asked)
            return super().push_messages(asked)

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            if self.pushed == 2 and self.lost:  # Flower reports the lost request only now
                self.given_up = time.monotonic()
                return [self._answer(self.lost.pop())]
            if self.pushed == 2 and time.monotonic() < self.given_up + 0.3:  # while the site works on the other one
                return []
            return super().pull_messages(message_ids)

    grid = Slow(fake_sites(settings))
    grid.swallow.add(2)
    grid.errors[2] = [ErrorCode.MESSAGE_UNAVAILABLE]

    def back() -> None:
        grid.swallow.clear()
        grid.since[2] = "tuesday"

    grid.later.append((lambda: bool(grid.lost), back))
    assert run(settings, grid, tmp_path).finalized
    assert grid.errors[2] == []
    assert grid.pushed == 2


def test_an_answer_that_never_comes_whole_holds_up_nobody_once_its_site_is_back(tmp_path: Path) -> None:
    """Flower waits minutes for the parts of a reply whose sender died, and delays replies that came with it."""
    settings = recipe()
    release, stuck = threading.Event(), threading.Event()

    class Half(FakeGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            answers = super().pull_messages(message_ids)
            if not stuck.is_set() and any(a.metadata.group_id == "2" for a in answers):
                stuck.set()
                release.wait(20)
            return answers

    grid = Half(fake_sites(settings))
    grid.later.append((stuck.is_set, lambda: grid.since.update({2: "tuesday"})))
    assert run(settings, grid, tmp_path).finalized
    assert stuck.is_set()
    assert [event["admitted"] for event in recorded(tmp_path, "round")] == [list(NAMES)] * 3
    release.set()


def test_a_silent_site_is_asked_again_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe()
    grid = FakeGrid(fake_sites(settings))
    grid.swallow.add(1)
    grid.later.append((lambda: bool(grid.lost), grid.swallow.clear))
    monkeypatch.setattr(dispatch.RetryPolicy.__init__, "__defaults__", (False, 0.1, 0.2))  # the last is ``silence``
    assert run(settings, grid, tmp_path).finalized


def test_the_platforms_errors_are_no_attempts_but_a_sites_own_are(tmp_path: Path) -> None:
    settings = recipe(max_attempts=2)
    grid = FakeGrid(fake_sites(settings))
    grid.errors[3] = [ErrorCode.NODE_UNAVAILABLE] * 7
    assert run(settings, grid, tmp_path).finalized
    assert recorded(tmp_path, "failed") == []
    grid = FakeGrid(fake_sites(settings))
    grid.errors[3] = [ErrorCode.CLIENT_APP_RAISED_EXCEPTION] * 3  # one round fails and is repeated
    assert run(settings, grid, tmp_path / "b").finalized
    assert [event["round"] for event in recorded(tmp_path / "b", "failed")] == [1]
    assert len(recorded(tmp_path / "b", "waiting")) == 1


def test_it_waits_for_its_quorum_and_takes_in_who_comes_late(tmp_path: Path) -> None:
    settings = recipe(rounds=4, quorum=2)
    sites = fake_sites(settings)
    grid = FakeGrid(sites)
    late = grid.since.pop(3), grid.since.pop(2)
    grid.later.append((lambda: bool(recorded(tmp_path, "waiting")), lambda: grid.since.update({2: late[1]})))
    grid.later.append((lambda: len(recorded(tmp_path, "round")) >= 2, lambda: grid.since.update({3: late[0]})))
    assert run(settings, grid, tmp_path).finalized
    assert recorded(tmp_path, "waiting")[0]["missing"] == ["bob", "cyd"]
    admitted = [event["admitted"] for event in recorded(tmp_path, "round")]
    assert admitted[0] == ["ada", "bob"]
    assert admitted[-1] == list(NAMES)
    again = run(
        settings,
        FakeGrid(fake_sites(settings)),
        tmp_path / "again",
        RunOptions(replay=read_replay(tmp_path / "events.jsonl")),
    )
    before = Checkpoints(tmp_path / "checkpoints", settings).latest()
    assert before
    assert {k: v.tobytes() for k, v in before.shared.items()} == {k: v.tobytes() for k, v in again.shared.items()}
    assert again.admitted == before.admitted


def test_who_is_offline_is_not_waited_for_once_there_is_a_quorum(tmp_path: Path) -> None:
    settings = recipe(quorum=2)
    grid = FakeGrid(fake_sites(settings))
    grid.swallow.add(3)
    grid.later.append((lambda: bool(grid.lost), lambda: grid.since.pop(3)))
    assert run(settings, grid, tmp_path).finalized
    assert recorded(tmp_path, "round")[0]["admitted"] == ["ada", "bob"]
    assert recorded(tmp_path, "failed")[0]["reason"] == "not connected"


def test_a_site_without_examples_to_train_on_is_asked_at_the_close_only(tmp_path: Path) -> None:
    settings = recipe(quorum=2)
    sites = fake_sites(settings)
    sites[2].train = 0
    assert run(settings, FakeGrid(sites), tmp_path).finalized
    assert [event["admitted"] for event in recorded(tmp_path, "round")] == [["ada", "bob"]] * 3
    assert [site.rounds for site in sites] == [[1, 2, 3, 4], [1, 2, 3, 4], [4]]


def test_a_coordinator_that_starts_again_does_not_ask_those_who_stayed(tmp_path: Path) -> None:
    settings = recipe()
    sites = fake_sites(settings)
    stops = iter([False, False, True, True, True])
    with pytest.raises(StopRequested):
        run(settings, FakeGrid(sites), tmp_path, RunOptions(deployed=True, should_stop=lambda: next(stops)))
    grid = FakeGrid(sites)
    grid.since[2] = "tuesday"
    assert run(settings, grid, tmp_path).finalized
    assert [site.introduced for site in sites] == [1, 2, 1]
    assert sites[0].rounds == [1, 2, 3, 4]


def test_a_key_speaks_for_its_own_site_only(tmp_path: Path) -> None:
    settings = recipe(quorum=2)
    sites = fake_sites(settings)
    grid = FakeGrid(sites)
    sites[2].name = "ada"
    assert run(settings, grid, tmp_path).finalized
    (refused,) = recorded(tmp_path, "refused")
    assert (refused["site"], refused["expected"], refused["found"]) == ("cyd", "the name of its key, cyd", "ada")


def test_a_key_outside_the_roster_cannot_join_as_a_site_of_the_roster(tmp_path: Path) -> None:
    settings = recipe(quorum=2)
    sites = fake_sites(settings)
    grid = FakeGrid(sites)
    grid.keys[3] = "eve"
    sites[2].name = "bob"
    assert run(settings, grid, tmp_path).finalized
    (refused,) = recorded(tmp_path, "refused")
    assert (refused["site"], refused["expected"], refused["found"]) == ("eve", "the name of its key, eve", "bob")
    assert "'eve'" in refused["reason"]
    assert "'bob'" in refused["reason"]
    assert [event["admitted"] for event in recorded(tmp_path, "round")] == [["ada", "bob"]] * 3
    assert sites[1].rounds == [1, 2, 3, 4]
    assert sites[2].rounds == []


def test_a_site_that_comes_back_as_another_one_is_left_out(tmp_path: Path) -> None:
    settings = recipe(quorum=2)
    sites = fake_sites(settings)
    grid = FakeGrid(sites)

    def changed() -> None:
        sites[1].model, grid.since[2] = "another", "tuesday"

    grid.later.append((lambda: len(recorded(tmp_path, "round")) == 1, changed))
    assert run(settings, grid, tmp_path).finalized
    assert [event["admitted"] for event in recorded(tmp_path, "round")][1:] == [["ada", "cyd"]] * 2
    assert recorded(tmp_path, "refused")[0]["field"] == "model"


def test_a_late_answer_is_told_and_ignored(tmp_path: Path) -> None:
    settings = recipe(quorum=2, timeout=0.3)
    grid = FakeGrid(fake_sites(settings))
    grid.swallow.add(3)

    def found_again() -> None:
        grid.swallow.clear()
        message = grid.lost.pop()
        grid._pending[message.metadata.message_id] = message

    grid.later.append((lambda: len(recorded(tmp_path, "round")) == 1, found_again))
    state = run(settings, grid, tmp_path)
    assert [event["site"] for event in recorded(tmp_path, "late")] == ["cyd"]
    assert recorded(tmp_path, "round")[0]["admitted"] == ["ada", "bob"]
    assert state.admitted["cyd"] == 3


def test_a_second_live_node_with_a_sites_name_is_refused_and_the_first_one_stays(tmp_path: Path) -> None:
    """Without keys, any node may claim any name. It used to take the site's place in silence."""
    settings = recipe(quorum=2)
    sites = fake_sites(settings)
    eve = FakeSite("bob", sites[1].layout)
    grid = FakeGrid([*sites, eve])
    grid.keys = dict.fromkeys(grid.keys, "")
    assert run(settings, grid, tmp_path).finalized
    (refused,) = recorded(tmp_path, "refused")
    assert (refused["site"], refused["found"]) == ("node 4", "bob")
    assert "Another connected node has the name 'bob' already" in refused["reason"]
    assert (sites[1].rounds, eve.rounds) == ([1, 2, 3, 4], [])


def test_where_nodes_have_keys_a_node_without_one_has_no_name(tmp_path: Path) -> None:
    settings = recipe(quorum=2)
    sites = fake_sites(settings)
    grid = FakeGrid(sites)
    grid.keys[2] = ""
    assert run(settings, grid, tmp_path).finalized
    (refused,) = recorded(tmp_path, "refused")
    assert refused["site"] == "node 2"
    assert "without a registered key" in refused["reason"]
    assert sites[1].rounds == []


def test_only_keys_of_the_roster_are_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from colora.server.deployment import supervisor

    class Stop(Exception):
        pass

    def endpoints(job: supervisor.ServerJob) -> None:
        assert job.keys is not None
        assert list(job.keys.sites) == list(NAMES)
        raise Stop

    monkeypatch.setattr(supervisor, "_endpoints", endpoints)
    (tmp_path / "roster.pub").write_bytes(b"public keys")
    keys = supervisor.Keys(None, dict.fromkeys([*NAMES, "eve"], b"key"), tmp_path / "roster.pub")  # type: ignore[arg-type]
    with pytest.raises(Stop):
        supervisor.run_server(supervisor.ServerJob(recipe(), tmp_path / "run", "127.0.0.1", 0, keys), print)
    assert (tmp_path / "run" / "roster.pub").read_bytes() == b"public keys"


def test_a_coordinators_own_copy_of_the_model_pins_its_fingerprints(tmp_path: Path) -> None:
    """All three sites have another model than the coordinator: none is admitted."""
    settings = recipe(quorum=2)
    stop = iter([False] * 3 + [True] * 9)
    options = RunOptions(deployed=True, fingerprints=lambda _: {"model": "own"}, should_stop=lambda: next(stop))
    with pytest.raises(StopRequested):
        run(settings, FakeGrid(fake_sites(settings)), tmp_path, options)
    refused = recorded(tmp_path, "refused")
    assert {(e["site"], e["field"], e["expected"]) for e in refused} == {(name, "model", "own") for name in NAMES}


def test_a_round_tells_whom_it_waits_for_since_when_and_who_of_them_is_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bob is silent and cyd offline; both are back once this was told twice, after one and two times ``NOTICE``."""
    monkeypatch.setattr(dispatch, "NOTICE", 0.6)
    monkeypatch.setattr(dispatch.RetryPolicy.__init__, "__defaults__", (False, 0.1, 0.2))  # the last is ``silence``
    settings = recipe(quorum=2)
    grid = FakeGrid(fake_sites(settings))
    grid.swallow |= {2, 3}
    grid.later.append((lambda: bool(grid.lost), lambda: grid.since.pop(3)))
    grid.later.append((lambda: len(recorded(tmp_path, "waiting")) > 1, grid.swallow.clear))
    assert run(settings, grid, tmp_path).finalized
    first, second = recorded(tmp_path, "waiting")
    assert (first["when"], first["round"], first["quorum"]) == ("round 1", 1, 2)
    assert (first["missing"], first["offline"], first["present"]) == (["bob", "cyd"], ["cyd"], ["ada"])
    assert second["time"] - first["time"] > 0.5
    first["seconds"] = 60
    assert note_of(first) == "round 1: waiting for bob, cyd (offline), silent for 60 s; 1 replied, quorum 2"


def test_who_has_not_joined_is_told_again_with_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "NOTICE", 0.3)
    settings = recipe(quorum=2)
    grid = FakeGrid(fake_sites(settings))
    late = grid.since.pop(3), grid.since.pop(2)
    grid.later.append((lambda: len(recorded(tmp_path, "waiting")) > 2, lambda: grid.since.update({2: late[1]})))
    assert run(settings, grid, tmp_path).finalized
    first, *again = recorded(tmp_path, "waiting")
    assert "seconds" not in first
    assert [event["missing"] for event in again] == [["bob", "cyd"]] * 2
    assert note_of({**again[1], "seconds": 120}) == "waiting for bob, cyd for 120 s: 1 joined, 2 needed"


def with_differences(**server: Any) -> Recipe:
    settings = recipe(**server)
    return dataclasses.replace(settings, communication=CommunicationSettings(broadcast_bits=4))


def test_any_error_of_a_site_brings_the_whole_adapter_with_the_next_attempt(tmp_path: Path) -> None:
    """These sites have no method ``received``, so the ClientApp fails at every difference."""
    settings = with_differences(max_attempts=2)
    assert run(settings, FakeGrid(fake_sites(settings)), tmp_path).finalized
    replies = recorded(tmp_path, "reply")
    assert len(replies) == 12
    assert all(reply["whole"] for reply in replies)
    assert not recorded(tmp_path, "failed")


def test_a_site_that_always_asks_for_the_whole_adapter_is_left_out(tmp_path: Path) -> None:
    """Asking for it costs no attempt the first time, and one every other time."""
    settings = with_differences(quorum=2, max_attempts=3)
    grid = FakeGrid(fake_sites(settings))
    grid.errors[2] = [REFERENCE_MISSING] * 100
    assert run(settings, grid, tmp_path).finalized
    assert [event["admitted"] for event in recorded(tmp_path, "round")] == [["ada", "cyd"]] * 3
    assert [event["round"] for event in recorded(tmp_path, "failed") if event["site"] == "bob"] == [1, 2, 3, 4]
    assert len(grid.errors[2]) == 100 - 4 - 3 * 3


def test_large_replies_are_accepted_after_small_differences(tmp_path: Path) -> None:
    """The limit of a reply follows from the adapter, since a difference may be a hundred times smaller."""
    settings = with_differences()
    strategy = AdapterStrategy(settings, tuple(map(RosterEntry, NAMES)), EventLog(tmp_path / "events.jsonl"), tmp_path)
    grid = FakeGrid([FakeSite(name, hash_layout({"x": (10**7,)})) for name in NAMES])
    state = strategy.join(grid, None, lambda classes: {"x": np.zeros(10**7, np.float32)})
    strategy.requests(["ada"], state, 1, "train", False)
    assert strategy.dispatcher._replies.max_bytes >= 4 * 10**7
