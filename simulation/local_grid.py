"""An in-process implementation of Flower's Grid: the same ServerApp and ClientApp, without network or processes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from ..server.flower_compat import ErrorCode, Run, identify_process, set_message_id
from .rendezvous import Rendezvous

RUN_ID = 1


class LocalGrid(Grid):
    """A grid whose node k + 1 is partition k. A message is answered when its reply is pulled, one node at a time."""

    def __init__(self, app: ClientApp, nodes: int) -> None:
        identify_process(RUN_ID)
        self._app = app
        self._run = Run.create_empty(RUN_ID)
        self._contexts = {
            k + 1: Context(RUN_ID, k + 1, {"partition-id": k, "num-partitions": nodes}, RecordDict(), {})
            for k in range(nodes)
        }
        self._pending: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes, in partition order."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages and return their ids."""
        ids = []
        for message in messages:
            ids.append(_assign_id(message))
            self._pending[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answer the first of these messages that is pending, and return the reply."""
        for message_id in message_ids:
            if message_id in self._pending:
                return [self._answer(self._pending.pop(message_id))]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return the replies to all messages, in order."""
        return [reply for message_id in self.push_messages(messages) for reply in self.pull_messages([message_id])]

    def _answer(self, message: Message) -> Message:
        try:
            reply = self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # Flower's runtimes turn an exception of a ClientApp into an error reply as well
            reason = f"{type(error).__name__}: {error}"
            reply = Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message)
        _assign_id(reply)
        return reply


class BatchedGrid(LocalGrid):
    """A grid that answers up to ``size`` messages side by side when a reply is pulled."""

    def __init__(self, app: ClientApp, nodes: int, cohort: Rendezvous, size: int) -> None:
        super().__init__(app, nodes)
        self._cohort, self._size = cohort, size

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answer the first of these messages that are pending, and return the replies."""
        chosen = [message_id for message_id in message_ids if message_id in self._pending][: self._size]
        messages = [self._pending.pop(message_id) for message_id in chosen]
        return self._cohort.run([partial(self._answer, message) for message in messages])


def _assign_id(message: Message) -> str:
    """Give a message its id, which is the task of the transport."""
    message_id = uuid4().hex
    set_message_id(message, message_id)
    return message_id
