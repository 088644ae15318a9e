"""Follow a file that another process, or another part of this one, appends to."""

from __future__ import annotations

import re
from pathlib import Path

MAX_READ = 1 << 20  # bytes of a log per call


class FileTail:
    """Returns the complete lines that a growing file has got since the last call.

    It starts at ``start`` in bytes or, without it, at the current end. A file that has become shorter was begun anew,
    and is read from its beginning. A line that is longer than a call may read is left out.
    """

    def __init__(self, path: Path, start: int | None = None) -> None:
        size = path.stat().st_size if path.exists() else 0
        self.path, self.position = path, size if start is None else start
        self._skips = False  # the position is within a line that is left out

    def new(self, limit: int = -1) -> bytes:
        """Return the lines, of at most ``limit`` bytes. A partial last line is left for the next call."""
        if not self.path.exists():
            return b""
        with self.path.open("rb") as file:
            if self.path.stat().st_size < self.position:
                self.position, self._skips = 0, False
            file.seek(self.position)
            data = file.read(limit)
        text, end, _ = data.rpartition(b"\n")
        if not end:
            if len(data) == limit:  # no line ends in a full window: the next window would be the same one
                self.position, self._skips = self.position + limit, True
            return b""
        self.position += len(text) + len(end)
        if self._skips:
            self._skips, text = False, text.partition(b"\n")[2]
        return text


class LogTail:
    """Returns new matches in a growing log file, without consecutive duplicates. Starts at the current end."""

    def __init__(self, path: Path, pattern: re.Pattern[str]) -> None:
        self._tail, self.pattern, self.last = FileTail(path), pattern, ""

    def new(self) -> list[re.Match[str]]:
        """Return the matches in the complete lines written since the last call, one per line at most."""
        matches = []
        for line in self._tail.new(MAX_READ).decode(errors="replace").splitlines():
            match = self.pattern.search(line)
            if match and match[0] != self.last:
                self.last = match[0]
                matches.append(match)
        return matches
