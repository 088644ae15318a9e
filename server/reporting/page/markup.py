"""HTML elements. Every text is escaped unless it is ``Html``, so that a text from a site is never markup."""

from __future__ import annotations

import html
from collections.abc import Iterable

from ....common.foreign_text import printable

VOID = ("meta", "input", "rect", "line", "polyline")  # elements without content
LONG = 40  # rows of a table beyond which it scrolls by itself


class Html(str):
    """Finished markup, which is not escaped again."""

    __slots__ = ()


def escape(value: object) -> Html:
    """Return a text as markup: escaped, without control characters. ``Html`` is returned unchanged."""
    return value if isinstance(value, Html) else Html(html.escape(printable(str(value))))


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """Return one element. Children that are None are left out; so are attributes that are None or False.

    In attribute names ``class_`` stands for ``class``, and ``_`` for ``-``.
    """
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Html(f"<{name}{given}/>" if name not in ("meta", "input") else f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(children)}</{name}>")


def join(parts: Iterable[object]) -> Html:
    """Return the parts as markup, one after the other."""
    return Html("".join(escape(part) for part in parts if part is not None))


def table(head: Iterable[object], rows: Iterable[Iterable[object]], *, caption: str, class_: str = "") -> Html:
    """Return a table in a frame that scrolls sideways. The first cell of a row is its heading.

    A cell that is already a ``td`` or ``th`` element is used as it is.
    """
    body = [element("tr", *(_cell(cell, first=not i) for i, cell in enumerate(row))) for row in rows]
    heading = element("tr", *(_heading(cell) for cell in head))
    content = element(
        "table",
        element("caption", caption),
        element("thead", heading),
        element("tbody", *body),
        class_=class_ or None,
    )
    frame = "scroll tall" if len(body) > LONG else "scroll"
    return element("div", content, class_=frame, tabindex=0, role="group", aria_label=caption)


def details(summary: str, *content: object, open_: bool = False) -> Html:
    """Return content behind a line that opens it."""
    return element("details", element("summary", summary), *content, open=open_)


def _cell(cell: object, *, first: bool) -> Html:
    if isinstance(cell, Html) and cell.startswith(("<td", "<th")):
        return cell
    return element("th", cell, scope="row") if first else element("td", cell)


def _heading(cell: object) -> Html:
    if isinstance(cell, Html) and cell.startswith("<th"):
        return cell
    return element("th", cell, scope="col")
