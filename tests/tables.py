"""Tables of what was tried and what came of it: printed by a test, and written as Markdown to ``$COLORA_TABLES``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def show_table(name: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table, and write it to ``NAME.md`` in the folder of the environment variable if it is set."""
    cells = [columns, ["---"] * len(columns), *rows]
    lines = ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in cells]
    print(f"\n{name}", *lines, sep="\n")
    if folder := os.environ.get("COLORA_TABLES"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
