"""Changes of Flower's SuperNode: a reply that waits is sent although no further message arrives."""

from __future__ import annotations

from threading import Lock
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.supernode import start_client_internal as module

from colora.client.flower_compat import send_waiting_replies


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
