"""The append-only event log of a run (``events.jsonl``), and how to write, read and follow it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...common.errors import ColoraError, QuorumError


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


Event = dict[str, Any]
Listener = Callable[[Event], None]


class EventLog:
    """Appends events to a file and hands them to a listener. A line cut off by a crash is dropped at opening."""

    def __init__(self, path: Path, listener: Listener | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.listener = path, listener
        if path.exists():
            whole = path.read_bytes()
            end = whole.rfind(b"\n") + 1
            if end < len(whole):
                os.truncate(path, end)

    def emit(self, event: str, **fields: Any) -> None:
        """Writes one event with the time; numbers that JSON lacks (NaN, infinity) become null."""
        record = {"time": round(time.time(), 3), "event": event, **_finite(fields)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        if self.listener:
            self.listener(record)


def read_events(path: Path) -> list[Event]:
    """All whole events of a file, oldest first."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


class EventTail:
    """Reads a file that others append to: each call returns the whole events that came since the last."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset = path, path.stat().st_size if path.exists() else 0

    def new(self) -> list[Event]:
        """What came since; a line that is still being written waits."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(min(self._offset, self.path.stat().st_size))
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines() if line]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value
