"""Atomic writes: a reader sees the old file or the new file, never a part of one. Array files have checksums."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DamagedError, StateError

META = "colora"  # key of the JSON text in the metadata of a safetensors file; a line with its checksum stands before it
CHECKSUM = "sha256:"  # begins that line; files that were written before there were checksums have none
DIGESTS = "sha256"  # key of the JSON object: the SHA-256 of each array, by name


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
    """Write named arrays and JSON-serializable metadata as one safetensors file, atomically. Raises StateError.

    The metadata hold the SHA-256 of every array and of themselves, which ``load_arrays`` checks.
    """
    from safetensors.numpy import save

    ordered = {key: np.ascontiguousarray(arrays[key]) for key in sorted(arrays)}
    digests = {key: _digest(array) for key, array in ordered.items()}
    text = json.dumps({**meta, DIGESTS: digests}, sort_keys=True)
    text = f"{CHECKSUM}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"
    write_atomically(path, save(ordered, metadata={META: text}), lasting=lasting)


def load_arrays(path: Path, *, prefix: str = "") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read arrays and metadata that ``save_arrays`` wrote, and check them against their SHA-256.

    Only arrays whose name starts with ``prefix`` are read and checked; the prefix is removed. Raises DamagedError for
    an incomplete or changed file, and StateError for one that cannot be opened.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            meta, digests = _metadata((file.metadata() or {})[META])
            names = list(file.keys())
            if digests is not None and set(names) != set(digests):
                raise ValueError("its arrays are not those of its metadata")
            arrays = {name: file.get_tensor(name) for name in names if name.startswith(prefix)}
        changed = [name for name, array in arrays.items() if digests is not None and _digest(array) != digests[name]]
        if changed:
            raise ValueError(f"the SHA-256 of {changed[0]} is not the stored one")
    except OSError as error:
        reason = error.strerror or str(error)
        raise StateError(str(path), "a readable file", reason, message=f"{path} cannot be read: {reason}.") from None
    except Exception as error:  # the bytes may be any
        found = "no metadata of colora" if isinstance(error, KeyError) else str(error)
        message = f"{path} is not a readable safetensors file of colora: {found}."
        raise DamagedError(str(path), "a complete safetensors file", found, message=message) from None
    return {name.removeprefix(prefix): array for name, array in arrays.items()}, meta


def has_checksum(path: Path) -> bool:
    """Whether a readable file of ``save_arrays`` has checksums. Older versions wrote none."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return (file.metadata() or {}).get(META, "").startswith(CHECKSUM)


def _metadata(text: str) -> tuple[dict[str, Any], dict[str, str] | None]:
    """Return the metadata, and the digests of the arrays; None for a file without checksums. Raises ValueError."""
    is_old = text.startswith("{")
    if not is_old:
        line, _, text = text.partition("\n")
        if line != CHECKSUM + hashlib.sha256(text.encode()).hexdigest():
            raise ValueError("the SHA-256 of its metadata is not the stored one")
    meta = json.loads(text)
    if not isinstance(meta, dict):
        raise ValueError("its metadata are not one object")
    return meta, meta.pop(DIGESTS, None) if not is_old else None


def _digest(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's type, shape and bytes."""
    state = hashlib.sha256(f"{array.dtype.str}|{array.shape}|".encode())
    state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()


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
