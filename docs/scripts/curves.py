"""Draws the curves of docs/evidence.md: accuracy of CoLoRA and of local-only training against one quantity."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from svg import line, picture, text

WIDTH, HEIGHT = 640, 330
LEFT, RIGHT, TOP, BOTTOM = 64.0, 500.0, 56.0, 264.0  # the area of the curves
STEP = 0.05  # between grid lines
SMALL = {"font-size": 13}
NAMES = {"shared": "CoLoRA", "own": "local-only"}  # the curve of each color


@dataclass(frozen=True)
class Point:
    """One place on the horizontal axis: its label, and the mean accuracy of both methods at each seed."""

    label: str
    ours: Sequence[float]
    alone: Sequence[float]

    @property
    def gains(self) -> list[float]:
        """Accuracy of CoLoRA minus that of local-only training, by seed."""
        return [mine - own for mine, own in zip(self.ours, self.alone, strict=True)]


def draw(title: str, across: str, points: Sequence[Point]) -> str:
    """Return both curves as SVG, with one standard error over seeds on both sides of each point."""
    values = [value for point in points for value in (*point.ours, *point.alone)]
    low, high = math.floor(min(values) / STEP) * STEP, math.ceil(max(values) / STEP) * STEP
    height = _Scale(low, high)
    places = [LEFT + 24 + i * (RIGHT - LEFT - 48) / (len(points) - 1) for i in range(len(points))]
    body = [text((24, 32), title, **{"font-size": 15, "font-weight": 600}), *_axes(height, places, points, across)]
    for color, name in NAMES.items():
        taken = [point.ours if color == "shared" else point.alone for point in points]
        body += _curve(color, height, places, taken)
        end = height.at(statistics.mean(taken[-1]))
        body.append(text((RIGHT + 10, end + 5), name, color, **{"font-weight": 600, **SMALL}))
    return picture(WIDTH, HEIGHT, f"{title}, against {across}", body)


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float

    def at(self, value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - self.low) / (self.high - self.low)


def _axes(height: _Scale, places: Sequence[float], points: Sequence[Point], across: str) -> Iterator[str]:
    for i in range(round((height.high - height.low) / STEP) + 1):
        value = height.low + i * STEP
        y = height.at(value)
        yield line(f"M{LEFT:g} {y:.1f} L{RIGHT:g} {y:.1f}", "edge", stroke_width=1)
        yield text((LEFT - 10, y + 4), f"{value:.2f}", "faint", **{"text-anchor": "end", **SMALL})
    for x, point in zip(places, points, strict=True):
        yield text((x, BOTTOM + 22), point.label, "faint", **{"text-anchor": "middle", **SMALL})
    yield text(((LEFT + RIGHT) / 2, BOTTOM + 46), across, "faint", **{"text-anchor": "middle", **SMALL})


def _curve(color: str, height: _Scale, places: Sequence[float], taken: Sequence[Sequence[float]]) -> Iterator[str]:
    means = [height.at(statistics.mean(values)) for values in taken]
    steps = " L".join(f"{x:.1f} {y:.1f}" for x, y in zip(places, means, strict=True))
    yield line(f"M{steps}", color, stroke_width=2.5, stroke_linejoin="round")
    for x, y, values in zip(places, means, taken, strict=True):
        yield line(f"M{x - 0.01:.2f} {y:.1f} L{x + 0.01:.2f} {y:.1f}", color, stroke_width=9, stroke_linecap="round")
        if len(values) > 1:
            error = statistics.stdev(values) / len(values) ** 0.5
            top, bottom = (height.at(statistics.mean(values) + sign * error) for sign in (1, -1))
            yield line(f"M{x:.1f} {top:.1f} L{x:.1f} {bottom:.1f}", color)
