"""Draws ``docs/assets/idea.svg``: what the coordinator averages, and what stays at each site."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from svg import arrowhead, box, line, picture, text

OUT = Path(__file__).resolve().parent.parent / "assets" / "idea.svg"
WIDTH, HEIGHT = 920, 500
CARD, TOP, TALL = 272, 190, 218
SITES = (("north", "sorts tickets", "Λ₁"), ("south", "sorts reviews", "Λ₂"), ("west", "sorts reports", "Λ₃"))
TITLE = "The coordinator averages the shared matrices A and B; data, core, head and private adapter stay at each site."
MIDDLE = {"text-anchor": "middle"}
BOLD = {"font-weight": 600}


def draw() -> str:
    """The picture as SVG."""
    return picture(WIDTH, HEIGHT, TITLE, [*_coordinator(), *_sites(), *_legend()])


def _coordinator() -> Iterator[str]:
    x, y = WIDTH / 2 - 190, 24
    yield box((x, y, 380, 84), "card", "edge")
    yield text((x + 18, y + 32), "Coordinator", **{"font-size": 17, **BOLD})
    yield text((x + 18, y + 55), "averages the A and B", "faint", **{"font-size": 13})
    yield text((x + 18, y + 72), "that the sites return", "faint", **{"font-size": 13})
    yield from _chip((x + 218, y + 24, 66), "A", "shared")
    yield from _chip((x + 296, y + 24, 66), "B", "shared")


def _sites() -> Iterator[str]:
    gap = (WIDTH - 3 * CARD) / 4
    for number, site in enumerate(SITES):
        x = gap + number * (CARD + gap)
        yield from _link(WIDTH / 2 + (number - 1) * 120, x + CARD / 2)
        yield from _card(x, *site)


def _link(start: float, end: float) -> Iterator[str]:
    top, bottom = 108, TOP
    middle = (top + bottom) / 2
    data = f"M{start:g} {top + 9} C{start:g} {middle:g} {end:g} {middle:g} {end:g} {bottom - 9}"
    yield line(data, "shared", stroke_width=2)
    yield arrowhead((start, top + 1), "shared", up=True)
    yield arrowhead((end, bottom - 1), "shared", up=False)
    yield text((end + 12, bottom - 12), "A, B", "shared", **{"font-size": 13, **BOLD})


def _card(x: float, name: str, job: str, core: str) -> Iterator[str]:
    yield box((x, TOP, CARD, TALL), "card", "edge")
    yield text((x + 16, TOP + 28), f"Site {name}", **{"font-size": 16, **BOLD})
    yield text((x + CARD - 16, TOP + 28), job, "faint", **{"font-size": 12, "text-anchor": "end"})
    yield from _chip((x + 20, TOP + 44, 98), "A", "shared")
    yield from _chip((x + 126, TOP + 44, 126), "B", "shared")
    yield box((x + 10, TOP + 92, CARD - 20, 116), "panel", "own", stroke_dasharray="5 4")
    yield from _chip((x + 20, TOP + 102, 98), "data", "own")
    yield from _chip((x + 126, TOP + 102, 126), f"core {core}", "own")
    yield from _chip((x + 20, TOP + 144, 98), "head", "own")
    yield from _chip((x + 126, TOP + 144, 126), "private adapter", "own", 12.5)
    yield text((x + CARD / 2, TOP + 199), "stays at the site", "own", **{"font-size": 12, **MIDDLE})


def _chip(place: tuple[float, float, float], words: str, kind: str, size: float = 14) -> Iterator[str]:
    x, y, width = place
    yield box((x, y, width, 36), f"{kind}-fill", kind, rx=6)
    yield text((x + width / 2, y + 23), words, kind, **{"font-size": size, **MIDDLE, **BOLD})


def _legend() -> Iterator[str]:
    y = TOP + TALL + 40
    equation = [("h = W₀x + s · ", "ink"), ("B", "shared"), (" Λₖ ", "own"), ("A", "shared"), (" x", "ink")]
    yield text((WIDTH / 2, y), equation, **{"font-size": 20, **MIDDLE})
    words = [
        ("W₀: frozen base model", "ink"),
        ("      A, B: shared, sent and averaged", "shared"),
        ("      Λₖ, head, private adapter: personal, never sent", "own"),
    ]
    yield text((WIDTH / 2, y + 30), words, **{"font-size": 13, **MIDDLE})


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
    print(OUT)
