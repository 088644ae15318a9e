"""Text from outside: from another machine, or from a damaged file. Every such text is cut here and escaped per output.

``clean`` is applied where a text arrives: events, errors and logs hold nothing else. The escapes are applied where a
text is shown. Text for HTML is escaped by ``server/reporting/page/markup.py``.
"""

from __future__ import annotations

import re

MAX_TEXT = 200  # characters of one text from outside
ZERO_WIDTH_SPACE = "\u200b"
_LINKED = re.compile(r"(?<=:)(?=//)|(?<=www)(?=\.)|(?<=mailto)(?=:)|(?<=xmpp)(?=:)|(?<=@)", re.IGNORECASE)
_MARKUP = re.compile(r"([\\`*_{}\[\]<>()#+!|~&])")


def clean(text: object, limit: int = MAX_TEXT) -> str:
    """Return ``str(text)`` with at most ``limit`` characters, all printable; a longer text ends with "…"."""
    whole = str(text)
    cut = whole if len(whole) <= limit else whole[: limit - 1] + "…"
    return printable(cut)


def printable(text: str) -> str:
    """Replace control characters, line breaks and other unprintable characters with spaces."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def sanitize(text: str) -> str:
    """Escape text for a terminal: Rich's markup is escaped and control characters are replaced."""
    from rich.markup import escape

    return escape(printable(text))


def markdown(text: object) -> str:
    """Escape text for Markdown, in which it then has no markup, no HTML, no line break and nothing that becomes a link.

    Renderers link bare URLs, ``www.``, mail addresses and @names, and some look for them after they have removed the
    backslashes. So a zero-width space breaks these.
    """
    return _MARKUP.sub(r"\\\1", _LINKED.sub(ZERO_WIDTH_SPACE, printable(str(text))))
