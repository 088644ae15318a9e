"""Charts as SVG inside HTML. Positions are percentages, so that charts have any width and texts keep their size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .formats import number
from .markup import Html, element, join

HEIGHT, MARGIN = 260, 12  # pixels of a line chart, and above and below its curves
MAX_MARKERS = 40  # points of a curve beyond which it has no markers
Points = Mapping[int, float]


@dataclass(frozen=True)
class Axis:
    """A linear axis that begins and ends at a tick."""

    low: float
    high: float
    step: float

    def at(self, value: float) -> float:
        """The position of a value, in percent of the axis."""
        return 100 * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """The values of the grid lines."""
        return [self.low + i * self.step for i in range(round((self.high - self.low) / self.step) + 1)]

    def label(self, value: float) -> str:
        """The text of a tick."""
        decimals = max(0, -math.floor(math.log10(self.step)))
        text = f"{abs(value):.{decimals}f}" if self.high < 1e6 else f"{abs(value):.3g}"
        return ("−" if value < 0 and text.strip("0.") else "") + text


@dataclass(frozen=True)
class Series:
    """A curve with a name and a CSS class. A ``level`` is a horizontal line at its last value."""

    name: str
    class_: str
    points: Points
    level: bool = False

    @property
    def moves(self) -> bool:
        """Whether it changes with the rounds: the base model never does."""
        return self.class_ != "base"


def make_axis(values: Sequence[float], ticks: int = 4) -> Axis:
    """An axis around these values (at least one) with about so many grid lines."""
    low, high = min(values), max(values)
    step = nice_step((high - low) / ticks, scale=max(abs(low), abs(high)))
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Axis(low, high if high > low else low + step, step)


def nice_step(span: float, scale: float = 1.0) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is at least ``span``; for no span a part of ``scale``."""
    span = max(span, abs(scale) * 1e-3, 1e-9)
    power = 10.0 ** math.floor(math.log10(span))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= span * (1 - 1e-9))


def percent(value: float) -> str:
    """A position as an attribute."""
    return f"{min(max(value, -5), 105):.2f}".rstrip("0").rstrip(".") + "%"


def line_chart(series: Sequence[Series], *, label: str, last: int, x_label: str, first: int = 0) -> Html:
    """Curves over rounds from ``first`` to ``last``. A pointer or the arrow keys read the values of one round."""
    drawn = [s for s in series if s.points]
    axis = make_axis([value for s in drawn for value in s.points.values()])
    across = Axis(first, max(last, first + 1), 1)
    lines = [
        element("line", x1="0", x2="100%", y1=_y(axis, tick), y2=_y(axis, tick), class_="grid") for tick in axis.ticks()
    ]
    texts = [
        element("text", axis.label(tick), x="40", y=_y(axis, tick), dy="4", text_anchor="end") for tick in axis.ticks()
    ]
    columns = _columns(drawn, across, axis)
    plot = element(
        "svg", *lines, *(_curve(s, across, axis) for s in drawn), *columns, class_="plot", width="100%", height=HEIGHT
    )
    chart = element(
        "div",
        element("svg", *texts, class_="axis", width="44", height=HEIGHT, aria_hidden="true"),
        element("div", plot, class_="area"),
        element("svg", *_x_labels(across), class_="below", width="100%", height="20", aria_hidden="true"),
        class_="chart",
        role="img",
        tabindex=0,
        aria_label=label,
    )
    return join((legend(drawn), chart, element("p", x_label, class_="x-label")))


def legend(series: Sequence[Series]) -> Html:
    """The names of the curves with their last values."""
    items = [
        element(
            "li",
            element(
                "svg",
                element("line", x1="0", x2="28", y1="6", y2="6", class_=f"curve {s.class_}"),
                width="28",
                height="12",
                aria_hidden="true",
            ),
            f" {s.name} ",
            element("b", number(s.points[max(s.points)])),
        )
        for s in series
    ]
    return element("ul", *items, class_="legend")


def mini_chart(series: Sequence[Series], axis: Axis, last: int, first: int = 0) -> Html:
    """Curves without labels, for small multiples with one axis."""
    across = Axis(first, max(last, first + 1), 1)
    grid = [
        element("line", x1="0", x2="100%", y1=_y(axis, v, 80), y2=_y(axis, v, 80), class_="grid")
        for v in (axis.low, axis.high)
    ]
    curves = [_curve(s, across, axis, 80) for s in series if s.points]
    return element("svg", *grid, *curves, class_="plot", width="100%", height="80", aria_hidden="true")


def dumbbell(axis: Axis, start: float | None, end: float | None, classes: tuple[str, str], error: float | None) -> Html:
    """A strip from ``start`` (hollow) to ``end`` (filled), with one standard error on both sides of the end."""
    parts = [element("line", x1=percent(axis.at(t)), x2=percent(axis.at(t)), y1="0", y2="24") for t in axis.ticks()]
    marks = [element("g", *parts, class_="grid")]
    if start is not None and end is not None:
        x1, x2 = percent(axis.at(start)), percent(axis.at(end))
        marks.append(element("line", x1=x1, x2=x2, y1="12", y2="12", class_=f"link {classes[1]}"))
    if end is not None and error is not None:
        left, right = percent(axis.at(end - error)), percent(axis.at(end + error))
        marks.append(element("line", x1=left, x2=right, y1="12", y2="12", class_="whisker"))
        marks += [element("line", x1=x, x2=x, y1="8", y2="16", class_="whisker") for x in (left, right)]
    if start is not None:
        marks.append(element("circle", cx=percent(axis.at(start)), cy="12", r="4.5", class_=f"hollow {classes[0]}"))
    if end is not None:
        marks.append(element("circle", cx=percent(axis.at(end)), cy="12", r="5", class_=f"dot {classes[1]}"))
    return element("svg", *marks, class_="strip", width="100%", height="24", aria_hidden="true")


def strip_axis(axis: Axis) -> Html:
    """The tick labels above a column of strips: the first, the last, and those between where there is space."""
    ticks = axis.ticks()
    texts = []
    for i, tick in enumerate(ticks):
        inner = 0 < i < len(ticks) - 1
        anchor = "middle" if inner else "end" if i else "start"
        attributes = {"x": percent(axis.at(tick)), "y": "14", "text_anchor": anchor}
        texts.append(element("text", axis.label(tick), **attributes, class_="inner" if inner else None))
    return element("svg", *texts, class_="strip ticks", width="100%", height="18", aria_hidden="true")


def bar(parts: Sequence[tuple[float, str]], whole: float) -> Html:
    """A stacked bar: (amount, CSS class) of each part, in proportion to ``whole``."""
    rects, x = [], 0.0
    for amount, class_ in parts:
        width = max(0.0, 100 * amount / whole) if whole else 0.0
        rects.append(element("rect", x=percent(x), y="4", width=percent(width), height="12", class_=f"bar {class_}"))
        x += width
    return element("svg", *rects, class_="strip", width="100%", height="20", aria_hidden="true")


def scatter(
    points: Sequence[tuple[str, float, float]], named: Sequence[str], *, label: str, names: tuple[str, str]
) -> Html:
    """Points (name, x, y) on two axes with one scale, and the diagonal on which x and y are equal."""
    axis = make_axis([value for _, x, y in points for value in (x, y)])
    grid = [element("line", x1="0", x2="100%", y1=percent(100 - p), y2=percent(100 - p)) for p in _places(axis)]
    grid += [element("line", y1="0", y2="100%", x1=percent(p), x2=percent(p)) for p in _places(axis)]
    diagonal = element("line", x1="0", y1="100%", x2="100%", y2="0", class_="diagonal")
    marks, texts = [], []
    for name, x, y in points:
        at = {"cx": percent(axis.at(x)), "cy": percent(100 - axis.at(y))}
        title = element("title", f"{name}: {names[0]} {number(x)}, {names[1]} {number(y)}")
        marks.append(element("circle", title, **at, r="5", class_="dot own hit"))
        if name in named:
            right = axis.at(x) > 55
            attributes = {"x": at["cx"], "y": at["cy"], "dx": -9 if right else 9, "dy": 4}
            texts.append(element("text", name, **attributes, text_anchor="end" if right else "start"))
    plot = element("svg", element("g", *grid, class_="grid"), diagonal, *texts, *marks, class_="plot", **_FULL)
    ticks = [
        element("text", axis.label(t), x="40", y=percent(100 - axis.at(t)), dy="4", text_anchor="end")
        for t in axis.ticks()
    ]
    below = element("svg", *_tick_texts(axis), class_="below", width="100%", height="20", aria_hidden="true")
    chart = element(
        "div",
        element("svg", *ticks, class_="axis", width="44", height=_FULL["height"], aria_hidden="true"),
        element("div", plot, class_="area"),
        below,
        class_="chart scatter",
        role="img",
        tabindex=0,
        aria_label=label,
    )
    return join(
        (element("p", f"↑ {names[1]}", class_="y-label"), chart, element("p", f"{names[0]} →", class_="x-label"))
    )


_FULL = {"width": "100%", "height": 320}


def _places(axis: Axis) -> list[float]:
    return [axis.at(tick) for tick in axis.ticks()]


def _tick_texts(axis: Axis) -> list[Html]:
    return [
        element(
            "text",
            axis.label(t),
            x=percent(axis.at(t)),
            y="15",
            text_anchor="middle",
            class_="inner" if i % 2 else None,
        )
        for i, t in enumerate(axis.ticks())
    ]


def _y(axis: Axis, value: float, height: int = HEIGHT) -> str:
    """The vertical position of a value in pixels."""
    text = f"{MARGIN + (height - 2 * MARGIN) * (1 - axis.at(value) / 100):.1f}"
    return text.removesuffix(".0")


def _curve(series: Series, across: Axis, axis: Axis, height: int = HEIGHT) -> Html:
    points = series.points
    if series.level:
        value = points[max(points)]
        points = {round(across.low): value, round(across.high): value}
    places = [(across.at(x), _y(axis, value, height)) for x, value in sorted(points.items())]
    path = " ".join(f"{x:.2f},{y}" for x, y in places)
    line = element("polyline", points=path, class_=f"curve {series.class_}")
    stretched = element(
        "svg", line, viewBox=f"0 0 100 {height}", preserveAspectRatio="none", width="100%", height=height
    )
    radius = "5" if len(places) == 1 else "3.5"
    markers = [element("circle", cx=percent(x), cy=y, r=radius, class_=f"dot {series.class_}") for x, y in places]
    shown = not series.level and len(markers) <= MAX_MARKERS and (height == HEIGHT or len(markers) == 1)
    return join([stretched, *(markers if shown else ())])


def _columns(series: Sequence[Series], across: Axis, axis: Axis) -> list[Html]:
    """One invisible column per round with values: its title and guide are shown while a pointer is over it."""
    moving = [s for s in series if not s.level] or list(series)
    xs = sorted({x for s in moving for x in s.points})
    places = [across.at(x) for x in xs]
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(places)), 100.0]
    columns = []
    for i, x in enumerate(xs):
        values = [
            f"{s.name} {number(s.points[max(s.points)] if s.level else s.points.get(x))}"
            for s in series
            if s.level or x in s.points
        ]
        title = element("title", f"round {x}: " + ", ".join(values))
        guide = element("line", x1=percent(places[i]), x2=percent(places[i]), y1="0", y2="100%", class_="guide")
        area = {"x": percent(edges[i]), "width": percent(edges[i + 1] - edges[i]), "y": "0", "height": "100%"}
        columns.append(element("g", title, element("rect", **area), guide, class_="hit"))
    return columns


def _x_labels(across: Axis) -> list[Html]:
    low, high = round(across.low), round(across.high)
    every = max(1, round(nice_step((high - low) / 8))) if high - low > 10 else 1
    marks = range(-(-low // every) * every, high + 1, every)
    return [element("text", x, x=percent(across.at(x)), y="15", text_anchor="middle") for x in marks]
