"""Draws the learning curves of a run folder: ``python docs/scripts/draw_run.py runs/demo`` writes docs/assets/run.svg.

A curve is the mean over the sites of one metric by rounds trained: of the base model, of the shared adapter only and
of the personal models. Training alone (``baseline/``) is measured at its end, so it is a level. A site measures what
arrives, so metrics in the reply of round t belong to the model after round t − 1.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from svg import box, line, picture, text

OUT = Path(__file__).resolve().parent.parent / "assets" / "run.svg"
WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 590, 58, 322
METRICS = ("accuracy", "micro_f1", "rouge_l", "relative_error", "loss")  # the first that a run has is drawn
LOWER_IS_BETTER = ("relative_error", "loss")
CURVES = {"base": "faint", "shared": "shared", "personal": "own", "alone": "third"}
NAMES = {"base": "base model", "shared": "shared only", "personal": "personal", "alone": "alone"}
APART = 18  # pixels between two labels

Points = dict[int, float]  # rounds trained → mean over the sites


@dataclass(frozen=True)
class Scale:
    """Data to pixels."""

    rounds: int
    low: float
    high: float

    def x(self, rounds: float) -> float:
        """Pixels of a number of rounds."""
        return LEFT + (RIGHT - LEFT) * rounds / max(self.rounds, 1)

    def y(self, value: float) -> float:
        """Pixels of a metric's value."""
        return BOTTOM - (BOTTOM - TOP) * (value - self.low) / (self.high - self.low)


def read_replies(path: Path) -> dict[int, list[dict[str, float]]]:
    """Metrics of all sites by rounds trained; a round that was repeated after a restart counts once."""
    found: dict[tuple[int, str], dict[str, float]] = {}
    for words in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        event = json.loads(words)
        if event["event"] == "reply":
            found[event["round"] - 1, event["site"]] = event["metrics"]
    rounds: dict[int, list[dict[str, float]]] = {}
    for (number, _), metrics in sorted(found.items()):
        rounds.setdefault(number, []).append(metrics)
    return rounds


def curve(replies: dict[int, list[dict[str, float]]], name: str) -> Points:
    """The mean of one metric over the sites that measured it, where any did."""
    points: Points = {}
    for number, sites in replies.items():
        values = [metrics[name] for metrics in sites if metrics.get(name) is not None]
        if values:
            points[number] = sum(values) / len(values)
    return points


def curves_of(run: Path, metric: str | None) -> tuple[str, dict[str, Points]]:
    """The metric that is drawn, and the curves that the run has."""
    replies, alone = read_replies(run / "events.jsonl"), read_replies(run / "baseline" / "events.jsonl")
    metric = metric or next((name for name in METRICS if curve(replies, f"personal.{name}")), METRICS[0])
    curves = {kind: curve(replies, f"{kind}.{metric}") for kind in ("base", "shared", "personal")}
    curves["alone"] = curve(alone, f"personal.{metric}")
    if not curves["personal"]:
        raise SystemExit(f"{run}: no reply has personal.{metric}")
    return metric, {kind: points for kind, points in curves.items() if points}


def draw(metric: str, curves: dict[str, Points]) -> str:
    """The picture as SVG."""
    values = [value for points in curves.values() for value in points.values()]
    step = _step(max(values) - min(values))
    low, high = math.floor(min(values) / step) * step, math.ceil(max(values) / step) * step
    scale = Scale(max(max(points) for points in curves.values()), low, high if high > low else low + step)
    better = " (lower is better)" if metric in LOWER_IS_BETTER else ""
    title = f"{metric.replace('_', ' ')}, mean over the sites{better}"
    body = [text((LEFT, 32), title, **{"font-size": 15, "font-weight": 600}), *_axes(scale, step)]
    for kind, points in curves.items():
        body += _curve(kind, points, scale)
    return picture(WIDTH, HEIGHT, f"Learning curves: {title}", [*body, *_labels(curves, scale)])


def _axes(scale: Scale, step: float) -> Iterator[str]:
    for number in range(round((scale.high - scale.low) / step) + 1):
        value = scale.low + number * step
        yield line(f"M{LEFT} {scale.y(value):.2f} H{RIGHT}", "edge", **{"stroke-width": 1})
        words = f"{value:.{_decimals(step)}f}"
        yield text((LEFT - 10, scale.y(value) + 4), words, "faint", **{"font-size": 12, "text-anchor": "end"})
    every = max(1, round(_step(scale.rounds / 2)))
    for rounds in range(0, scale.rounds + 1, every):
        yield text((scale.x(rounds), BOTTOM + 22), str(rounds), "faint", **{"font-size": 12, "text-anchor": "middle"})
    middle = ((LEFT + RIGHT) / 2, BOTTOM + 44)
    yield text(middle, "rounds trained", "faint", **{"font-size": 12, "text-anchor": "middle"})


def _curve(kind: str, points: Points, scale: Scale) -> list[str]:
    level = kind in ("base", "alone")
    last = points[max(points)]
    placed = {0: last, scale.rounds: last} if level else points
    places = [(scale.x(rounds), scale.y(value)) for rounds, value in sorted(placed.items())]
    data = "M" + " L".join(f"{x:.2f} {y:.2f}" for x, y in places)
    drawn = [line(data, CURVES[kind], **{"stroke-width": 2, **({"stroke-dasharray": "6 4"} if level else {})})]
    if not level and len(places) <= 30:
        drawn += [box((x - 3.0, y - 3.0, 6, 6), CURVES[kind], CURVES[kind], rx=3) for x, y in places]
    return drawn


def _labels(curves: dict[str, Points], scale: Scale) -> Iterator[str]:
    """Names and last values at the right end, moved apart where they would overlap."""
    ends = sorted((scale.y(points[max(points)]), kind) for kind, points in curves.items())
    at = -math.inf
    for y, kind in ends:
        at = max(y + 4, at + APART)
        points = curves[kind]
        words = f"{NAMES[kind]} {points[max(points)]:.3f}"
        yield text((RIGHT + 14, at), words, CURVES[kind], **{"font-size": 13, "font-weight": 600})


def _step(span: float) -> float:
    """A round distance between two grid lines, of which about five fit."""
    power = 10.0 ** math.floor(math.log10(max(span, 1e-6) / 5))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor * 5 >= span)


def _decimals(step: float) -> int:
    return max(0, -math.floor(math.log10(step)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the learning curves of a run folder as SVG.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--metric", help="accuracy, rouge_l, relative_error, loss, …; default: the task's own")
    options = parser.parse_args()
    options.out.write_text(draw(*curves_of(options.run, options.metric)), encoding="utf-8")
    print(options.out)
