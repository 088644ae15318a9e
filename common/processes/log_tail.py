"""Follow a log file that another process, or another part of this one, appends to."""

from __future__ import annotations

import re
from pathlib import Path

MAX_READ = 1 << 20  # bytes per call


class LogTail:
    """Returns new matches in a growing log file, without consecutive duplicates. Starts at the current end."""

    def __init__(self, path: Path, pattern: re.Pattern[str]) -> None:
        self.path, self.pattern = path, pattern
        self.position = path.stat().st_size if path.exists() else 0
        self.last = ""

    def new(self) -> list[re.Match[str]]:
        """Return the matches in the complete lines written since the last call, one per line at most."""
        if not self.path.exists() or self.path.stat().st_size <= self.position:
            return []
        with self.path.open("rb") as file:
            file.seek(self.position)
            text, end, _ = file.read(MAX_READ).rpartition(b"\n")
        self.position += len(text) + len(end)
        matches = []
        for line in text.decode(errors="replace").splitlines():
            match = self.pattern.search(line)
            if match and match[0] != self.last:
                self.last = match[0]
                matches.append(match)
        return matches
