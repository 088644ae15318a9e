"""The sections about rounds: who was admitted with which weight, incidents, and what rounds and sites cost."""

from __future__ import annotations

from collections.abc import Sequence

from .formats import NONE, count, duration, number, rounds, size
from .history import Cost, History, RoundRecord
from .markup import Html, element, table
from .placement import Placement, limited
from .plot import bar

MAX_CELLS = 6000  # of the table of admissions
MAX_SITES = 400  # in it
STATUS = {  # status → letter, meaning
    "clipped": ("c", "admitted, clipped: its update was scaled down"),
    "refused": ("R", "refused"),
    "failed": ("F", "failed: an error, or too slow"),
    "silent": ("S", "silent: no reply"),
    "absent": ("A", "absent: not connected"),
    "replied": ("+", "replied, the round has not ended"),
    "open": ("…", "no reply yet"),
    "idle": ("·", "not asked in this round"),
}
KINDS = {
    "failed": "failed",
    "silent": "no reply",
    "refused": "refused",
    "late": "late",
    "clipped": "clipped",
    "distant": "not averaged",
    "fresh": "state lost",
    "restarted": "restarted",
    "tracker_failed": "tracker stopped",
    "run_failed": "run failed",
    "resumed": "resumed",
}


def status(record: RoundRecord, site: str) -> str:
    """What a site did in a round: "admitted", or a key of ``STATUS``."""
    if record.admitted is not None and site in record.admitted:
        return "clipped" if site in record.clipped else "admitted"
    if site in record.problems and record.problems[site].kind in STATUS:
        return record.problems[site].kind
    if site in record.costs:
        return "replied" if record.admitted is None else "absent"
    if site not in record.asked:
        return "idle"
    return "open" if record.admitted is None else "absent"


def weight_shares(history: History, record: RoundRecord) -> dict[str, float]:
    """The weight of each admitted site in the mean of its group."""
    sums: dict[int, float] = {}
    for site, weight in record.weights.items():
        group = history.group_of(site)
        sums[group] = sums.get(group, 0.0) + weight
    groups = {site: sums[history.group_of(site)] for site in record.weights}
    return {site: weight / groups[site] for site, weight in record.weights.items() if groups[site]}


def admissions(history: History, place: Placement) -> Html | None:
    """A table of sites by rounds with each site's weight, or why it has none; and the incidents."""
    records = [record for number_, record in sorted(history.rounds.items()) if number_]
    sites = [row.site for row in history.sites][:MAX_SITES]
    if not records and not history.incidents:
        return None
    parts: list[object] = []
    if records and sites:
        shown = records[-max(1, MAX_CELLS // len(sites)) :]
        parts += [_weights_words(history), _key(shown, sites), _matrix(history, shown, sites)]
        if len(shown) < len(records) or len(sites) < len(history.sites):
            words = (
                f"The table shows the last {len(shown)} of {count(len(records), 'round')} and {len(sites):,} of "
                f"{count(len(history.sites), 'site')}."
            )
            parts.append(element("p", words, class_="note"))
    parts += [place.heading("Incidents"), *_incidents(history)]
    return place.section("rounds", "Weights and admissions", *parts)


def _weights_words(history: History) -> Html:
    meaning = {
        "tokens": "by its number of loss terms (labeled rows or answer tokens)",
        "examples": "by its number of examples",
        "uniform": "like every other site",
        "benefit": "by how much the shared adapter helps it",
    }.get(history.weighting, "")
    of = " of its group" if len(history.summary.groups) > 1 else ""
    words = f"A number is the site's weight in the mean{of}, in percent. A tick is a reply that is not averaged."
    if any(record.secure for record in history.rounds.values()):
        words = "A tick is a site in the mean. With secure aggregation the coordinator does not learn the weights."
    if meaning:
        words += f" A site is weighted {meaning} (server.weights = {history.weighting})."
    return element("p", words + " In the final column the sites personalize, and nothing is averaged.")


def _key(records: Sequence[RoundRecord], sites: Sequence[str]) -> Html | None:
    present = {status(record, site) for record in records for site in sites}
    items = [
        element("li", element("span", letter, class_=f"cell {name}"), f" {meaning}")
        for name, (letter, meaning) in STATUS.items()
        if name in present
    ]
    return element("ul", *items, class_="legend") if items else None


def _matrix(history: History, records: Sequence[RoundRecord], sites: Sequence[str]) -> Html:
    shares = [weight_shares(history, record) for record in records]
    body: list[list[object]] = []
    for site in sites:
        cells = [_cell(record, share, site) for record, share in zip(records, shares, strict=True)]
        body.append([site, *cells])
    head = ["site", *(record.name for record in records)]
    return table(head, body, caption="Weight of every site in every round", class_="matrix")


def _cell(record: RoundRecord, shares: dict[str, float], site: str) -> Html:
    name = status(record, site)
    title = record.problems[site].reason if site in record.problems else None
    if name not in ("admitted", "clipped"):
        return element("td", STATUS[name][0], class_=name, title=title)
    share = shares.get(site)
    text = "✓" if share is None else f"{100 * share:.{0 if share >= 0.095 else 1}f}"
    return element("td", text + ("c" if name == "clipped" else ""), class_=name)


def _incidents(history: History) -> list[object]:
    """Incidents of one site with one reason are one row."""
    grouped: dict[tuple[bool, str, str, str], list[int]] = {}
    for incident in history.incidents:
        key = (incident.alone, incident.kind, incident.site, incident.reason)
        grouped.setdefault(key, []).append(incident.round)
    if not grouped:
        return [element("p", "None: no reply was left out, clipped or late, and nothing was restarted.")]
    body: list[list[object]] = []
    for (alone, kind, site, reason), numbers in grouped.items():
        what = KINDS.get(kind, kind) + (" (baseline)" if alone else "")
        cells = [element("td", text, class_="left") for text in (_when(history, numbers), what)]
        body.append([site, *cells, element("td", reason, class_="words")])
    rows, note = limited(body, 300)
    return [
        table(
            ["site", *(element("th", name, scope="col", class_="left") for name in ("rounds", "what", "reason"))],
            rows,
            caption="Incidents",
        ),
        note,
    ]


def _when(history: History, numbers: Sequence[int]) -> str:
    final = {number_ for number_ in numbers if number_ in history.rounds and history.rounds[number_].final}
    words = [rounds([n for n in numbers if n and n not in final])] if set(numbers) - final - {0} else []
    words += ["final"] if final else []
    return ", ".join(words) or NONE


def costs(history: History, place: Placement) -> Html | None:
    """Two tables with bars: seconds and bytes of every round, and of every site."""
    records = [record for _, record in sorted(history.rounds.items()) if record.costs or record.admitted is not None]
    if not records:
        return None
    words = (
        "Work is the time of the sites' work: training (first part of the bar) and measuring (second part). Bytes are "
        "those of admitted replies (first part) and of the requests for them (second part)."
    )
    of = "of the site's work" if history.at_site else "of the round at the coordinator"
    words = f"Duration is the time {of}. {words}"
    parts: list[object] = [element("p", words), place.heading("Rounds"), *_round_costs(records)]
    parts += [place.heading("Sites"), *_site_costs(history)]
    return place.section("costs", "Bytes and seconds", *parts)


def _round_costs(records: Sequence[RoundRecord]) -> list[object]:
    totals = [(record, record.cost) for record in records]
    work, moved = _largest([cost for _, cost in totals])
    head = [
        "round",
        "admitted",
        "duration",
        "work",
        *_picture_head("work"),
        "sent",
        "received",
        *_picture_head("bytes"),
    ]
    has_residual = any(record.residual is not None for record in records)
    head += (
        [element("th", "residual", scope="col", title="Distance of mean(B)·mean(A) from mean(BA)")]
        if has_residual
        else []
    )
    body = []
    for record, cost in totals:
        admitted = (
            NONE
            if record.admitted is None
            else f"{len(record.admitted)} of {len(record.asked) or len(record.admitted)}"
        )
        cells: list[object] = [record.name, admitted, duration(record.seconds), duration(cost.seconds)]
        cells += [_work_bar(cost, work), size(cost.up), size(cost.down), _byte_bar(cost, moved)]
        body.append([*cells, *([number(record.residual)] if has_residual else [])])
    rows, note = limited(body[::-1], 300)
    caption = "Cost of every round"
    return [table(head, rows[::-1] if note is None else rows, caption=caption, class_="strips"), note]


def _site_costs(history: History) -> list[object]:
    totals: dict[str, Cost] = {row.site: Cost() for row in history.sites}
    replied = dict.fromkeys(totals, 0)
    for record in history.rounds.values():
        for site, cost in record.costs.items():
            totals.setdefault(site, Cost()).add(cost)
            replied[site] = replied.get(site, 0) + (record.number > 0 and not record.final)
    work, moved = _largest(list(totals.values()))
    head = [
        "site",
        "rounds",
        "work",
        "of which measuring",
        *_picture_head("work"),
        "sent",
        "received",
        *_picture_head("bytes"),
    ]
    body = []
    for site, cost in totals.items():
        cells: list[object] = [site, replied[site], duration(cost.seconds), duration(cost.measuring)]
        body.append([*cells, _work_bar(cost, work), size(cost.up), size(cost.down), _byte_bar(cost, moved)])
    rows, note = limited(body)
    return [table(head, rows, caption="Cost of every site", class_="strips sites"), note]


def _largest(found: Sequence[Cost]) -> tuple[float, float]:
    return max((c.seconds for c in found), default=0.0), max((c.up + c.down for c in found), default=0)


def _picture_head(words: str) -> list[Html]:
    return [element("th", element("span", words, class_="hidden"), scope="col", class_="picture")]


def _work_bar(cost: Cost, whole: float) -> Html:
    parts = [(cost.seconds - cost.measuring, "own"), (cost.measuring, "light")]
    return element("td", bar(parts, whole), class_="picture")


def _byte_bar(cost: Cost, whole: float) -> Html:
    return element("td", bar([(cost.up, "own"), (cost.down, "light")], whole), class_="picture")
