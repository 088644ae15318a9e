"""Code blocks of the README and the documentation, and how each of them is checked.

``<!-- not run: REASON -->`` on the line before a block leaves it out. What the kinds mean stands in
``docs/extending/documentation.md``. ``python docs/scripts/code_blocks.py`` lists all blocks.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^`]*)$")
TITLE = re.compile(r'title="([^"]*)"')
NOT_RUN = re.compile(r"^\s*<!-- not run: (?P<reason>.+) -->\s*$")
KINDS = ("python", "recipe", "site", "sites", "bash", "text")
TOML = {"site.toml": "site", "sites.toml": "sites"}  # by title; any other title is a recipe's


@dataclass(frozen=True)
class Block:
    """One fenced block. ``not_run`` is the reason why it is left out, if it is."""

    path: Path
    line: int  # of its fence
    language: str
    title: str
    code: str
    not_run: str = ""

    @property
    def name(self) -> str:
        """Where it is, for people."""
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    @property
    def kind(self) -> str:
        """One of ``KINDS``. Raises ValueError for a block that no check knows."""
        if self.language == "toml" and self.title:
            return TOML.get(self.title, "recipe")
        if self.language not in ("python", "bash", "text", "markdown"):
            raise ValueError(
                f"{self.name}: a language of python, toml with a title, bash or text, not {self.language!r}"
            )
        return "text" if self.language == "markdown" else self.language


def documents() -> list[Path]:
    """The README and all pages."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(path: Path) -> Iterator[Block]:
    """The blocks of one file, in order; one inside a longer fence is text of that one."""
    lines, at = path.read_text(encoding="utf-8").splitlines(), 0
    while at < len(lines):
        fence = FENCE.match(lines[at])
        if fence:
            end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == fence["ticks"])
            yield _block(path, lines, at, end)
            at = end
        at += 1


def all_blocks() -> list[Block]:
    """Every block of every document."""
    return [block for path in documents() for block in blocks_of(path)]


def commands(block: Block) -> list[list[str]]:
    """The words of every ``colora`` command in a bash block, without ``colora`` itself."""
    found = []
    for line in block.code.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if words[:1] == ["colora"]:
                found.append(words[1:])
    return found


def whole_recipe(fragment: dict[str, Any]) -> dict[str, Any]:
    """A recipe's fragment with the required keys that it leaves out."""
    whole = {"name": "fragment", "rounds": 1, **fragment}
    whole["model"] = {"source": "asset:minilm-l6", **fragment.get("model", {})}
    if "site" not in fragment and "partition" not in fragment:
        whole["site"] = [{"name": "north", "source": "north.csv"}]
    return whole


def whole_site(fragment: dict[str, Any]) -> dict[str, Any]:
    """A site file's fragment with the required keys that it leaves out."""
    return {"name": "north", **fragment, "data": {"source": "north.csv", **fragment.get("data", {})}}


def _block(path: Path, lines: list[str], start: int, end: int) -> Block:
    fence = FENCE.match(lines[start])
    assert fence
    language, _, rest = fence["info"].strip().partition(" ")
    title, before = TITLE.search(rest), NOT_RUN.match(lines[start - 1]) if start else None
    code = "\n".join(line.removeprefix(fence["indent"]) for line in lines[start + 1 : end]) + "\n"
    return Block(path, start + 1, language, title[1] if title else "", code, before["reason"] if before else "")


if __name__ == "__main__":
    for block in all_blocks():
        told = f"not run: {block.not_run}" if block.not_run else block.kind
        print(f"{block.name}: {told}")
