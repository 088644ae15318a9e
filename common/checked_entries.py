"""A JSON file of entries by name, with their SHA-256, so that a damaged one is not taken for an empty one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .atomic_io import write_atomically
from .errors import DamagedError, StateError
from .foreign_text import clean

CHECKSUM = "sha256"
Entries = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class CheckedEntries:
    """The file ``path`` with the entries under ``key``.

    ``expected`` says what the file holds, ``lost`` what is unknown if it is damaged, and ``hint`` what to do then.
    """

    path: Path
    key: str
    expected: str
    lost: str
    hint: str

    def read(self, check: Callable[[Any], None]) -> Entries:
        """Return the entries; none without a file. ``check`` raises ValueError for an entry that cannot be one.

        Raises StateError for a file that cannot be opened, and DamagedError for one that is cut or changed.
        """
        try:
            return self._parse(self.path.read_bytes(), check)
        except FileNotFoundError:
            return {}
        except OSError as error:
            reason = error.strerror or str(error)
            message = f"{self.path} cannot be read: {reason}."
            raise StateError(str(self.path), "a readable file", reason, message=message) from None
        except (ValueError, RecursionError) as error:
            reason = clean(error)
            message = f"{self.path} is damaged, so {self.lost} ({reason})."
            raise DamagedError(str(self.path), self.expected, reason, message=message, hint=self.hint) from None

    def write(self, entries: Entries) -> None:
        """Replace the file. Raises StateError if that fails."""
        data = {CHECKSUM: _digest(entries), self.key: entries}
        write_atomically(self.path, json.dumps(data, indent=1).encode())

    def _parse(self, data: bytes, check: Callable[[Any], None]) -> Entries:
        found = json.loads(data)
        if not isinstance(found, dict) or found.keys() != {CHECKSUM, self.key}:
            raise ValueError(f"it is not {self.expected}")
        entries = found[self.key]
        if found[CHECKSUM] != _digest(entries):
            raise ValueError("its SHA-256 is not the stored one")
        if not isinstance(entries, dict):
            raise ValueError(f"it is not {self.expected}")
        for entry in entries.values():
            check(entry)
        return entries


def _digest(entries: Any) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
