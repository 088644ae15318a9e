"""Dispatch of requests to sites: collect replies until the deadline, and resend after an error or a reconnection."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from flwr.app import Message
from flwr.serverapp import Grid

from ...common.protocol.flower_messages import REFERENCE_MISSING, SITE_FAILED, payload_bytes
from ..flower_compat import ErrorCode
from .registry import NodeRegistry
from .replies import MIN_BYTES, ReplyCollector

# Errors that a site caused; all others come from Flower's infrastructure.
SITE_ERRORS = frozenset({SITE_FAILED, REFERENCE_MISSING, ErrorCode.CLIENT_APP_RAISED_EXCEPTION})
RETRY_PAUSE = 1.0  # seconds before a request is resent after an error (deployed); doubled for each error of the site
NOTICE = 60.0  # seconds without a reply after which the sites that are waited for are reported; doubled each time
REFRESH_INTERVAL = 1.0  # seconds between two checks of which nodes are online (deployed)


@dataclass(frozen=True)
class RetryPolicy:
    """When requests are resent and for how long replies are awaited.

    ``timeout``: seconds for all replies, None for no limit. In a simulation the sites take turns, so it is the time
    per site without any reply; the strategy compares each site's own seconds with it. ``attempts``: errors of a
    site before it is given up. ``interval``: seconds between two polls for replies. ``deployed``: sites are
    separate processes and messages can be lost, so a site that reconnected is asked again at once, a site without a
    reply after ``silence`` seconds (doubled each time), and infrastructure errors do not count as attempts.
    Resending is safe because rounds are idempotent.
    """

    timeout: float | None
    attempts: int
    deployed: bool = False
    interval: float = 0.1
    silence: float = 600.0


@dataclass(frozen=True)
class Silence:
    """Who has not replied for ``seconds``. ``offline`` are those of ``sites`` that are not connected."""

    sites: list[str]
    offline: list[str]
    seconds: float


@dataclass
class PendingReply:
    """The state of one site's request."""

    message: Callable[[], Message]
    send_whole: Callable[[], bool]
    due: float | None = 0.0  # monotonic time at which to send the request; None while it is in flight
    tries: int = 0
    errors: int = 0
    newest: str = ""  # id of the last message; errors of earlier ones are ignored
    presence: object = None  # the site's presence token when the request was sent
    sent: float = 0.0
    silence: float = 0.0


class Dispatcher:
    """Sends requests over a grid. Replies that arrive after their round ended are reported as late and ignored."""

    def __init__(self, grid: Grid, registry: NodeRegistry, policy: RetryPolicy, on_late: Callable[[str], None]) -> None:
        self._grid, self._registry, self._policy, self._on_late = grid, registry, policy, on_late
        self._late: dict[str, str] = {}  # message id → site
        self._refreshed = 0.0
        self._replies = ReplyCollector(grid, background=policy.deployed)
        self.bytes_down: dict[str, int] = {}  # payload of all messages of the last dispatch, by site

    def expect_replies(self, size: int) -> None:
        """Accept replies of this size in bytes, whatever the size of the requests."""
        self._replies.max_bytes = max(self._replies.max_bytes, MIN_BYTES + size)

    def dispatch(
        self,
        requests: Mapping[str, Callable[[], Message]],
        enough: Callable[[], bool] = lambda: False,
        on_silence: Callable[[Silence], None] = lambda silence: None,
        send_whole: Callable[[str], bool] = lambda site: False,
    ) -> Iterator[tuple[str, Message]]:
        """Send all requests and yield (site, reply) as replies arrive; a reply may be the error of the last attempt.

        Flower delivers a message only once, so each attempt builds a new message. Sites without a reply in time are
        not yielded, nor are offline sites once ``enough()`` holds without them. ``on_silence`` is told who is
        waited for (deployed). ``send_whole`` is called after an error of a site, and returns whether the next message
        to it holds more than the last: the whole adapter in place of a difference.
        """
        self.bytes_down = {}
        began, notice = time.monotonic(), NOTICE
        waiting = {site: PendingReply(message, partial(send_whole, site)) for site, message in requests.items()}
        sent: dict[str, str] = {}  # message id → site
        deadline, goes_on = self._deadline(len(waiting)), not self._policy.deployed
        while waiting and (goes_on or time.monotonic() < deadline):
            self._send(waiting, sent)
            replied = False
            for site, message in self._take(sent):
                replied = True
                if site in waiting and not self._retry(waiting[site], message):
                    del waiting[site]
                    sent = {message_id: other for message_id, other in sent.items() if other != site}
                    yield site, message
                del message  # its slot is given to another one
            goes_on = replied and not self._policy.deployed
            deadline = self._deadline(len(waiting)) if goes_on else deadline
            if not replied:
                if self._policy.deployed and self._refresh(waiting, enough):
                    break
                if self._policy.deployed and (seconds := time.monotonic() - began) > notice:
                    offline = [site for site in waiting if self._registry.presence(site) is None]
                    on_silence(Silence(list(waiting), offline, seconds))
                    notice *= 2
                time.sleep(self._policy.interval)
        self._late |= {message_id: site for message_id, site in sent.items() if site in waiting}
        self._replies.abandon()

    def _deadline(self, sites: int) -> float:
        """The time by which these sites must have replied; in a simulation they take turns."""
        limit = float("inf") if self._policy.timeout is None else self._policy.timeout
        return time.monotonic() + limit * (1 if self._policy.deployed else sites)

    def _send(self, waiting: Mapping[str, PendingReply], sent: dict[str, str]) -> None:
        now = time.monotonic()
        for site, pending in waiting.items():
            if pending.due is None or pending.due > now:
                continue
            pending.due, pending.sent, pending.tries = None, now, pending.tries + 1
            pending.presence = self._registry.presence(site)
            pending.silence = pending.silence * 2 or self._policy.silence
            message = pending.message()
            self.bytes_down[site] = self.bytes_down.get(site, 0) + payload_bytes(message)
            self._replies.max_bytes = max(self._replies.max_bytes, MIN_BYTES + 4 * payload_bytes(message))
            for message_id in self._grid.push_messages([message]):
                sent[message_id], pending.newest = site, message_id

    def _take(self, sent: dict[str, str]) -> list[tuple[str, Message]]:
        """Return (site, reply) for the replies that have arrived. Replies to other requests are ignored."""
        replies = []
        for message_id, message in self._replies.take([*sent, *self._late], self._policy.interval):
            if late_site := self._late.pop(message_id, None):
                if not message.has_error():
                    self._on_late(late_site)
            elif site := sent.pop(message_id, None):
                replies.append((site, message))
        return replies

    def _retry(self, pending: PendingReply, message: Message) -> bool:
        """Whether a reply is an error after which the request is sent again."""
        if not message.has_error():
            return False
        if message.metadata.reply_to_message_id != pending.newest:  # of a lost message that was resent since
            return True
        if self._policy.deployed and message.error.code not in SITE_ERRORS:
            pending.due = time.monotonic() + RETRY_PAUSE
            return True
        sends_more = message.error.code in SITE_ERRORS and pending.send_whole()
        if sends_more and message.error.code == REFERENCE_MISSING:
            pending.due = time.monotonic()
            return True
        pending.errors += 1
        pending.due = time.monotonic() + (RETRY_PAUSE * 2**pending.errors if self._policy.deployed else 0)
        return pending.errors < self._policy.attempts

    def _refresh(self, waiting: Mapping[str, PendingReply], enough: Callable[[], bool]) -> bool:
        """Schedule requests to reconnected and silent sites again; True when the missing sites are not needed."""
        now = time.monotonic()
        if now < self._refreshed + REFRESH_INTERVAL:
            return False
        self._refreshed = now
        self._registry.refresh()
        presences = {site: self._registry.presence(site) for site in waiting}
        back = {s for s, p in waiting.items() if presences[s] is not None and presences[s] != p.presence}
        stuck = bool(back) and self._replies.stuck
        if stuck:
            self._replies.abandon()
        for site, pending in waiting.items():
            if pending.due is None and (stuck or site in back or now - pending.sent > pending.silence):
                pending.due = now
        return enough() and not any(presences.values())
