"""Search messages for what must not leave a site: personal tensors and texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from colora.common.atomic_io import load_arrays

WINDOW = 20  # length of the text windows to search for, in characters
PERSONAL = (
    "state/",
    "moments/",
    "local/",
    "local-moments/",
    "transfer/",
    "writer/",
)  # prefixes of personal tensors in a state file
Secret = tuple[str, np.ndarray]  # (file and name, values)


def personal_tensors(states: Iterable[Path]) -> Iterator[Secret]:
    """Yield every personal tensor of these state files, except constant ones.

    These are cores, heads, private adapters, optimizer states, and the discriminator and generator of a transfer.
    """
    for path in sorted(states):
        for key, value in load_arrays(path)[0].items():
            if key.startswith(PERSONAL) and "/step" not in key and np.unique(value).size > 2:
                yield f"{path}/{key}", value


def text_windows(files: Iterable[Path]) -> set[str]:
    """Return all text windows of all values in these JSON lines files."""
    lines = [line for path in files for line in path.read_text().splitlines()]
    return windows_of(str(value) for line in lines for value in json.loads(line).values())


def windows_of(texts: Iterable[str]) -> set[str]:
    """Return all text windows of these texts."""
    return {text[i : i + WINDOW] for text in texts for i in range(max(0, len(text) - WINDOW + 1))}


def numbers_in(data: bytes) -> np.ndarray:
    """Return all numbers that a payload contains as floats of 4 or 8 bytes, at any offset and in any encoding."""
    numbers = [np.zeros(0, np.float32)]
    with np.errstate(all="ignore"):
        for kind in (np.dtype("<f4"), np.dtype("<f8")):
            for start in range(kind.itemsize):
                if count := max(0, len(data) - start) // kind.itemsize:
                    numbers.append(np.frombuffer(data, kind, count, start).astype(np.float32))
    return np.unique(np.concatenate(numbers))


def leaks_in(values: np.ndarray, text: str, secrets: Iterable[Secret], windows: Iterable[str]) -> list[str]:
    """Return tensors of which more than 5 % of the values are in ``values``, and windows that are in ``text``.

    At least three values must match, or all of a smaller tensor, since single values occur by chance in megabytes that
    are read at every offset.
    """
    present, leaked = np.append(np.unique(values), np.nan), []
    for name, secret in secrets:
        own = np.setdiff1d(np.unique(secret.astype(np.float32)), [0.0, 1.0])
        if (present[np.searchsorted(present, own)] == own).sum() > max(0.05 * own.size, min(own.size, 3) - 1):
            leaked.append(name)
    return leaked + [window for window in windows if window in text]
