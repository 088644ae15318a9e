"""Private parts of Flower that a site uses.

The module wraps Flower's commands ``flower-supernode`` and ``flwr-clientapp``, and deactivates the node of a SuperNode
that was killed. Every import names the versions in which its module was read; the range of ``flwr`` in
``pyproject.toml`` is these versions. All imports are local: a ClientApp process loads this file for every message.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from ..common.flower_compat import version_interceptor

CLIENT_APP = "flwr-clientapp"  # name of Flower's command, which SuperExec starts for every message
UNUSED = "flwr.supernode.cli.flower_supernode"
PATIENCE, PAUSE = 60.0, 0.5  # seconds for which a call whose connection breaks is repeated, and between two calls
T = TypeVar("T")


def supernode_command() -> Callable[[], None]:
    """Return Flower's command ``flower-supernode``, which reads ``sys.argv``.

    Read in 1.40, 1.41, 1.42: 1.41 changes one help text, 1.42 nothing.
    """
    from flwr.supernode.cli.flower_supernode import flower_supernode

    return flower_supernode


def send_waiting_replies() -> None:
    """Make this process's SuperNode send a reply that waits, even if no further message arrives.

    Flower's loop pulls a message, waits for any reply, and sends it. A message whose run ends while it is pulled is
    ignored, but its reply comes all the same and takes the turn of the next one, which then waits until another message
    arrives. Read in 1.40, 1.41, 1.42: loop and node state are the same in all three.
    """
    from flwr.supernode import start_client_internal as module

    pull = module._pull_and_store_message

    def pull_unless_a_reply_waits(*, state: Any, **others: Any) -> int | None:
        with state.lock_msg_store:
            entries = [entry for entry in state.msg_store.values() if not entry.is_retrieved]
        waiting = [entry.message.metadata for entry in entries if entry.message.metadata.reply_to_message_id]
        return waiting[0].run_id if waiting else pull(state=state, **others)

    module._pull_and_store_message = pull_unless_a_reply_waits


def finish_broken_uploads() -> None:
    """Make this process's SuperNode finish the upload of a reply after its connection broke.

    Flower gives a reply up, and deletes it, in two cases that a coordinator's restart causes. It takes an error whose
    text has "ssl" for a wrong certificate. And the coordinator refuses a part that it has already, which Flower sends
    again if the answer was lost. The coordinator then waits for the missing parts. Read in 1.40, 1.41, 1.42:
    ``_push_messages`` differs in the name of one call, and the functions that it is given are the same.
    """
    from flwr.supernode import start_client_internal as module

    push = module._push_messages

    def push_whole(*, send: Callable[..., Any], push_object: Callable[..., Any], **others: Any) -> None:
        upload = _Upload(send, push_object)
        push(send=upload.send, push_object=upload.push_object, **others)

    module._push_messages = push_whole


@dataclass
class _Upload:
    """Flower's functions that announce a reply and push one of its parts. Parts are pushed by several threads.

    A reply may be announced again: the answer then names the parts that are missing, and a new session for them.
    """

    announce: Callable[..., tuple[set[str], str]]
    push: Callable[..., None]
    lock: threading.Lock = field(default_factory=threading.Lock)
    reply: tuple[Any, ...] = ()
    session: str = ""

    def send(self, *reply: Any) -> tuple[set[str], str]:
        """Announce a reply, and return the ids of the missing parts and the session."""
        import httpx

        self.reply = reply
        missing, self.session = _patiently(lambda: self.announce(*reply), httpx.TransportError)
        return missing, self.session

    def push_object(self, run: int, _session: str, part: str, content: bytes) -> None:
        """Push a part. If that fails, announce the reply again and push the part if it is still missing."""
        import httpx
        from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

        faults = httpx.TransportError, ObjectPushError
        try:
            self.push(run, self.session, part, content)
        except faults:
            with self.lock:  # each announcement ends the session before it
                _patiently(lambda: self._push_if_missing(run, part, content), *faults)

    def _push_if_missing(self, run: int, part: str, content: bytes) -> None:
        missing, session = self.send(*self.reply)
        if part in missing:
            self.push(run, session, part, content)


def _patiently(call: Callable[[], T], *faults: type[Exception]) -> T:
    """Call until none of the faults occurs, for at most PATIENCE seconds. Raises the call's errors."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return call()
        except faults as error:
            if "certificate" in str(error).lower() or time.monotonic() > deadline:
                raise
            time.sleep(PAUSE)


def clientapp_command() -> Callable[[], None]:
    """Return Flower's command ``flwr-clientapp``, which reads ``sys.argv``, without loading what it does not use.

    Its package also imports ``flower-supernode``, and with it Flower's database layer: as much again as a ClientApp
    needs. An empty module stands in for it. Read in 1.40, 1.41, 1.42: one file, and one ``__init__.py``, since 1.36.
    """
    unused = ModuleType(UNUSED)
    unused.flower_supernode = None  # type: ignore[attr-defined]
    sys.modules[UNUSED] = unused
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    return flwr_clientapp


def deactivate_node(address: str, ca: str, key: Path, node: int) -> None:
    """Deactivate a SuperNode's node at the coordinator, with a request signed by the site's private key (OpenSSH).

    A SuperNode does so itself when it stops; Flower has no public API to do it for one that was killed. Client and
    interceptor: read in 1.40, 1.41, 1.42; the same files in all three, and neither exists before 1.40.
    """
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    private = load_ssh_private_key(key.read_bytes(), None)
    interceptors = [
        version_interceptor("SuperNode"),
        NodeAuthHttpInterceptor(private, private.public_key()),  # type: ignore[arg-type]
    ]
    with FleetHttpClient.from_server_address(address, False, ca, interceptors=interceptors) as client:
        client.DeactivateNode(DeactivateNodeRequest(node_id=node))
