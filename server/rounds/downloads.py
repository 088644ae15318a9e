"""Download of an announced reply: few replies are in memory at a time, and slow uploads keep no one waiting.

A site announces a reply and then uploads its parts to the SuperLink, in their order. Until a reply is there, its parts
are only looked at. So a download holds a slot for as long as the SuperLink takes to send it, whatever the site does.
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
GAP = 4  # missing parts after which a look ends: a site uploads a few at a time
PAUSE, LONGEST_PAUSE = 0.05, 5.0  # seconds between two looks; the pause grows by a quarter each time


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
    """Limits of one reply: seconds without a further part, and bytes of all parts. Looks take turns by ``looking``."""

    stall: float
    max_bytes: int
    looking: threading.Lock


def download(reply: AnnouncedReply, limits: DownloadLimits, slot: Slot) -> Message:
    """Return a reply once it is at the SuperLink. The slot is taken then; the caller gives it back.

    Raises BadReply, and ``httpx.HTTPError`` if the SuperLink is gone.
    """
    if len(reply.parts) > MAX_PARTS:
        raise BadReply(f"a reply of more than {MAX_PARTS} parts")
    upload = _Upload(reply, limits)
    upload.wait_for(reply.parts[-1:])
    contents = _pull(reply, limits, slot)
    if contents is None:  # the last part came before others
        upload.wait_for(reply.parts)
        contents = _pull(reply, limits, slot)
    if contents is None:
        raise BadReply("a reply whose parts were there and are gone")
    return reply.finish(contents)


def _pull(reply: AnnouncedReply, limits: DownloadLimits, slot: Slot) -> dict[str, bytes] | None:
    """Take the slot and pull all parts. If one is missing, drop the others, give the slot back and return None."""
    slot.take()
    contents: dict[str, bytes] = {}
    size = 0
    with ThreadPoolExecutor(PULLS) as pool:
        for part, data in zip(reply.parts, pool.map(reply.pull, reply.parts), strict=True):
            size += len(data or b"")
            if data is None or size > limits.max_bytes:
                pool.shutdown(wait=False, cancel_futures=True)
                break
            contents[part] = data
        else:
            return contents
    contents.clear()
    slot.give_back()
    _check_size(size, limits)
    return None


class _Upload:
    """What has been seen of a reply at the SuperLink. Parts are pulled one at a time and not kept."""

    def __init__(self, reply: AnnouncedReply, limits: DownloadLimits) -> None:
        self._reply, self._limits = reply, limits
        self._unseen, self._size = dict.fromkeys(reply.parts), 0
        self._arrived = time.monotonic()  # when the last new part was seen

    def wait_for(self, wanted: Sequence[str]) -> None:
        """Wait until these parts are there. From time to time all parts are looked at, to see whether more arrive.

        Raises BadReply after ``stall`` seconds without a new part.
        """
        pause, looked, stall = PAUSE, time.monotonic(), self._limits.stall
        while not self._look(wanted):
            if time.monotonic() - looked > stall / 4:
                self._look(self._reply.parts)
                looked = time.monotonic()
                if looked - self._arrived > stall:
                    raise BadReply(f"a reply that was announced but not uploaded for {stall:g} s")
            time.sleep(pause)
            pause = min(1.25 * pause, LONGEST_PAUSE, stall / 8)

    def _look(self, parts: Sequence[str]) -> bool:
        """Look at those that have not been seen, until a few are missing; return whether all are there."""
        missing = 0
        for part in [part for part in parts if part in self._unseen]:
            with self._limits.looking:
                data = self._reply.pull(part)
            if data is not None:
                del self._unseen[part]
                self._size, self._arrived = self._size + len(data), time.monotonic()
                _check_size(self._size, self._limits)
                continue
            missing += 1
            if missing == GAP:
                break
        return not missing


def _check_size(size: int, limits: DownloadLimits) -> None:
    if size > limits.max_bytes:
        raise BadReply(f"a reply of more than {limits.max_bytes} bytes")
