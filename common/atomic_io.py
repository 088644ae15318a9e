"""Writing to disk so that a reader sees the old file or the new one, never half of either."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import StateError

META = "colora"


def write_atomically(path: Path, data: bytes, *, lasting: bool = True) -> None:
    """Write, fsync, rename, fsync the folder. Raises StateError (and leaves the old file) when the disk refuses.

    A file that nothing reads after a crash of the machine (``lasting`` false) goes without fsync.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            if lasting:
                os.fsync(file.fileno())
        Path(temporary).replace(path)
        if lasting:
            _fsync_folder(path.parent)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise StateError(str(path), "room and permission to write", error.strerror or error) from error


def _fsync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], *, lasting: bool = True) -> None:
    """Arrays (name → array) and a JSON-able ``meta`` as one safetensors file, atomically."""
    from safetensors.numpy import save

    ordered = {key: np.ascontiguousarray(arrays[key]) for key in sorted(arrays)}
    write_atomically(path, save(ordered, metadata={META: json.dumps(meta, sort_keys=True)}), lasting=lasting)


def load_arrays(path: Path, *, prefix: str = "") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What :func:`save_arrays` wrote; only the arrays whose name starts with ``prefix``, without it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            meta = json.loads((file.metadata() or {}).get(META, "{}"))
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 (no mapping)
            return {key.removeprefix(prefix): file.get_tensor(key) for key in keys}, meta
    except (OSError, SafetensorError, ValueError) as error:
        raise StateError(str(path), "a whole safetensors file", error) from None


class ArrayFile(Mapping[str, np.ndarray]):
    """The arrays of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._file = safe_open(path, framework="numpy")
        self._keys = dict.fromkeys(sorted(self._file.keys()))

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self._keys:
            raise KeyError(key)
        return self._file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
