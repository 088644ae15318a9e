"""Elements of an SVG picture as text: colors for light and dark pages, boxes, labels and lines."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

LIGHT = {
    "panel": "#ffffff",
    "card": "#f6f8fa",
    "edge": "#d0d7de",
    "ink": "#1f2328",
    "faint": "#59636e",
    "shared": "#0969da",
    "shared-fill": "#ddf4ff",
    "own": "#bc4c00",
    "own-fill": "#fff1e5",
    "third": "#1a7f37",
}
DARK = {
    "panel": "#0d1117",
    "card": "#161b22",
    "edge": "#3d444d",
    "ink": "#f0f6fc",
    "faint": "#9198a1",
    "shared": "#58a6ff",
    "shared-fill": "#10233d",
    "own": "#f0883e",
    "own-fill": "#341d0c",
    "third": "#3fb950",
}
FONT = "text { font-family: system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif }"


def picture(width: int, height: int, title: str, body: Iterable[str]) -> str:
    """A whole SVG document with its own background, which follows the reader's light or dark setting."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">'
    )
    style = ["<style>", FONT, *_rules(LIGHT), "@media (prefers-color-scheme: dark) {", *_rules(DARK), "}", "</style>"]
    ground = box((0.5, 0.5, width - 1, height - 1), "panel", "edge", rx=12)
    return "\n".join([head, f"<title>{escape(title)}</title>", *style, ground, *body, "</svg>", ""])


def box(frame: tuple[float, float, float, float], fill: str, edge: str, **more: object) -> str:
    """A rounded rectangle: (x, y, width, height) in named colors."""
    x, y, width, height = frame
    return _element("rect", {"x": x, "y": y, "width": width, "height": height, "rx": 8, **more}, f"f-{fill} s-{edge}")


def text(at: tuple[float, float], words: str | Iterable[tuple[str, str]], color: str = "ink", **more: object) -> str:
    """One line of text with its baseline at (x, y): words, or several (words, color) after one another."""
    parts = [(words, color)] if isinstance(words, str) else list(words)
    inner = "".join(f'<tspan class="f-{color}">{escape(part)}</tspan>' for part, color in parts)
    return _element("text", {"x": at[0], "y": at[1], "font-size": 14, "xml:space": "preserve", **more}, "", inner)


def line(data: str, color: str, **more: object) -> str:
    """A line without a fill, by SVG path commands."""
    return _element("path", {"d": data, "fill": "none", "stroke-width": 1.5, **more}, f"s-{color}")


def arrowhead(tip: tuple[float, float], color: str, *, up: bool) -> str:
    """A triangle with its tip at (x, y), pointing up or down."""
    x, y = tip
    base = y + 9 if up else y - 9
    return _element("path", {"d": f"M{x:g} {y:g} L{x - 5:g} {base:g} L{x + 5:g} {base:g} Z"}, f"f-{color}")


def _element(tag: str, attributes: dict[str, object], classes: str, inner: str = "") -> str:
    named = {name.replace("_", "-"): value for name, value in attributes.items()}
    named |= {"class": classes} if classes else {}
    written = " ".join(f'{name}="{_number(value)}"' for name, value in named.items())
    return f"<{tag} {written}>{inner}</{tag}>" if inner else f"<{tag} {written}/>"


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else escape(str(value))


def _rules(colors: dict[str, str]) -> list[str]:
    return [f".f-{name} {{ fill: {value} }} .s-{name} {{ stroke: {value} }}" for name, value in colors.items()]
