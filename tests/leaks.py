"""The search for what must not leave a site: its personal tensors, and its texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from colora.common.atomic_io import load_arrays

WINDOW = 20  # characters of a text that must not be found together
OWN = ("state/", "moments/", "transfer/", "writer/")  # of a state file
Secret = tuple[str, np.ndarray]


def personal_tensors(states: Iterable[Path]) -> Iterator[Secret]:
    """Every tensor of these files of personal state, constant ones aside, by the file's path and its name.

    Cores, heads, private adapters, moments, and the discriminator and writer that were kept for a transfer.
    """
    for path in sorted(states):
        for key, value in load_arrays(path)[0].items():
            if (
                key.startswith(("state/", "moments/", "transfer/", "writer/"))
                and "/step" not in key
                and np.unique(value).size > 2
            ):
                yield f"{path}/{key}", value


def text_windows(files: Iterable[Path]) -> set[str]:
    """All windows of 20 characters of all values of these JSON lines."""
    lines = [line for path in files for line in path.read_text().splitlines()]
    return windows_of(str(value) for line in lines for value in json.loads(line).values())


def windows_of(texts: Iterable[str]) -> set[str]:
    """All windows of 20 characters of these texts."""
    return {text[i : i + WINDOW] for text in texts for i in range(max(0, len(text) - WINDOW + 1))}


def numbers_in(data: bytes) -> np.ndarray:
    """Whatever could be read as numbers of 4 or 8 bytes, wherever they begin: payloads of any form, decoded or not."""
    found = [np.zeros(0, np.float32)]
    with np.errstate(all="ignore"):
        for kind in (np.dtype("<f4"), np.dtype("<f8")):
            for start in range(kind.itemsize):
                if count := max(0, len(data) - start) // kind.itemsize:
                    found.append(np.frombuffer(data, kind, count, start).astype(np.float32))
    return np.unique(np.concatenate(found))


def leaks_in(values: np.ndarray, text: str, secrets: Iterable[Secret], windows: Iterable[str]) -> list[str]:
    """Tensors of which more than one value in twenty is among ``values``, and windows that are in ``text``.

    At least three values, or all of a smaller tensor's: in megabytes read at every offset any one number turns up.
    """
    there, found = np.append(np.unique(values), np.nan), []
    for name, secret in secrets:
        own = np.setdiff1d(np.unique(secret.astype(np.float32)), [0.0, 1.0])
        if (there[np.searchsorted(there, own)] == own).sum() > max(0.05 * own.size, min(own.size, 3) - 1):
            found.append(name)
    return found + [window for window in windows if window in text]
