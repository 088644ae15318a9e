"""events.jsonl: one JSON object a line, append-only, the one source of every table and report."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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
