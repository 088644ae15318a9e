"""Atomic writes: a reader sees the old file or the new file, never a part of one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import StateError

META = "colora"  # key of the JSON text in the metadata of a safetensors file


def write_atomically(path: Path, data: bytes, *, lasting: bool = True) -> None:
    """Write to a temporary file, fsync it, rename it, and fsync the folder.

    ``lasting=False`` skips fsync, for files that are not read after a crash of the machine. Raises StateError, and
    leaves the old file in place, if writing fails.
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
        reason = error.strerror or str(error)
        raise StateError(
            str(path),
            "space and permission to write",
            reason,
            message=f"{path} cannot be written: {reason}.",
            hint="Check free space and permissions.",
        ) from error


def _fsync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], *, lasting: bool = True) -> None:
    """Write named arrays and JSON-serializable metadata as one safetensors file, atomically. Raises StateError."""
    from safetensors.numpy import save

    ordered = {key: np.ascontiguousarray(arrays[key]) for key in sorted(arrays)}
    write_atomically(path, save(ordered, metadata={META: json.dumps(meta, sort_keys=True)}), lasting=lasting)


def load_arrays(path: Path, *, prefix: str = "") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read arrays and metadata that ``save_arrays`` wrote.

    Only arrays whose name starts with ``prefix`` are read; the prefix is removed. Raises StateError for an unreadable
    file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            meta = json.loads((file.metadata() or {}).get(META, "{}"))
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 (no mapping)
            return {key.removeprefix(prefix): file.get_tensor(key) for key in keys}, meta
    except (OSError, SafetensorError, ValueError) as error:
        message = f"{path} is not a readable safetensors file: {error}."
        raise StateError(str(path), "a complete safetensors file", error, message=message) from None


class ArrayFile(Mapping[str, np.ndarray]):
    """Arrays of a safetensors file by name, each read on access."""

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
