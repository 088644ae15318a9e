"""Replies of sites, each downloaded by itself, so that a bad or incomplete one costs only the site that sent it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection

from flwr.app import Message
from flwr.serverapp import Grid

from ...common.protocol.flower_messages import SITE_FAILED
from ..flower_compat import AnnouncedReply, BadReply, announced_replies, error_reply
from .downloads import DownloadLimits, Slot, download

STALL = 120.0  # seconds without a further part after which the download of a reply fails
MIN_BYTES = 1 << 24  # of a reply that is accepted in any case
IN_MEMORY = 4  # replies of one collector that are downloaded, or wait to be processed, at a time


class ReplyCollector:
    """Collects replies over a grid.

    With ``background`` every reply is downloaded in a thread of its own: when a site dies while it sends its reply, or
    announces one and never sends it, Flower waits for the missing parts. At most ``IN_MEMORY`` replies are held,
    besides the one that the caller processes, however many sites have answered: the others stay at the SuperLink. A
    reply that cannot be downloaded becomes an error of its site. ``max_bytes`` is the largest reply that is accepted;
    its owner may raise it.
    """

    def __init__(self, grid: Grid, *, background: bool = False) -> None:
        self._grid, self._background = grid, background
        self.max_bytes = MIN_BYTES
        self._arrived: queue.SimpleQueue[list[AnnouncedReply] | tuple[str, Message, Slot] | BaseException]
        self._arrived = queue.SimpleQueue()
        self._places, self._checking = threading.Semaphore(IN_MEMORY), threading.Lock()
        self._taken: list[Slot] = []  # of the replies that the last ``take`` returned
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

        Waits up to ``wait`` seconds while a call or a download is in progress. Raises the errors of the grid. The
        replies of the last call make room for others, so the caller must not hold them any longer.
        """
        while self._taken:
            self._taken.pop().give_back()
        if not self._background:
            return [
                (reply.request, self._download_now(reply))
                for reply in announced_replies(self._grid, message_ids)
                if reply.request in message_ids
            ]
        wanted = [message_id for message_id in message_ids if message_id not in self._claimed]
        if self._asking is None and wanted:
            self._asking = self._start(lambda: self._arrived.put(announced_replies(self._grid, wanted)))
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
            if isinstance(item, BaseException):
                self._asking = None
                raise item
            if isinstance(item, tuple):
                message_id, message, slot = item
                self._claimed.discard(message_id)
                self._taken.append(slot)
                replies.append((message_id, message))
                continue
            self._asking = None
            for reply in item:
                self._claimed.add(reply.request)
                self._start(lambda reply=reply: self._arrived.put((reply.request, *self._download(reply))))
        return replies

    def _download_now(self, reply: AnnouncedReply) -> Message:
        message, slot = self._download(reply)
        slot.give_back()
        return message

    def _download(self, reply: AnnouncedReply) -> tuple[Message, Slot]:
        """Return a reply, or the error of its site, and the slot that it holds."""
        slot = Slot(self._places)
        try:
            return download(reply, DownloadLimits(STALL, self.max_bytes, self._checking), slot), slot
        except BadReply as fault:
            message = error_reply(reply.request, SITE_FAILED, f"sent {fault}")
        except BaseException:
            slot.give_back()
            raise
        slot.give_back()
        return message, slot

    def _start(self, work: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:  # raised again by take()
                self._arrived.put(error)

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        return thread
