"""The top of a report: what was gained, for whom, at what cost, and who was left out."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from ..conclusions import (
    CLEAR,
    Comparison,
    advice,
    compare_gains,
    extensions,
    fallbacks,
    learning_rates,
    privacy,
    selection,
    warnings,
)
from ..summary import SiteSummary
from .formats import (
    count,
    duration,
    listed,
    lower_is_better,
    metric_name,
    number,
    primary_metric,
    rounds,
    signed,
    size,
)
from .history import Cost, History, Incident, mean_metric
from .markup import Html, element, escape, join
from .placement import by_gain

LEFT_OUT = ("failed", "silent", "refused", "late")
REASONS = 5  # that the headline quotes


def headline(history: History) -> list[Html]:
    """Tiles with the main numbers, and sentences that say which sites they come from."""
    tiles = [_tile(*words) for words in _tiles(history)]
    sentences = [element("li", sentence) for sentence in _sentences(history)]
    return [element("dl", *tiles, class_="tiles"), element("ul", *sentences, class_="findings")]


def total_cost(history: History) -> Cost:
    """The cost of all rounds of the federation, without the baseline."""
    total = Cost()
    for record in history.rounds.values():
        total.add(record.cost)
    return total


def round_cost(history: History) -> tuple[float, float] | None:
    """The median seconds and the median bytes of a round; None before the first has ended."""
    ended = history.training_rounds()
    if not ended:
        return None
    moved = [record.cost.up + record.cost.down for record in ended]
    return statistics.median(record.seconds or 0.0 for record in ended), statistics.median(moved)


def _tile(name: str, value: str, *notes: str) -> Html:
    lines = [element("dd", note, class_="small") for note in notes if note]
    return element("div", element("dt", name), element("dd", value, class_="value"), *lines)


def _tiles(history: History) -> Iterator[tuple[str, ...]]:
    tasks = history.tasks()
    for task, rows in tasks.items():
        of = f" ({task})" if len(tasks) > 1 else ""
        name = metric_name(primary_metric(task))
        compared = compare_gains(rows)
        lower = ", lower is better" if lower_is_better(task) else ""
        if compared:
            of_sites = f"{name}{lower}; mean of {count(compared.sites, 'site')} ± standard error"
            yield f"Gain over training alone{of}", signed(compared.mean, compared.error), of_sites
        known = {mode: mean_metric(rows, mode) for mode in ("shared", "alone", "base")}
        others = [f"{_SHORT[mode]} {number(value)}" for mode, value in known.items() if value is not None]
        personal = mean_metric(rows, "personal")
        if personal is not None or others:
            title = f"Personal models{of}"
            yield title, number(personal), f"mean {name}{lower}", ", ".join(others)
        if compared and compared.judged:
            clear = f"beyond {CLEAR:.0f} standard errors, of {count(compared.judged, 'site')}"
            yield f"Sites{of}", f"{compared.better} better, {compared.worse} worse", clear
    cost, of_round = total_cost(history), round_cost(history)
    per_round = f"a round: {duration(of_round[0])}, {size(of_round[1])}" if of_round else ""
    spent = history.summary.seconds or ((history.ended or 0) - (history.began or 0))
    both = " with the baseline" if history.baseline_ended else ""
    yield "Cost", size(cost.up + cost.down), f"sent and received by the sites, in {duration(spent)}{both}", per_round
    left_out = _left_out(history)
    sites = len({incident.site for incident in left_out})
    if history.at_site:
        yield "Errors", str(len(left_out)), "answers that were an error"
    else:
        of_sites = f"of {count(sites, 'site')}" if left_out else "every reply counted"
        yield "Left out", count(len(left_out), "reply"), of_sites


_SHORT = {"shared": "shared only", "alone": "alone", "base": "base model"}


def _left_out(history: History) -> list[Incident]:
    return [i for i in history.incidents if i.kind in LEFT_OUT and not i.alone]


def _sentences(history: History) -> Iterator[object]:
    if history.summary.description:
        yield history.summary.description
    tasks = history.tasks()
    for task, rows in tasks.items():
        of = f" on {task}" if len(tasks) > 1 else ""
        compared = compare_gains(rows)
        if compared:
            yield from _compared(compared, of, learning_rates(history.summary))
            yield from _extremes(rows, primary_metric(task))
    if tasks and not history.summary.baseline and not history.at_site:
        yield (
            "No site was trained alone for comparison, so the gain over training alone is not known. In a simulation, "
            "--baseline measures it."
        )
    yield from privacy(history.summary)
    if history.at_site:
        yield from _own_record(history)
    else:
        yield from _left_out_sentences(_left_out(history))
    clipped = [i for i in history.incidents if i.kind == "clipped"]
    if clipped:
        sites = listed(sorted({i.site for i in clipped}))
        yield f"Clipped: {count(len(clipped), 'update')} of {sites} were much larger than the others of their round."
    if of_round := round_cost(history):
        yield (
            f"A typical round took {duration(of_round[0])} and moved {size(of_round[1])} between the coordinator and "
            "its sites (medians, without the final personalization)."
        )
    yield from _rows(history)
    if history.summary.source_federation:
        source = history.summary.source_federation
        yield f"The rows are generated texts, labeled with the models of {source}. The original data was not read."
    yield from advice(history.summary)
    yield from fallbacks(history.summary)
    yield from selection(history.summary)
    yield from extensions(history.summary)
    yield from warnings(history.summary)


def _compared(compared: Comparison, of: str, rates: str) -> Iterator[str]:
    gain = signed(compared.mean, compared.error)
    yield (
        f"{compared.verdict}{of}: the personal models gain {gain} over training alone on average "
        f"({count(compared.sites, 'site')}, one seed). {compared.counts} {rates}".strip()
    )


def _extremes(rows: Sequence[SiteSummary], metric: str) -> Iterator[Html]:
    """Which site gained most, and which lost most or gained least."""
    known = [row for row in by_gain(rows) if row.gain is not None]
    if len(known) < 2:
        return
    lost = [row.site for row in known if (row.gain or 0) < 0]
    gained = sum((row.gain or 0) > 0 for row in known)
    if gained:
        yield _gain_sentence("Gained most", known[0], metric)
    if lost:
        others = f" {len(lost)} of {count(len(known), 'site')} lost: {listed(lost)}." if len(lost) > 1 else ""
        yield join((_gain_sentence("Lost most", known[-1], metric), others))
    elif gained == len(known):
        yield join((_gain_sentence("Gained least", known[-1], metric), " No site lost."))
    else:
        yield escape(f"No site lost: {count(gained, 'site')} gained, and {len(known) - gained} did not change.")


def _gain_sentence(words: str, row: SiteSummary, metric: str) -> Html:
    values = f"{metric_name(metric)} {number(row.metric('personal'))} instead of {number(row.metric('alone'))}"
    clear = row.gain_error is not None and abs(row.gain or 0) > CLEAR * row.gain_error
    doubt = "" if clear or row.gain_error is None else f", which is within {CLEAR:.0f} standard errors"
    return element(
        "span", f"{words}: ", element("b", row.site), f", {values} ({signed(row.gain, row.gain_error)}{doubt})."
    )


def _left_out_sentences(incidents: Sequence[Incident]) -> Iterator[object]:
    reasons: dict[tuple[str, str], list[int]] = {}
    for incident in incidents:
        reasons.setdefault((incident.site, incident.reason), []).append(incident.round)
    for (site, reason), numbers in list(reasons.items())[:REASONS]:
        when = when_of(numbers)
        yield element("span", "Left out: ", element("b", site), f", {when}: {reason}".rstrip(".") + ".")
    if len(reasons) > REASONS:
        yield f"{len(reasons) - REASONS} more reasons are in the table of incidents."
    if not reasons:
        yield "No reply was left out."


def _own_record(history: History) -> Iterator[str]:
    """What the page of a site shows, and what the site has sent."""
    yield (
        f"This is the record of {history.at_site} itself: its rounds, measurements and messages. What other sites did, "
        "and what the coordinator left out, is not known here."
    )
    yield "The site sent metrics and arrays of shared parameters. audit.jsonl, beside this record, lists each of them."


def when_of(numbers: Sequence[int]) -> str:
    """The rounds of an incident in words. Round 0 is before the first."""
    later = [number_ for number_ in numbers if number_]
    if not later:
        return "before round 1"
    several = "s" if len(set(later)) > 1 else ""
    return f"{'before round 1 and in ' if len(later) < len(numbers) else ''}round{several} {rounds(later)}"


def _rows(history: History) -> Iterator[str]:
    rows = history.sites
    total, cut, dropped = (
        (sum(values) for values in zip(*((r.train + r.test, r.truncated, r.dropped) for r in rows), strict=True))
        if rows
        else (0, 0, 0)
    )
    if cut:
        yield f"Truncated: {cut:,} of {total:,} rows were longer than model.max_length and were cut."
    if dropped:
        yield f"Dropped: {count(dropped, 'row')} had nothing to learn from."
