"""Reads a page as a browser does: its elements, its text, and the cells of its tables."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """All elements of a page with their attributes, the text outside of styles and scripts, and the tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.raw: dict[str, str] = {}
        self._open: list[str] = []
        self._caption = ""
        self.feed(text)
        assert not self._open, self._open
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._caption = ""
        elif tag == "tr":
            self.tables[self._caption].append([])
        elif tag in ("td", "th"):
            self.tables[self._caption][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        where = self._open[-1] if self._open else ""
        if where in ("style", "script"):
            self.raw[where] = data
            return
        self.texts.append(data)
        if where == "caption":
            self._caption = data
            self.tables[data] = []
        elif "table" in self._open and where not in ("caption", "text"):
            self.tables[self._caption][-1][-1] += data

    def column(self, caption: str, name: str) -> dict[str, str]:
        """First cell → the cell of one column of a table."""
        head, *rows = self.tables[caption]
        at = head.index(name)
        return {row[0]: row[at] for row in rows}
