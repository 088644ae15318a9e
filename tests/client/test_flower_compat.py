"""Changes of Flower's SuperNode: replies that wait are sent, and uploads that broke are finished."""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import start_client_internal as module

from colora.client import flower_compat
from colora.client.flower_compat import finish_broken_uploads, send_waiting_replies


def node_state(**entries: Any) -> Any:
    """A node state with one entry for each (run, reply to, retrieved)."""
    store = {
        key: SimpleNamespace(
            is_retrieved=retrieved,
            message=SimpleNamespace(metadata=SimpleNamespace(run_id=run, reply_to_message_id=reply_to)),
        )
        for key, (run, reply_to, retrieved) in entries.items()
    }
    return SimpleNamespace(lock_msg_store=Lock(), msg_store=store)


def test_a_reply_that_waits_is_sent_before_the_next_message_is_pulled(monkeypatch: pytest.MonkeyPatch) -> None:
    pulled: list[Any] = []
    monkeypatch.setattr(module, "_pull_and_store_message", lambda **given: pulled.append(given))
    send_waiting_replies()
    pull: Any = module._pull_and_store_message

    waiting = node_state(message=(7, "", False), reply=(8, "message", False))
    assert pull(state=waiting, receive=None) == 8
    assert pulled == []

    for state in (node_state(), node_state(message=(7, "", False), sent=(8, "message", True))):
        assert pull(state=state, receive=None) is None
        assert pulled.pop() == {"state": state, "receive": None}


def test_flower_calls_what_is_replaced_and_has_the_fields_that_are_read() -> None:
    from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

    assert "_pull_and_store_message" in module.start_client_internal.__code__.co_names
    state: Any = InMemoryNodeState.__init__.__code__.co_names
    assert {"lock_msg_store", "msg_store"} <= set(state)


class Coordinator:
    """Keeps the parts of one reply, with Flower's rules: a session stores each missing part once."""

    def __init__(self, faults: dict[int, Exception]) -> None:
        self.faults = faults  # by number of the call: the answer to it is lost
        self.calls, self.session = 0, 0
        self.stored: dict[str, bytes] = {}
        self.pending: set[str] = set()

    def announce(self, *reply: Any) -> tuple[set[str], str]:
        assert reply == ("message", "tree", 1.5)
        self.session += 1
        self.pending = {"a", "b", "c"} - self.stored.keys()
        self._answer()
        return set(self.pending), str(self.session)

    def push(self, run: int, session: str, part: str, content: bytes) -> None:
        assert run == 7
        if session != str(self.session) or part not in self.pending:
            raise ObjectPushError(part, run, session)
        self.pending.remove(part)
        self.stored[part] = content
        self._answer()

    def _answer(self) -> None:
        self.calls += 1
        if self.calls in self.faults:
            raise self.faults[self.calls]


BROKEN = httpx.ReadError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol")


def upload_through(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's way to send one reply, with the functions that our replacement passes on."""

    def push_messages(*, state: str, send: Any, push_object: Any) -> None:
        assert state == "state"
        missing, session = send("message", "tree", 1.5)
        with ThreadPoolExecutor(3) as threads:
            list(threads.map(lambda part: push_object(7, session, part, part.encode()), sorted(missing)))

    monkeypatch.setattr(module, "_push_messages", push_messages)
    monkeypatch.setattr(flower_compat, "PAUSE", 0.01)
    finish_broken_uploads()
    replaced: Any = module._push_messages
    replaced(state="state", send=coordinator.announce, push_object=coordinator.push)


@pytest.mark.parametrize("broken", [{1}, {2}, {3}, {4}, {2, 3}, {2, 4}, {1, 2, 3, 4, 5, 6}])
def test_a_reply_arrives_whole_although_answers_are_lost(broken: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = Coordinator(dict.fromkeys(broken, BROKEN))
    upload_through(coordinator, monkeypatch)
    assert coordinator.stored == {"a": b"a", "b": b"b", "c": b"c"}


def test_a_wrong_certificate_and_the_end_of_a_run_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED]"), RunNotRunningException()):
        coordinator = Coordinator(dict.fromkeys(range(1, 100), error))
        with pytest.raises(type(error)):
            upload_through(coordinator, monkeypatch)
        assert coordinator.calls == 1


def test_flower_sends_replies_by_the_function_that_is_replaced() -> None:
    assert "_push_messages" in module.start_client_internal.__code__.co_names
    assert {"send", "push_object"} <= set(inspect.signature(module._push_messages).parameters)
