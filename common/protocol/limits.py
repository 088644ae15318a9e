"""Ranges of all numbers that arrive from another machine. Both sides apply them where they decode a message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import RefusedError
from ..event_log import in_range
from ..foreign_text import MAX_TEXT

MAX_ROUND = 999_999  # file names of states and checkpoints have six digits
MAX_COUNT = 10**12  # of examples or loss terms
MAX_CLASSES = 100_000
MAX_SECONDS = 1e9
MAX_PLAN = 1 << 18  # characters of a plan as JSON; every other text has at most MAX_TEXT
RANGES: Mapping[str, tuple[float, float]] = {
    "round": (0, MAX_ROUND),  # 0 of a spectral start
    "admitted_round": (0, MAX_ROUND),
    "protocol": (0, MAX_COUNT),
    **dict.fromkeys(("terms", "examples", "train", "test", "truncated", "dropped"), (0, MAX_COUNT)),
    "classes": (0, MAX_CLASSES),
    "rank": (0, MAX_COUNT),
    "seconds": (0, MAX_SECONDS),
    "measuring": (0, MAX_SECONDS),
}


def check_values(values: Mapping[str, Any], site: str | None = None) -> None:
    """Check that each number named in ``RANGES`` is finite and in its range, and that no text is too long.

    ``values`` are the fields of a message, with the types that they must have. Raises RefusedError.
    """
    for field, (low, high) in RANGES.items():
        value = values.get(field, low)
        if not low <= value <= high:  # NaN is in no range
            raise RefusedError(field, f"{low:g} to {high:g}", value, site=site)
    for field, value in values.items():
        limit = MAX_PLAN if field == "plan" else MAX_TEXT
        if isinstance(value, str) and len(value) > limit:
            raise RefusedError(field, f"at most {limit} characters", f"{len(value)} characters", site=site)


def measured(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Return the metrics with None for each value that is not finite or too large for an event.

    A diverged model of an honest site has such values, so they do not make a reply wrong.
    """
    return {name: value if in_range(value) else None for name, value in metrics.items()}
