"""Several runs beside each other: their main numbers, their curves, and the personal model of every site."""

from __future__ import annotations

from collections.abc import Sequence

from ..conclusions import compare_gains
from .formats import NONE, duration, lower_is_better, metric_name, number, primary_metric, signed, size
from .headline import round_cost, total_cost
from .history import History, mean_metric, mean_points
from .markup import Html, details, element, join, table
from .placement import Placement, limited
from .plot import Series, line_chart

MAX_CURVES = 6  # runs in one chart


def side_by_side(histories: Sequence[History], place: Placement) -> Html:
    """Compare runs: a table, and per task the personal models by rounds and by site."""
    parts: list[object] = [_table(histories)]
    tasks = dict.fromkeys(task for history in histories for task in history.tasks())
    for task in tasks:
        parts += [_curves(histories, task, place), _by_site(histories, task, place)]
    note = "Each run has one seed. Its standard error is over sites and does not include the chance of the seed."
    return place.section("compared", "Runs beside each other", element("p", note), *parts)


def _table(histories: Sequence[History]) -> Html:
    words = [element("th", name, scope="col", class_="left") for name in ("state", "method", "task")]
    head: list[object] = ["run", *words, "sites", "rounds", "base model", "shared only", "personal", "alone"]
    head += ["gain ± s.e.", "bytes", "time", "a round"]
    body: list[list[object]] = []
    for history in histories:
        cost, of_round = total_cost(history), round_cost(history)
        ends = [size(cost.up + cost.down), duration(history.summary.seconds or None)]
        ends.append(f"{duration(of_round[0])}, {size(of_round[1])}" if of_round else NONE)
        for task, rows in (history.tasks() or {"": history.sites}).items():
            compared = compare_gains(rows)
            values = [number(mean_metric(rows, mode)) for mode in ("base", "shared", "personal", "alone")]
            gain = signed(compared.mean, compared.error) if compared else NONE
            name = f"{task} ({metric_name(primary_metric(task))})" if task else NONE
            done = f"{len(history.training_rounds())} of {history.summary.rounds}"
            words = [element("td", text, class_="left") for text in (history.state, history.summary.method, name)]
            body.append([history.label, *words, len(rows), done, *values, gain, *ends])
    return table(head, body, caption="Runs")


def _curves(histories: Sequence[History], task: str, place: Placement) -> Html | None:
    metric, series = primary_metric(task), []
    for i, history in enumerate(histories[:MAX_CURVES]):
        sites = [row.site for row in history.tasks().get(task, ())]
        points = mean_points(history, sites, "personal", metric)
        if points:
            series.append(Series(history.label, f"run{i}", points))
    if not series:
        return None
    lower = ", lower is better" if lower_is_better(task) else ""
    title = place.heading(f"Mean {metric_name(metric)} of the personal models{lower}")
    last = max(max(s.points) for s in series)
    label = f"Line chart of the mean {metric_name(metric)} of the personal models of every run by rounds trained."
    chart = element("figure", line_chart(series, label=label, last=last, x_label="rounds trained"))
    xs = sorted({x for s in series for x in s.points})
    rows, note = limited([[x, *(number(s.points.get(x)) for s in series)] for x in xs])
    values = table(["rounds", *(s.name for s in series)], rows, caption=f"Mean {metric_name(metric)} of the runs")
    more = f"The chart shows the first {MAX_CURVES} runs." if len(histories) > MAX_CURVES else None
    return join(
        (title, chart, details("Values of this chart", values, note), more and element("p", more, class_="note"))
    )


def _by_site(histories: Sequence[History], task: str, place: Placement) -> Html | None:
    """The personal metric of every site that at least two runs have."""
    found = [{row.site: row.metric("personal") for row in history.tasks().get(task, ())} for history in histories]
    sites = dict.fromkeys(site for values in found for site in values)
    common = [site for site in sites if sum(values.get(site) is not None for values in found) > 1]
    if not common:
        return None
    rows, note = limited([[site, *(number(values.get(site)) for values in found)] for site in common])
    caption = f"Personal {metric_name(primary_metric(task))} of every site"
    head = ["site", *(history.label for history in histories)]
    return join((place.heading(caption), table(head, rows, caption=caption, class_="sites"), note))
