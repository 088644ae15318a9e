"""The audit log of a site: one JSON line for everything that leaves the trainer, on disk before it leaves."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import StateError
from ...common.protocol.types import Arrays, SiteInfo, TrainReply, TrainRequest

FILE = "audit.jsonl"


class AuditLog:
    """``audit.jsonl`` of one federation, written by one thread at a time.

    Raises StateError when a line cannot be written: then nothing may leave.
    """

    def __init__(self, folder: Path, federation: str) -> None:
        self.path, self.federation = folder / FILE, federation

    def description(self, description: SiteInfo) -> int:
        """Notes a description; returns its bytes."""
        size = len(json.dumps(dataclasses.asdict(description)))
        return self._note("description", {"bytes": size})

    def reply(self, reply: TrainReply, order: TrainRequest, *, replayed: bool) -> int:
        """Notes a reply, array by array; returns its bytes (arrays, and metrics by name)."""
        arrays = arrays_of(reply.shared)
        size = sum(each["bytes"] for each in arrays) + sum(len(name) + 8 for name in reply.metrics)
        about = {"round": reply.round, "phase": order.kind, "key": reply.key, "replayed": replayed}
        return self._note("reply", {**about, "arrays": arrays, "metrics": sorted(reply.metrics), "bytes": size})

    def error(self, public: str) -> int:
        """Notes what the other side is told of an error."""
        return self._note("error", {"text": public, "bytes": len(public.encode())})

    def _note(self, kind: str, what: Mapping[str, Any]) -> int:
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "federation": self.federation, "kind": kind, **what}
        _append(self.path, json.dumps(line))
        return what["bytes"]


def arrays_of(arrays: Arrays) -> list[dict[str, Any]]:
    """Name, shape, type, bytes, L2 norm and SHA-256 of the bytes of each array."""
    found = []
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        flat = array.ravel()
        norm = math.sqrt(float(np.einsum("i,i->", flat, flat, dtype=np.float64)))  # without a copy in float64
        found.append(
            {
                "name": name,
                "shape": list(array.shape),
                "dtype": str(array.dtype),
                "bytes": array.nbytes,
                "norm": norm if math.isfinite(norm) else str(norm),
                "sha256": hashlib.sha256(array.data).hexdigest(),
            }
        )
    return found


def _append(path: Path, line: str) -> None:
    """A whole line at the end of the file, on disk, or none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"  # the process died while it wrote
            data = f"{chr(10) if torn else ''}{line}\n".encode()
            try:
                if os.write(handle, data) != len(data):
                    raise OSError("no room")
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)
    except OSError as error:
        raise StateError(FILE, f"room and permission to write {path}", error.strerror or error) from error
