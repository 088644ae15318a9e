"""What happens in a federation, told to its events; and the troubles of the round under way."""

from __future__ import annotations

from typing import Any

from ..common.errors import ColoraError, QuorumError
from .events import EventLog


class EventRecorder:
    """Tells events, and remembers what went wrong until a quorum is reached."""

    def __init__(self, events: EventLog) -> None:
        self.events = events
        self.failures: list[str] = []

    def emit(self, event: str, **fields: Any) -> None:
        """One event."""
        self.events.emit(event, **fields)

    def failed(self, t: int, site: str, reason: str | None) -> None:
        """A site gave no answer, or an error, in round ``t``."""
        self.failures.append(f"{site}: {reason}")
        self.emit("failed", round=t, site=site, reason=reason)

    def refused(self, t: int, error: ColoraError) -> None:
        """What a site sent in round ``t`` does not count."""
        self.failures.append(str(error))
        about = {key: getattr(error, key) for key in ("site", "field", "expected", "found")}
        self.emit("refused", round=t, **about, reason=str(error))

    def require_quorum(self, quorum: int, present: list[str], when: str) -> None:
        """Raises QuorumError with the first trouble where too few sites are present."""
        if len(present) < quorum:
            why = f"; first trouble: {self.failures[0]}" if self.failures else ""
            where = f"see events.jsonl and log.txt in {self.events.path.parent}"
            found = f"{len(present)} ({', '.join(present) or 'none'}){why}; {where}"
            raise QuorumError(f"server.quorum at {when}", f"at least {quorum} sites", found)
        self.failures.clear()
