"""The errors of a simulation's sites in full, for the terminal of the machine that runs all of them.

The coordinator receives the type and the field of an error only. The sites write the rest to ``log.txt``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ..common.errors import QuorumError
from ..common.event_log import Event
from ..common.processes.log_tail import LogTail
from ..server.reporting.events import FIRST_FAILURE

LINE = re.compile(r"^ERROR site ([A-Za-z0-9._-]+): (.*)$")
QUORUM_EVENTS = ("agreed", "grouped", "round", "finalized")  # after which earlier errors no longer matter


class SiteErrors:
    """A listener of events that replaces the reason of a failure by the site's own words, and passes the event on."""

    def __init__(self, log: Path, listener: Callable[[Event], None] | None) -> None:
        self._tail, self._listener = LogTail(log, LINE), listener or (lambda event: None)
        self._untold: list[tuple[str, str]] = []  # site and error, in the order of the log
        self._since_quorum: list[str] = []

    def __call__(self, event: Event) -> None:
        """Pass on an event."""
        if event["event"] in QUORUM_EVENTS:
            self._since_quorum.clear()
        self._listener(self._explained(event) if event["event"] == "failed" else event)

    def quorum_error(self, error: QuorumError) -> QuorumError:
        """Return the error with the first failure since the last quorum in full, where it is known."""
        if not self._since_quorum or not error.message:
            return error
        message = error.message.partition(FIRST_FAILURE)[0] + FIRST_FAILURE + self._since_quorum[0]
        return QuorumError(error.field, error.expected, error.found, message=message, hint=error.hint)

    def _explained(self, event: Event) -> Event:
        """Return a failure in the site's words. While sites join, the coordinator knows a node and no name."""
        self._tail.last = ""  # a later round may fail for the same reason
        for match in self._tail.new():
            if (entry := (match[1], match[2])) not in self._untold:
                self._untold.append(entry)
        known = [entry for entry in self._untold if entry[0] == event["site"]]
        if not known and str(event["site"]).startswith("node "):
            known = self._untold[:1]
        if not known:
            return event
        site, reason = known[0]
        self._untold = [entry for entry in self._untold if entry[0] != site]
        self._since_quorum.append(f"{site}: {reason}")
        return {**event, "site": site, "reason": reason}
