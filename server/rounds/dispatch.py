"""Asking sites and waiting for their answers: again after an error or a restart, never beyond the deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from ...common.protocol.flower_messages import SITE_FAILED
from ..flower_compat import ErrorCode
from .registry import NodeRegistry

SITES_FAULT = frozenset({SITE_FAILED, ErrorCode.CLIENT_APP_RAISED_EXCEPTION})  # any other error is the platform's
PAUSE, LOOK = 1.0, 1.0  # seconds


@dataclass(frozen=True)
class RetryPolicy:
    """``timeout`` seconds for all answers (None: no limit), ``attempts`` a site, a look every ``interval`` seconds.

    ``deployed`` is for sites in processes of their own, where messages get lost: a site that came back is asked again
    at once, one that is silent after ``silence`` seconds (then twice that, and so on), and the platform's errors do
    not count as attempts. All that is free of harm, since rounds are idempotent.
    """

    timeout: float | None
    attempts: int
    deployed: bool = False
    interval: float = 0.1
    silence: float = 600.0


@dataclass
class PendingReply:
    """One site's unanswered question."""

    message: Callable[[], Message]
    due: float | None = 0.0  # when to send it (again); None: it is under way
    tries: int = 0
    errors: int = 0
    newest: str = ""  # id of the last message, the only one whose error counts
    presence: object = None  # of the site when it was asked
    sent: float = 0.0
    silence: float = 0.0


class Dispatcher:
    """Asks on one grid; what comes after its question was given up is told as late and ignored."""

    def __init__(self, grid: Grid, roll: NodeRegistry, patience: RetryPolicy, tell_late: Callable[[str], None]) -> None:
        self._grid, self._roll, self._patience, self._tell_late = grid, roll, patience, tell_late
        self._late: dict[str, str] = {}  # message id → site
        self._looked = 0.0
        self._pull: BackgroundPull | None = None  # under way

    def dispatch(
        self, questions: Mapping[str, Callable[[], Message]], enough: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[str, Message]]:
        """Yields (site, answer) as answers come; an answer may be an error after the last attempt.

        A message that was claimed is never delivered again by Flower, so every attempt is a new one. Sites that do not
        answer in time are not yielded, nor are absent ones once there are ``enough`` answers without them.
        """
        ends = None if self._patience.timeout is None else time.monotonic() + self._patience.timeout
        waiting = {site: PendingReply(message) for site, message in questions.items()}
        sent: dict[str, str] = {}  # message id → site
        while waiting and (ends is None or time.monotonic() < ends):
            self._send(waiting, sent)
            answers = self._take(sent)
            for site, message in answers:
                if site in waiting and not self._again(waiting[site], message):
                    del waiting[site]
                    sent = {message_id: other for message_id, other in sent.items() if other != site}
                    yield site, message
            if not answers:
                if self._patience.deployed and self._look(waiting, enough):
                    break
                time.sleep(self._patience.interval)
        self._late |= {message_id: site for message_id, site in sent.items() if site in waiting}
        self._pull = None

    def _send(self, waiting: Mapping[str, PendingReply], sent: dict[str, str]) -> None:
        now = time.monotonic()
        for site, pending in waiting.items():
            if pending.due is None or pending.due > now:
                continue
            pending.due, pending.sent, pending.tries = None, now, pending.tries + 1
            pending.presence = self._roll.presence(site)
            pending.silence = pending.silence * 2 or self._patience.silence
            for message_id in self._grid.push_messages([pending.message()]):
                sent[message_id], pending.newest = site, message_id

    def _take(self, sent: dict[str, str]) -> list[tuple[str, Message]]:
        answers = []
        for message in self._pulled([*sent, *self._late]):
            message_id = message.metadata.reply_to_message_id
            if late := self._late.pop(message_id, None):
                if not message.has_error():
                    self._tell_late(late)
            elif site := sent.pop(message_id, None):
                answers.append((site, message))
        return answers

    def _pulled(self, message_ids: list[str]) -> list[Message]:
        """What has come. With sites that may die, in a thread of its own: see :class:`Pull`."""
        if not self._patience.deployed:
            return list(self._grid.pull_messages(message_ids))
        self._pull = self._pull or BackgroundPull(self._grid, message_ids)
        if not self._pull.wait(self._patience.interval):
            return []
        pull, self._pull = self._pull, None
        return pull.result()

    def _again(self, pending: PendingReply, message: Message) -> bool:
        """Whether an answer is an error after which the site is asked again."""
        if not message.has_error():
            return False
        if message.metadata.reply_to_message_id != pending.newest:  # lost with a process that died; asked again since
            return True
        if self._patience.deployed and message.error.code not in SITES_FAULT:
            pending.due = time.monotonic() + PAUSE
            return True
        pending.errors += 1
        pending.due = time.monotonic() + (PAUSE * 2**pending.errors if self._patience.deployed else 0)
        return pending.errors < self._patience.attempts

    def _look(self, waiting: Mapping[str, PendingReply], enough: Callable[[], bool]) -> bool:
        """Asks those again that came back or are silent; True when only absent sites are left and none is needed."""
        now = time.monotonic()
        if now < self._looked + LOOK:
            return False
        self._looked = now
        self._roll.refresh()
        presences = {site: self._roll.presence(site) for site in waiting}
        back = {s for s, p in waiting.items() if presences[s] is not None and presences[s] != p.presence}
        stuck = bool(back) and self._pull is not None
        if stuck:
            self._pull = None
        for site, pending in waiting.items():
            if pending.due is None and (stuck or site in back or now - pending.sent > pending.silence):
                pending.due = now
        return enough() and not any(presences.values())


class BackgroundPull:
    """One question to the grid for answers, which may take minutes.

    Of a site that died while it sent its answer, Flower tells that there is one, and then waits for its parts for as
    long as their upload may take. Whoever asks can leave such a pull alone and ask the sites again.
    """

    def __init__(self, grid: Grid, message_ids: list[str]) -> None:
        self._found: list[Message] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, args=(grid, message_ids), daemon=True)
        self._thread.start()

    def _work(self, grid: Grid, message_ids: list[str]) -> None:
        try:
            self._found = list(grid.pull_messages(message_ids))
        except Exception as error:  # whatever it is, it belongs to who asked
            self._error = error

    def wait(self, seconds: float) -> bool:
        """Whether it has ended; waits for that, ``seconds`` at most."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> list[Message]:
        """The answers. Raises what the grid raised."""
        if self._error:
            raise self._error
        return self._found
