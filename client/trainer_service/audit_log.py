"""The audit log of a site: one JSON line for everything that leaves the trainer, written to disk before it is sent.

A federation's log is in its state folder. Refused plans are in a log of the whole site, since they get no folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import StateError
from ...common.protocol.types import Arrays, SiteInfo, SumReply, TrainReply, TrainRequest, hash_arrays

FILE = "audit.jsonl"
OLDER = "audit-older.jsonl"  # the site's log before it reached MAX_SITE_LOG; what was there is overwritten
MAX_SITE_LOG = 8_000_000  # bytes of the log of refused plans, which anyone who reaches the trainer can fill
MAX_REASON = 600  # characters


class AuditLog:
    """The ``audit.jsonl`` of one federation. One thread at a time may write to it.

    ``unusual`` are the sentences on what is out of the ordinary in the federation's plan; every line repeats them.
    Every method raises StateError when the line cannot be written. Nothing may be sent in that case.
    """

    def __init__(self, folder: Path, federation: str, unusual: Sequence[str] = ()) -> None:
        self.path, self.federation, self.unusual = folder / FILE, federation, list(unusual)

    def site_info(self, info: SiteInfo) -> int:
        """Record a site description; return its size in bytes."""
        size = len(json.dumps(dataclasses.asdict(info)))
        return self._record("description", {"bytes": size})

    def reply(
        self,
        reply: TrainReply,
        request: TrainRequest,
        *,
        replayed: bool,
        withheld: Sequence[str] = (),
        rounded: Sequence[str] = (),
    ) -> int:
        """Record a reply with each of its arrays; return its size in bytes (arrays and named metrics).

        ``withheld`` are the metrics that the site did not send, and ``rounded`` those that it rounded.
        """
        arrays = describe_arrays(reply.shared)
        size = sum(each["bytes"] for each in arrays) + sum(len(name) + 8 for name in reply.metrics)
        context = {"round": reply.round, "phase": request.kind, "key": reply.key, "replayed": replayed}
        kept = {name: list(values) for name, values in (("withheld", withheld), ("rounded", rounded)) if values}
        fields = {**context, "arrays": arrays, "metrics": sorted(reply.metrics), **kept, "bytes": size}
        return self._record("reply", fields)

    def sum(self, reply: SumReply) -> int:
        """Record a step of a secure sum; return the size of its body in bytes."""
        size, content = len(reply.body), hashlib.sha256(reply.body).hexdigest()
        fields = {"round": reply.round, "phase": reply.step, "key": reply.key, "sha256": content, "bytes": size}
        return self._record("sum", fields)

    def received(self, number: int, arrays: Arrays) -> int:
        """Record the shared adapter of a round that the ClientApp reads to apply a difference to it; return its size.

        It came from the coordinator and does not leave the site.
        """
        size = sum(array.nbytes for array in arrays.values())
        return self._record("received", {"round": number, "sha256": hash_arrays(arrays), "bytes": size})

    def error(self, public: str, reason: str = "") -> int:
        """Record the public text of an error and, for the site only, its full text; return the size of the first."""
        told = {"reason": reason[:MAX_REASON]} if reason else {}
        return self._record("error", {"text": public, **told, "bytes": len(public.encode())})

    def refusal(self, public: str, reason: str) -> int:
        """Record a refused plan in the log of the whole site: what was answered, and why. Return the answer's size."""
        if self.path.is_file() and self.path.stat().st_size > MAX_SITE_LOG:
            self.path.replace(self.path.with_name(OLDER))
        return self._record("refusal", {"text": public, "reason": reason[:MAX_REASON], "bytes": len(public.encode())})

    def _record(self, kind: str, fields: Mapping[str, Any]) -> int:
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "federation": self.federation, "kind": kind, **fields}
        if self.unusual:
            line["unusual"] = self.unusual
        _append(self.path, json.dumps(line))
        return fields["bytes"]


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return one line of an audit log; None for a damaged one, as a kill in the middle of a write leaves it."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def describe_arrays(arrays: Arrays) -> list[dict[str, Any]]:
    """Return the name, shape, dtype, size in bytes, L2 norm and SHA-256 of each array."""
    entries = []
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        flat = array.ravel()
        norm = math.sqrt(float(np.einsum("i,i->", flat, flat, dtype=np.float64)))  # without a copy in float64
        entries.append(
            {
                "name": name,
                "shape": list(array.shape),
                "dtype": str(array.dtype),
                "bytes": array.nbytes,
                "norm": norm if math.isfinite(norm) else str(norm),
                "sha256": hashlib.sha256(array.data).hexdigest(),
            }
        )
    return entries


def _append(path: Path, line: str) -> None:
    """Append one complete line and sync it to disk, or leave the file unchanged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            size = os.fstat(handle).st_size
            is_torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"  # the process died during a write
            data = f"{chr(10) if is_torn else ''}{line}\n".encode()
            try:
                if os.write(handle, data) != len(data):
                    raise OSError("no space left")
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)
    except OSError as error:
        raise StateError(
            FILE,
            f"space and permission to write {path}",
            error.strerror or error,
            message=f"Cannot write the audit log {path}: {error.strerror or error}.",
            hint="Nothing is sent without an audit entry: free disk space or correct the permissions.",
        ) from error
