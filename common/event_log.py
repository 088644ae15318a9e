"""An append-only log of events: one JSON object per line, with the time and the name of the event."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .foreign_text import clean

logger = logging.getLogger("colora.events")
Event = dict[str, Any]
Listener = Callable[[Event], None]
LARGEST = 1e15  # a metric beyond it is not measured, as is one that is not finite


class EventLog:
    """Appends events to a file and passes them to a listener. A partial last line (of a crash) is removed first."""

    def __init__(self, path: Path, listener: Listener | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.listener = path, listener
        if path.exists() and not _ends_with_a_line(path):
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)

    def emit(self, event: str, **fields: Any) -> None:
        """Write one event with the current time. Numbers that its readers do not accept become null."""
        record = {"time": round(time.time(), 3), "event": event, **_plain(fields)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        if self.listener:
            notify(self.listener, record)


def in_range(value: float) -> bool:
    """Whether a number is finite and at most ``LARGEST``, as every number of an event is."""
    return -LARGEST <= value <= LARGEST  # NaN is not


def _ends_with_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def notify(listener: Listener, event: Event) -> None:
    """Pass an event to a listener. If the listener raises, the error is logged and the run continues."""
    try:
        listener(event)
    except Exception as error:  # a listener is a display or a user's function, and may raise anything
        logger.warning(
            "The listener failed on the event %s: %s", event["event"], clean(f"{type(error).__name__}: {error}")
        )


def _plain(value: Any) -> Any:
    """The value with None for each number that no reader accepts: one that is not finite, or beyond the range.

    Integers stay: those of other machines are in range, and a seed in ``settings`` may be larger.
    """
    if isinstance(value, float):
        return value if in_range(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
