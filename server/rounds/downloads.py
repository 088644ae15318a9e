"""Download of an announced reply. Few replies are in memory at a time, and a slow upload does not delay other sites.

A site announces a reply and then uploads its parts to the SuperLink, the root last. Until the upload is complete, parts
are pulled only to see that they are there, and are not kept. A download takes its slot after that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from flwr.app import Message

from ..flower_compat import MAX_PARTS, AnnouncedReply, BadReply

PULLS = 2  # parts of a reply that are pulled at a time, as Flower does
ATTEMPTS = 3  # a site uploads a few parts at a time, so that the root can come before others
PAUSE, LONGEST_PAUSE = 0.05, 2.0  # seconds between two checks; the pause grows by a quarter each time


class Slot:
    """A place among the few replies that are in memory at a time."""

    def __init__(self, places: threading.Semaphore) -> None:
        self._places, self._taken = places, False

    def take(self) -> None:
        """Wait for a free place."""
        self._places.acquire()
        self._taken = True

    def give_back(self) -> None:
        """Free the place, if it is taken."""
        if self._taken:
            self._taken = False
            self._places.release()


@dataclass(frozen=True)
class DownloadLimits:
    """Limits of one reply: seconds without a further part, and bytes of all parts.

    ``checking`` is held while a part is pulled only to see that it is there, so that one such part is in memory.
    """

    stall: float
    max_bytes: int
    checking: threading.Lock


def download(reply: AnnouncedReply, limits: DownloadLimits, slot: Slot) -> Message:
    """Return a reply once it is at the SuperLink. The slot is taken then; the caller gives it back. Raises BadReply."""
    if len(reply.parts) > MAX_PARTS:
        raise BadReply(f"a reply of more than {MAX_PARTS} parts")
    upload = _Upload(reply, limits)
    wanted: Sequence[str] = reply.parts[-1:]
    for attempt in range(ATTEMPTS + 1):
        upload.wait_for(wanted if attempt < ATTEMPTS else reply.parts)
        contents, missing = _pull(reply, limits, slot)
        if not missing:
            return reply.finish(contents, limits.max_bytes)
        wanted = [missing]
    raise BadReply("a reply whose parts were there and are gone")


def _pull(reply: AnnouncedReply, limits: DownloadLimits, slot: Slot) -> tuple[dict[str, bytes], str]:
    """Take the slot, and return all parts. If one is missing, give the slot back, and return its id and no parts."""
    slot.take()
    contents: dict[str, bytes] = {}
    size = 0
    pool = ThreadPoolExecutor(PULLS)
    try:
        for part, data in zip(reply.parts, pool.map(reply.pull, reply.parts), strict=True):
            if data is None:
                contents.clear()
                slot.give_back()
                return {}, part
            size += len(data)
            _check_size(size, limits)
            contents[part] = data
    finally:
        pool.shutdown(cancel_futures=True)
    return contents, ""


class _Upload:
    """What has been seen of a reply at the SuperLink. Parts are pulled one at a time and not kept."""

    def __init__(self, reply: AnnouncedReply, limits: DownloadLimits) -> None:
        self._reply, self._limits = reply, limits
        self._unseen, self._size = dict.fromkeys(reply.parts), 0
        self._arrived = time.monotonic()  # when a new part was last seen

    def wait_for(self, wanted: Sequence[str]) -> None:
        """Wait until these parts are there. From time to time all parts are checked, to see whether others arrive.

        Raises BadReply after ``stall`` seconds without a new part.
        """
        pause, checked, stall = PAUSE, time.monotonic(), self._limits.stall
        while not all(self._sees(part) for part in wanted):
            if time.monotonic() - checked > stall / 2:
                for part in list(self._unseen):
                    self._sees(part)
                checked = time.monotonic()
                if checked - self._arrived > stall:
                    raise BadReply(f"a reply that was announced but not uploaded for {stall:g} s")
            time.sleep(pause)
            pause = min(1.25 * pause, LONGEST_PAUSE, stall / 8)

    def _sees(self, part: str) -> bool:
        if part not in self._unseen:
            return True
        size = self._size_of(part)
        if size is None:
            return False
        del self._unseen[part]
        self._size, self._arrived = self._size + size, time.monotonic()
        _check_size(self._size, self._limits)
        return True

    def _size_of(self, part: str) -> int | None:
        with self._limits.checking:
            data = self._reply.pull(part)
            return None if data is None else len(data)


def _check_size(size: int, limits: DownloadLimits) -> None:
    if size > limits.max_bytes:
        raise BadReply(f"a reply of more than {limits.max_bytes} bytes")
