"""Text of another machine, escaped for Markdown."""

from __future__ import annotations

import re

import pytest

from colora.common.foreign_text import markdown

ZERO_WIDTH_SPACE = "\u200b"
LINKED = re.compile(r"(https?|ftp)://|www\.|(mailto|xmpp):|@\w", re.IGNORECASE)  # what GitHub's Markdown links
TEXTS = (
    *(
        "see http://evil.example/x",
        "HTTPS://evil.example",
        "ftp://evil.example",
        "www.evil.example",
        "x WWW.Evil.example",
    ),
    *("mail eve@evil.example now", "mailto:eve@evil.example", "xmpp:eve@evil.example", "@eve", "cc @eve/team @@eve"),
)


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_in_a_foreign_text_becomes_a_link(text: str) -> None:
    """Some renderers look for links in the text without its backslashes."""
    assert LINKED.search(text)
    escaped = markdown(text)
    for shown in (escaped, escaped.replace("\\", "")):
        assert not LINKED.search(shown)
    assert escaped.replace("\\", "").replace(ZERO_WIDTH_SPACE, "") == text


def test_ordinary_names_stay_as_they_are() -> None:
    for text in ("sentence-transformers/all-MiniLM-L6-v2", "north.east-1", "asset:demo/north", "awww"):
        assert markdown(text) == text
