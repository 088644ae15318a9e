"""Replies of sites, each downloaded by itself, so that a bad or incomplete one costs only the site that sent it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection

from flwr.app import Message
from flwr.serverapp import Grid

from ...common.protocol.flower_messages import SITE_FAILED
from ..flower_compat import BadReply, DownloadLimits, announced_replies, error_reply

STALL = 120.0  # seconds without a further part after which the download of a reply fails
MIN_BYTES = 1 << 24  # of a reply that is accepted in any case
Announced = list[tuple[str, Callable[[], Message]]]


class ReplyCollector:
    """Collects replies over a grid.

    With ``background`` every reply is downloaded in a thread of its own: when a site dies while it sends its reply, or
    announces one and never sends it, Flower waits for the missing parts. A reply that cannot be downloaded becomes an
    error of its site. ``max_bytes`` is the largest reply that is accepted; its owner may raise it.
    """

    def __init__(self, grid: Grid, *, background: bool = False) -> None:
        self._grid, self._background = grid, background
        self.max_bytes = MIN_BYTES
        self._arrived: queue.SimpleQueue[Announced | tuple[str, Message] | Exception] = queue.SimpleQueue()
        self._asking: threading.Thread | None = None  # the call that asks which replies were announced
        self._claimed: set[str] = set()  # requests whose replies are being downloaded

    @property
    def stuck(self) -> bool:
        """Whether the call that asks for announced replies has not returned yet."""
        return self._asking is not None and self._asking.is_alive()

    def abandon(self) -> None:
        """Ask again at the next ``take``, although the last call has not returned. Its result still counts later."""
        self._asking = None

    def take(self, message_ids: Collection[str], wait: float) -> list[tuple[str, Message]]:
        """Return (id of the request, reply) for the replies that have arrived whole.

        Waits up to ``wait`` seconds while a call or a download is in progress. Raises the errors of the grid.
        """
        if not self._background:
            return [(i, _download(i, get)) for i, get in self._announced(message_ids) if i in message_ids]
        wanted = [message_id for message_id in message_ids if message_id not in self._claimed]
        if self._asking is None and wanted:
            self._asking = self._start(lambda: self._arrived.put(self._announced(wanted)))
        return self._drain(time.monotonic() + wait)

    def _drain(self, deadline: float) -> list[tuple[str, Message]]:
        """Start the downloads of announced replies, and return those that have ended."""
        replies: list[tuple[str, Message]] = []
        while self._asking is not None or self._claimed or not self._arrived.empty():
            try:
                pause = 0.0 if replies else max(0.0, deadline - time.monotonic())
                item = self._arrived.get(timeout=pause) if pause else self._arrived.get_nowait()
            except queue.Empty:
                break
            if isinstance(item, Exception):
                self._asking = None
                raise item
            if isinstance(item, tuple):
                self._claimed.discard(item[0])
                replies.append(item)
                continue
            self._asking = None
            for message_id, get in item:
                self._claimed.add(message_id)
                self._start(lambda i=message_id, g=get: self._arrived.put((i, _download(i, g))))
        return replies

    def _announced(self, message_ids: Collection[str]) -> Announced:
        return announced_replies(self._grid, message_ids, DownloadLimits(STALL, self.max_bytes))

    def _start(self, work: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                work()
            except Exception as error:  # raised again by take()
                self._arrived.put(error)

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        return thread


def _download(message_id: str, get: Callable[[], Message]) -> Message:
    try:
        return get()
    except BadReply as fault:
        return error_reply(message_id, SITE_FAILED, f"sent {fault}")
