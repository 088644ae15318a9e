"""The sections about results: gains, learning curves, shared against personal models, and all sites in one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from ....common.dataset import TASKS
from ..summary import SiteSummary
from .formats import MODE_NAMES, lower_is_better, metric_name, number, primary_metric, signed
from .history import History, mean_losses, mean_points, other_metrics
from .markup import Html, details, element, join, table
from .placement import Placement, by_gain, extremes, limited
from .plot import Series, dumbbell, line_chart, make_axis, mini_chart, scatter, strip_axis

CLASSES = {"base": "base", "shared": "shared", "personal": "own", "alone": "alone"}


def gains(history: History, place: Placement) -> Html | None:
    """A strip per site from training alone (or, without a baseline, the base model) to its personal model."""
    parts: list[Html] = []
    for task, rows in history.tasks().items():
        parts += _gain_table(task, [row for row in rows if row.metric("personal") is not None])
    if not parts:
        return None
    title = "Gain of each site" if history.summary.baseline else "Personal models"
    return place.section("gains", title, *parts)


def _gain_table(task: str, rows: Sequence[SiteSummary]) -> list[Html]:
    start = next(
        (mode for mode in ("alone", "base", "shared") if any(r.metric(mode) is not None for r in rows)), "alone"
    )
    values = [v for row in rows for mode in (start, "personal") if (v := row.metric(mode)) is not None]
    if not values:
        return []
    ends = [(row.metric("personal"), row.gain_error) for row in rows]
    axis = make_axis([*values, *(v + s * e for v, e in ends if v is not None and e for s in (-1, 1))], ticks=4)
    shown, note = extremes(by_gain(rows))
    name, lower = metric_name(primary_metric(task)), " Lower is better." if lower_is_better(task) else ""
    body = []
    for row in shown:
        first, last = row.metric(start), row.metric("personal")
        strip = element("td", dumbbell(axis, first, last, (CLASSES[start], "own"), row.gain_error), class_="picture")
        gain = [element("td", signed(row.gain, row.gain_error), class_="gain")] if start == "alone" else []
        side = [element("td", row.test or "–", class_="wide"), element("td", number(first), class_="wide")]
        body.append([row.site, *side, strip, element("td", number(last), class_="wide" if gain else None), *gain])
    head: list[object] = ["site", _wide("test rows"), _wide(MODE_NAMES[start])]
    head += [element("th", strip_axis(axis), element("span", name, class_="hidden"), scope="col", class_="picture")]
    head += [_wide("personal") if start == "alone" else "personal", *(["gain ± s.e."] if start == "alone" else [])]
    words = (
        f"{name[0].upper()}{name[1:]} on the test rows: from {MODE_NAMES[start]} (hollow) to personal (filled).{lower}"
    )
    gained = " The gain is positive where the personal model is better."
    error = " Its standard error (s.e.) is paired by test row and drawn around the personal model."
    about = (gained if start == "alone" else "") + (error if any(row.gain_error is not None for row in rows) else "")
    caption = element("p", words + about + (f" {note}" if note else ""))
    return [
        caption,
        table(head, body, caption=f"From {MODE_NAMES[start]} to personal: {name} ({task})", class_="strips"),
    ]


def _wide(words: str) -> Html:
    return element("th", words, scope="col", class_="wide")


def curves(history: History, place: Placement) -> Html | None:
    """Learning curves: the mean over sites, every site, and the training loss."""
    parts: list[object] = []
    for task, rows in history.tasks().items():
        parts += _task_curves(history, place, task, rows)
    parts += [*_validation_curve(history, place), *_loss_curve(history, place)]
    return place.section("curves", "Learning curves", *parts) if parts else None


def _task_curves(history: History, place: Placement, task: str, rows: Sequence[SiteSummary]) -> Iterator[Html]:
    """Curves of the primary metric; also of the test loss, if only that was measured in every round."""
    metric, sites = primary_metric(task), [row.site for row in rows]
    measured = {name: _mean_series(history, sites, name) for name in dict.fromkeys((metric, "loss"))}
    points = {name: max((len(s.points) for s in series if s.moves), default=0) for name, series in measured.items()}
    of = f" ({task})" if len(history.tasks()) > 1 else ""
    if measured[metric]:
        lower = ", lower is better" if lower_is_better(task) else ""
        yield place.heading(f"Mean {metric_name(metric)} over the sites{lower}{of}")
        if points[metric] == 1:
            words = "It was measured once. With evaluation.every = 1 it is measured in every round."
            yield element("p", _ONCE if points.get("loss", 0) > 1 else words, class_="note")
        yield from _mean_chart(history, sites, metric, measured[metric])
    shown = metric if points[metric] > 1 else "loss" if points.get("loss", 0) > 1 else ""
    if shown and shown != metric:
        yield place.heading(f"Mean loss on the test rows over the sites, lower is better{of}")
        yield from _mean_chart(history, sites, shown, measured[shown])
    if shown and (multiples := _multiples(history, rows, shown)):
        name = metric_name(shown) if shown == metric else "loss on the test rows"
        yield place.heading(f"{name[0].upper()}{name[1:]} of every site")
        yield from multiples


_ONCE = "It is measured at the end only. The loss on the test rows, below, is measured in between."


def _mean_series(history: History, sites: Sequence[str], metric: str) -> list[Series]:
    series = [_series(mode, mean_points(history, sites, mode, metric)) for mode in CLASSES]
    return [s for s in series if s.points]


def _mean_chart(history: History, sites: Sequence[str], metric: str, series: Sequence[Series]) -> Iterator[Html]:
    last, name = max(max(s.points) for s in series), metric_name(metric)
    times = (x for site in sites for x in history.curves.get((site, "personal", metric), ()))
    if len(set(Counter(times).values())) > 1:
        yield element("p", "A point is the mean over the sites that measured the models at that time.", class_="note")
    label = f"Line chart of the mean {name} by rounds of training. The table below has its values."
    yield element("figure", line_chart(series, label=label, last=last, x_label="rounds trained"))
    yield details("Values of this chart", _points_table(series, f"Mean {name} by rounds trained"))


def _series(mode: str, points: dict[int, float]) -> Series:
    return Series(
        MODE_NAMES[mode], CLASSES[mode], points, level=mode == "base" or (mode == "alone" and len(points) == 1)
    )


def _points_table(series: Sequence[Series], caption: str) -> Html:
    xs = sorted({x for s in series for x in s.points})
    rows, note = limited([[x, *(number(s.points.get(x)) for s in series)] for x in xs])
    return join((table(["rounds", *(s.name for s in series)], rows, caption=caption), note))


def _multiples(history: History, rows: Sequence[SiteSummary], metric: str) -> list[Html]:
    """A small chart per site, on one axis; nothing for a single site."""
    points = {
        (row.site, mode): found
        for row in rows
        for mode in CLASSES
        if (found := history.curves.get((row.site, mode, metric)))
    }
    if len(rows) < 2:
        return []
    last = max(x for found in points.values() for x in found)
    axis = make_axis([value for found in points.values() for value in found.values()])
    shown, note = extremes(by_gain(rows))
    figures = []
    for row in shown:
        series = [_series(mode, points[row.site, mode]) for mode in CLASSES if (row.site, mode) in points]
        end = points.get((row.site, "personal"))
        words = f"{row.site} {number(end[max(end)] if end else None)}"
        figures.append(element("figure", element("figcaption", words), mini_chart(series, axis, last), class_="mini"))
    sites = [row.site for row in rows]
    body, cut = limited(_site_points(points, sites))
    values = table(["site", "rounds", *MODE_NAMES.values()], body, caption="Metric of every site by rounds trained")
    caption = f"All have one vertical axis, from {axis.label(axis.low)} to {axis.label(axis.high)}. {note}".strip()
    return [
        element("p", caption),
        element("div", *figures, class_="multiples"),
        details("Values of these charts", values, cut),
    ]


def _site_points(points: dict[tuple[str, str], dict[int, float]], sites: Sequence[str]) -> list[list[object]]:
    rows: list[list[object]] = []
    for site in sites:
        xs = sorted({x for mode in CLASSES for x in points.get((site, mode), ())})
        rows += [[site, x, *(number(points.get((site, mode), {}).get(x)) for mode in CLASSES)] for x in xs]
    return rows


def _validation_curve(history: History, place: Placement) -> Iterator[Html]:
    """The mean validation loss after each round, where rounds were compared by it."""
    series = [
        Series(MODE_NAMES[mode], CLASSES[mode], points)
        for mode, kind in (("personal", "validation"), ("alone", "alone validation"))
        if (points := mean_losses(history, kind))
    ]
    if not series:
        return
    yield place.heading("Mean loss on validation rows, lower is better")
    selected = history.summary.selected
    if selected:
        yield element("p", f"The run ended with the models of round {selected['kept']}.", class_="note")
    last = max(max(s.points) for s in series)
    label = "Line chart of the mean loss on validation rows by rounds of training. The table below has its values."
    yield element("figure", line_chart(series, label=label, last=last, x_label="rounds trained"))
    yield details("Values of this chart", _points_table(series, "Mean loss on validation rows by rounds trained"))


def _loss_curve(history: History, place: Placement) -> Iterator[Html]:
    series = [Series(MODE_NAMES[mode], CLASSES[mode], mean_losses(history, mode)) for mode in ("personal", "alone")]
    series = [s for s in series if s.points]
    if not series:
        return
    first, last = min(min(s.points) for s in series), max(max(s.points) for s in series)
    yield place.heading("Mean training loss over the sites, lower is better")
    if len(history.tasks()) > 1:
        yield element("p", "The sites have different tasks, whose losses have different scales.", class_="note")
    label = "Line chart of the mean training loss by round. The table below has its values."
    yield element("figure", line_chart(series, label=label, last=last, first=first, x_label="round"))
    yield details("Values of this chart", _points_table(series, "Mean training loss by round"))


def shared_against_personal(history: History, place: Placement) -> Html | None:
    """A scatter plot per task: the shared adapter only against the personal model of every site."""
    parts: list[object] = []
    for task, rows in history.tasks().items():
        points = [
            (row.site, shared, personal)
            for row in rows
            if (shared := row.metric("shared")) is not None and (personal := row.metric("personal")) is not None
        ]
        if len(points) < 2:
            continue
        name, lower = metric_name(primary_metric(task)), lower_is_better(task)
        side = "below" if lower else "above"
        better = sum((y < x) if lower else (y > x) for _, x, y in points)
        equal = sum(x == y for _, x, y in points)
        words = (
            f"Each point is a site. {side.capitalize()} the diagonal the personal model is better than the shared "
            f"adapter: {better} of {len(points)} sites" + (f"; {equal} equal." if equal else ".")
        )
        far = sorted(points, key=lambda point: point[2] - point[1])
        named = [point[0] for point in (points if len(points) <= 3 else (far[0], far[-1]))]
        label = f"Scatter plot of the {name} of every site: shared adapter only against personal. {words}"
        chart = scatter(points, named, label=label, names=("shared only", "personal"))
        body, note = limited([[site, number(x), number(y), signed(y - x)] for site, x, y in points])
        head = ["site", "shared only", "personal", "difference"]
        values = table(head, body, caption=f"Shared only against personal: {name} ({task})")
        parts += [element("p", words), element("figure", chart), details("Values of this chart", values, note)]
    return place.section("shared", "Shared adapter against personal models", *parts) if parts else None


def all_sites(history: History, place: Placement) -> Html | None:
    """One table of all sites: their rows, and the metric of every model; and the means of all metrics."""
    if not history.sites:
        return None
    alone = history.summary.baseline
    modes = [*CLASSES] if alone else [mode for mode in CLASSES if mode != "alone"]
    several = len(history.tasks()) > 1
    head = ["site", *(["task"] if several else []), "training rows", "test rows", "truncated", "dropped"]
    head += [*(MODE_NAMES[mode] for mode in modes), *(["gain ± s.e."] if alone else [])]
    body = []
    for row in history.sites:
        cells: list[object] = [row.site, *([row.task or "–"] if several else [])]
        cells += [f"{n:,}" for n in (row.train, row.test, row.truncated, row.dropped)] if row.task else ["–"] * 4
        cells += [number(row.metric(mode)) for mode in modes]
        body.append([*cells, *([signed(row.gain, row.gain_error)] if alone else [])])
    rows, note = limited(body)
    words = (
        "Truncated rows were longer than model.max_length and were cut. Dropped rows had nothing to learn from. "
        "The base model and the shared adapter have a head fitted to the site's training rows where heads are personal."
    )
    parts: list[object] = [element("p", words), table(head, rows, caption="All sites", class_="sites"), note]
    for task, members in history.tasks().items():
        parts += _other_metrics(task, members, place)
    return place.section("sites", "All sites", *parts)


def _other_metrics(task: str, rows: Sequence[SiteSummary], place: Placement) -> list[Html]:
    found = other_metrics(rows, TASKS[task].metrics if task in TASKS else ())
    if len(found) < 2:
        return []
    modes = [mode for mode in CLASSES if any(mode in values for values in found.values())]
    body = [[metric_name(metric), *(number(values.get(m)) for m in modes)] for metric, values in found.items()]
    head = ["mean over sites", *(MODE_NAMES[mode] for mode in modes)]
    return [place.heading(f"All metrics of {task}"), table(head, body, caption=f"All metrics of {task}")]
