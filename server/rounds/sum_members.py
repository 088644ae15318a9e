"""The sites of a secure sum: all attempts at a round have the same, also after a restart.

A site takes part with one list of sites in a round, since two sums over different lists could show one update.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.checked_entries import CheckedEntries
from .checkpoint import MAX_CHECKPOINTS

FILE = "members.json"  # beside the masked sums
MEMBERS = "members"  # of an entry: names of sites, in the order of the roster


@dataclass(frozen=True)
class SumMembers:
    """The lists of the last rounds, in a file of ``folder``. Raises StateError, and DamagedError for a damaged file."""

    folder: Path

    def of(self, t: int) -> tuple[str, ...]:
        """Return the sites of a round; none if no attempt has begun."""
        return tuple(self._file.read(_check).get(str(t), {MEMBERS: ()})[MEMBERS])

    def keep(self, t: int, members: tuple[str, ...]) -> None:
        """Write the sites of a round, before the first site is asked for its keys."""
        entries = self._file.read(_check)
        if str(t) not in entries:
            newest = sorted(entries, key=int)[-MAX_CHECKPOINTS:]
            self._file.write({**{name: entries[name] for name in newest}, str(t): {MEMBERS: members}})

    @property
    def _file(self) -> CheckedEntries:
        lost = "the sites of the rounds in progress are unknown"
        hint = "Restore it from a backup, or begin a federation with another name: the sites keep to their lists."
        return CheckedEntries(self.folder / FILE, "rounds", "lists of sites by round", lost, hint)


def _check(entry: Any) -> None:
    if not isinstance(entry, dict) or entry.keys() != {MEMBERS} or not isinstance(entry[MEMBERS], list):
        raise ValueError("an entry is no list of sites")
