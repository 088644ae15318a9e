"""Draws ``docs/assets/architecture.svg``: the processes of a deployed federation, and who connects to whom."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from svg import box, line, picture, text

OUT = Path(__file__).resolve().parent.parent / "assets" / "architecture.svg"
WIDTH, HEIGHT = 920, 380
TITLE = "The processes of a deployed federation: gateway, SuperLink and ServerApp; SuperNode, ClientApp and trainer."
BOLD = {"font-weight": 600}
MIDDLE = {"text-anchor": "middle"}

Frame = tuple[float, float, float, float]
GATEWAY: Frame = (252, 96, 150, 66)
SUPERLINK: Frame = (252, 196, 150, 66)
SERVERAPP: Frame = (42, 196, 170, 66)
SUPERNODE: Frame = (516, 96, 136, 66)
CLIENTAPP: Frame = (516, 196, 136, 66)
TRAINER: Frame = (714, 178, 168, 122)


def draw() -> str:
    """The picture as SVG."""
    return picture(WIDTH, HEIGHT, TITLE, [*_machines(), *_links(), *_processes()])


def _machines() -> Iterator[str]:
    for x, width, name, command in ((22, 400, "Coordinator", "colora server"), (500, 400, "Site", "colora client")):
        yield box((x, 22, width, 336), "card", "edge")
        yield text((x + 20, 54), name, **{"font-size": 17, **BOLD})
        told = f"{command} keeps these processes running"
        yield text((x + 20, 76), told, "faint", **{"font-size": 12})
    box_of_data = (704, 92, 188, 224)
    yield box(box_of_data, "panel", "own", **{"stroke-dasharray": "5 4"})
    yield text((798, 116), "stays at the site", "own", **{"font-size": 12, **MIDDLE})
    for row, words in enumerate(("data", "personal state")):
        yield text((798, 134 + 16 * row), words, "faint", **{"font-size": 12, **MIDDLE})


def _links() -> Iterator[str]:
    yield _arrow(516, 129, 402, 129, "shared")
    yield text((459, 118), "TLS", "shared", **{"font-size": 12, **MIDDLE, **BOLD})
    yield _arrow(327, 162, 327, 196, "ink")
    yield _arrow(212, 229, 252, 229, "ink")
    yield _arrow(584, 162, 584, 196, "ink")
    yield _arrow(652, 229, 714, 229, "shared")
    yield text((678, 219), "gRPC", "shared", **{"font-size": 11, **MIDDLE, **BOLD})


def _processes() -> Iterator[str]:
    yield from _process(GATEWAY, "gateway", ("the only open port",))
    yield from _process(SUPERLINK, "SuperLink", ("loopback only",))
    yield from _process(SERVERAPP, "ServerApp", ("rounds, admission,", "aggregation"))
    yield from _process(SUPERNODE, "SuperNode", ("connects out",))
    yield from _process(CLIENTAPP, "ClientApp", ("one per message,", "no torch"))
    words = ("base model, loaded once;", "trains and evaluates;", "returns shared arrays", "and metrics only")
    yield from _process(TRAINER, "trainer", words)
    yield text((222, 318), "run folder: events, checkpoints", "faint", **{"font-size": 12, **MIDDLE})
    yield text((584, 318), "runs code that the", "faint", **{"font-size": 12, **MIDDLE})
    yield text((584, 334), "coordinator ships", "faint", **{"font-size": 12, **MIDDLE})


def _process(frame: Frame, name: str, about: tuple[str, ...]) -> Iterator[str]:
    x, y, width, height = frame
    yield box(frame, "shared-fill", "shared", rx=6)
    middle = x + width / 2
    top = y + height / 2 - 8 * len(about)
    yield text((middle, top + 5), name, **{"font-size": 14, **MIDDLE, **BOLD})
    for row, words in enumerate(about):
        yield text((middle, top + 22 + 15 * row), words, "faint", **{"font-size": 11.5, **MIDDLE})


def _arrow(x: float, y: float, to_x: float, to_y: float, color: str) -> str:
    """A line with a head at its end, along one axis."""
    if y == to_y:
        back = to_x - 7 if to_x > x else to_x + 7
        head = f"M{back} {y - 5} L{to_x} {y} L{back} {y + 5}"
    else:
        back = to_y - 7 if to_y > y else to_y + 7
        head = f"M{x - 5} {back} L{x} {to_y} L{x + 5} {back}"
    return line(f"M{x} {y} L{to_x} {to_y} {head}", color, **{"stroke-width": 2})


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
    print(OUT)
