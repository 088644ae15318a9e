"""Replies over a network grid: one that is bad or never comes whole costs its own site only."""

from __future__ import annotations

import gc
import json
import random
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from colora.common.protocol.flower_messages import SITE_FAILED
from colora.server.rounds import replies
from colora.server.rounds.replies import ReplyCollector


def reply_to(request: str, text: str = "whole") -> Message:
    metadata = Metadata(
        run_id=1,
        message_id="",
        src_node_id=2,
        dst_node_id=1,
        reply_to_message_id=request,
        group_id="1",
        created_at=time.time(),
        ttl=60,
        message_type="train",
    )
    return make_message(metadata=metadata, content=RecordDict({"colora": ConfigRecord({"text": text})}))


def shuffled(tree: ObjectTree) -> ObjectTree:
    """The tree as a SuperLink returns it: the children of an object are in no order."""
    children = [shuffled(child) for child in tree.children]
    random.Random(len(children)).shuffle(children)
    return ObjectTree(object_id=tree.object_id, children=children)


def large_reply_to(request: str, arrays: int = 30) -> Message:
    """A reply with three parts for each array, and some more."""
    message = reply_to(request)
    message.content["arrays"] = ArrayRecord({f"array {k}": Array(np.full(200, k, np.float32)) for k in range(arrays)})
    return message


class Network:
    """What ``HttpGrid`` uses of the Runtime API: announced replies with their parts, some of which never arrive."""

    def __init__(self) -> None:
        self.announced: dict[str, tuple[Any, ObjectTree]] = {}
        self.parts: dict[str, bytes] = {}
        self.node, self.run, self._runtime_client = None, SimpleNamespace(run_id=1), self

    def announce(self, request: str, message: Message, *, root: Any = None, leave_out: int = 0) -> dict[str, bytes]:
        """Announce a reply; ``root`` replaces the message as the root object. Return the last parts, if left out."""
        sent = root or message
        objects = get_all_nested_objects(sent)
        tree = shuffled(get_object_tree(sent))
        message.metadata.__dict__["_message_id"] = sent.object_id
        proto = message_to_proto(message)
        proto.metadata.reply_to_message_id = request
        self.announced[request] = proto, tree
        contents = [(object_id, part.deflate()) for object_id, part in objects.items()]
        self.parts |= dict(contents[: len(contents) - leave_out])
        return dict(contents[len(contents) - leave_out :])

    def PullMessages(self, request: Any) -> Any:
        found = [self.announced.pop(i) for i in request.message_ids if i in self.announced]
        return SimpleNamespace(messages_list=[p for p, _ in found], message_object_trees=[t for _, t in found])

    def PullObject(self, request: Any) -> Any:
        data = self.parts.get(request.object_id)
        return SimpleNamespace(object_found=True, object_available=data is not None, object_content=data)

    def ConfirmMessageReceived(self, request: Any) -> None: ...


def foreign(network: Network) -> None:
    network.announce("bad", reply_to("another site's request"))


def another_root(network: Network) -> None:
    network.announce("bad", reply_to("bad"), root=ConfigRecord({"x": 1}))


def damaged_part(network: Network) -> None:
    network.announce("bad", reply_to("bad", "damaged"))
    part = next(i for i in reversed(network.parts) if b"damaged" in network.parts[i])
    network.parts[part] = network.parts[part][:20]


def missing_child(network: Network) -> None:
    message = reply_to("bad", "childless")
    network.announce("bad", message)
    proto, tree = network.announced["bad"]
    network.announced["bad"] = proto, ObjectTree(object_id=tree.object_id)


def never_sent(network: Network) -> None:
    network.announce("bad", reply_to("bad", "unsent"), leave_out=1)


def too_large(network: Network) -> None:
    network.announce("bad", reply_to("bad", "x" * 5000))


BAD: dict[str, tuple[Callable[[Network], None], str]] = {
    "names another request": (foreign, "sent a reply that names another request"),
    "is no message": (another_root, "sent a reply that is not a message"),
    "has a damaged part": (damaged_part, "sent a reply that cannot be decoded"),
    "lacks a part": (missing_child, "sent a reply that cannot be decoded"),
    "is announced and never sent": (never_sent, "sent a reply that was announced but not uploaded"),
    "is too large": (too_large, "sent a reply of more than 2000 bytes"),
}


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_a_reply_is_its_own_sites_failure_and_no_one_elses(
    name: str, background: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies, "STALL", 0.5)
    network, (make, reason) = Network(), BAD[name]
    make(network)
    network.announce("good", reply_to("good"))
    collector, began, arrived = ReplyCollector(network, background=background), time.monotonic(), {}  # type: ignore[arg-type]
    collector.max_bytes = 2000
    while len(arrived) < 2 and time.monotonic() < began + 10:
        for request, message in collector.take([i for i in ("bad", "good") if i not in arrived], 0.1):
            arrived[request] = message, time.monotonic() - began
    message, seconds = arrived["good"]
    assert message.content.config_records["colora"]["text"] == "whole"
    assert seconds < 0.5 or not background
    error = arrived["bad"][0].error
    assert error.code == SITE_FAILED
    assert error.reason.startswith(reason)


class Counted(bytes):
    """Bytes of a part, which count how many of them are in memory."""

    alive = 0

    def __new__(cls, data: bytes) -> Counted:
        cls.alive += 1
        return super().__new__(cls, data)

    def __del__(self) -> None:
        type(self).alive -= 1


@pytest.mark.parametrize("case", ["all are there", "a part is late", "too large"])
def test_few_replies_are_in_memory_however_many_sites_have_answered(case: str) -> None:
    """The oracle counts the bytes that are alive. Cycles count: the garbage collector is off."""
    network, names, most, arrived = Network(), [f"site {k}" for k in range(40)], 0, []
    late = {}
    for name in names:
        message = reply_to(name, f"reply of {name}")
        network.announce(name, message)
        if case == "a part is late":
            part = next(iter(get_all_nested_objects(message)))
            late[part] = network.parts.pop(part)
    parts_of_one = len(get_all_nested_objects(reply_to("any")))
    pull = network.PullObject

    def counted(request: Any) -> Any:
        nonlocal most
        answer = pull(request)
        if answer.object_available:
            answer.object_content = Counted(answer.object_content)
            most = max(most, Counted.alive)
        return answer

    network.PullObject = counted  # type: ignore[method-assign]
    collector, began = ReplyCollector(network, background=True), time.monotonic()  # type: ignore[arg-type]
    collector.max_bytes = 1 << 20 if case != "too large" else 200
    gc.collect()
    gc.disable()
    try:
        while len(arrived) < len(names) and time.monotonic() < began + 30:
            for request, message in collector.take([name for name in names if name not in arrived], 0.05):
                time.sleep(0.005)  # processing; downloads go on meanwhile
                arrived.append(request)
                assert message.has_error() == (case == "too large")
                del message
            if time.monotonic() > began + 1:
                network.parts |= late
    finally:
        gc.enable()
    assert sorted(arrived) == sorted(names)
    assert most <= (replies.IN_MEMORY + 1) * parts_of_one  # and one that is checked


def receive(
    collector: ReplyCollector, asked: Sequence[str], wanted: Sequence[str], meanwhile: Callable[[], object] = time.time
) -> dict[str, Message]:
    """Take replies until those that are wanted have arrived, for at most ten seconds."""
    ends, found = time.monotonic() + 10, {}
    while not found.keys() >= set(wanted) and time.monotonic() < ends:
        found |= collector.take([request for request in asked if request not in found], 0.1)
        meanwhile()
    return found


def test_replies_that_are_still_being_uploaded_keep_no_one_waiting() -> None:
    """More sites than there is room for have announced a reply, and upload the first parts only for a long time."""
    network, late, rest = Network(), [f"late {k}" for k in range(3 * replies.IN_MEMORY)], {}
    for name in late:
        rest |= network.announce(name, reply_to(name, name), leave_out=1)
    network.announce("good", reply_to("good"))
    collector, began = ReplyCollector(network, background=True), time.monotonic()  # type: ignore[arg-type]
    assert receive(collector, [*late, "good"], ["good"]).keys() == {"good"}
    assert time.monotonic() < began + 2
    network.parts |= rest
    assert receive(collector, late, late).keys() == set(late)


@pytest.mark.parametrize("trickles", [False, True])
def test_a_reply_whose_last_part_came_first_takes_no_room(*, trickles: bool) -> None:
    """More such replies than there is room for. Their other parts come one after the other, or not at all."""
    network, late = Network(), {}
    names = [f"site {k}" for k in range(2 * replies.IN_MEMORY)]
    for name in names:
        message = reply_to(name, name)
        network.announce(name, message)
        late |= {part: network.parts.pop(part) for part in list(get_all_nested_objects(message))[:-1]}
    network.announce("good", reply_to("good"))
    collector, began = ReplyCollector(network, background=True), time.monotonic()  # type: ignore[arg-type]

    def trickle() -> None:
        if trickles and late:
            network.parts |= [late.popitem()]

    found = receive(collector, [*names, "good"], ["good"], trickle)
    assert "good" in found
    assert time.monotonic() < began + 2
    network.parts |= late
    left = [name for name in names if name not in found]
    assert receive(collector, left, left).keys() == set(left)


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_slow_upload_is_waited_for_as_long_as_parts_arrive(*, goes_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part arrives every twentieth of a second, in the order of the site, until all or half of them are there."""
    monkeypatch.setattr(replies, "STALL", 0.6)
    network, message = Network(), large_reply_to("slow")
    parts = [(part, thing.deflate()) for part, thing in get_all_nested_objects(message).items()]
    assert len(parts) > 60
    network.announce("slow", message)
    network.parts = {}
    collector = ReplyCollector(network, background=True)  # type: ignore[arg-type]
    for part, content in parts if goes_on else parts[: len(parts) // 2]:
        assert collector.take(["slow"], 0.05) == []
        network.parts[part] = content
    assert receive(collector, ["slow"], ["slow"])["slow"].has_error() != goes_on


def test_a_part_that_comes_after_the_root_costs_few_further_pulls() -> None:
    network, message, pulled = Network(), large_reply_to("late"), 0
    network.announce("late", message)
    objects = list(get_all_nested_objects(message))
    part = objects[len(objects) // 2]
    content, pull, began = network.parts.pop(part), network.PullObject, time.monotonic()

    def counted(request: Any) -> Any:
        nonlocal pulled
        answer = pull(request)
        pulled += answer.object_available
        return answer

    def upload() -> None:
        if time.monotonic() > began + 0.3:
            network.parts[part] = content

    network.PullObject = counted  # type: ignore[method-assign]
    collector = ReplyCollector(network, background=True)  # type: ignore[arg-type]
    assert not receive(collector, ["late"], ["late"], upload)["late"].has_error()
    assert pulled <= 2 * len(objects) + 10


def test_an_array_that_names_one_chunk_many_times_is_refused_before_it_is_decoded() -> None:
    network = Network()
    network.announce("bomb", large_reply_to("bomb", arrays=1))
    name = next(part for part, content in network.parts.items() if b"arraychunk_ids" in content)
    head, _, body = network.parts[name].partition(b"\x00")
    body = json.dumps({**json.loads(body), "arraychunk_ids": [0] * 100_000}).encode()
    kind, children, _ = head.decode().split(" ")
    network.parts[name] = f"{kind} {children} {len(body)}".encode() + b"\x00" + body
    collector = ReplyCollector(network, background=True)  # type: ignore[arg-type]
    error = receive(collector, ["bomb"], ["bomb"])["bomb"].error
    assert error.reason.startswith("sent a reply whose arrays have more than")


def test_errors_of_the_grid_itself_are_raised() -> None:
    class Gone(Network):
        def PullMessages(self, request: Any) -> Any:
            raise ConnectionError("the SuperLink is gone")

    collector = ReplyCollector(Gone(), background=True)  # type: ignore[arg-type]
    with pytest.raises(ConnectionError):
        collector.take(["a"], 10.0)
