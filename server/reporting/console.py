"""Terminal output: a live table, or one line per round without a terminal, and the final report."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ...common.dataset import EVAL_MODES, TASKS
from ...common.foreign_text import printable, sanitize
from .events import Event
from .summary import RunSummary, SiteSummary, note_of

COLUMNS = (*EVAL_MODES, "alone")
CLEAR = 2.0  # a difference counts if it is larger than so many standard errors
HIGH = 0.5  # a training loss above this fraction of the first round's is high
NOTED = ("waiting", "restarted", "late", "finalizing", "transfer_started")  # events that note_of() describes


class LiveDisplay:
    """Displays events as they happen: a context manager that is called with each event."""

    def __init__(self, console: Console) -> None:
        self.console, self.summary = console, RunSummary()
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> LiveDisplay:
        if self.live:
            self.live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            self.live.__exit__(None, None, None)

    def __call__(self, event: Event) -> None:
        """Process one event, and redraw the table or print the event's line."""
        before = len(self.summary.ready)
        self.summary.update(event)
        if self.live:
            self.live.update(Group(_headline(self.summary), _progress_table(self.summary)), refresh=True)
        else:
            new = len(self.summary.ready) > before
            line = f"{self.summary.note} ({event['site']})" if new else _line(self.summary, event)
            if line:
                self.console.print(Text(printable(line)), soft_wrap=True)


def print_report(summary: RunSummary, folder: Path, console: Console) -> None:
    """Print the final table and the conclusions from it, and write both to ``report.html``."""
    page = Console(record=True, width=120, file=io.StringIO())
    for target in (console, page):
        target.print(_final_table(summary))
        for line in _conclusions(summary):
            target.print(Text(printable(line)))
    page.save_html(str(folder / "report.html"))
    console.print(Text(printable(f"Run folder: {folder}")), soft_wrap=True)


def _headline(summary: RunSummary) -> Text:
    if summary.baseline:
        where = f"round {summary.round} of {summary.rounds}"
        return Text(printable(f"{summary.federation}: baseline (each site alone), {where}"))
    phase = f"round {summary.round} of {summary.rounds}" if summary.round else "waiting for sites to join"
    note = f" ({summary.note})" if summary.note else ""
    return Text(printable(f"{summary.federation}: {summary.method} on {summary.model}, {phase}{note}"))


def _progress_table(summary: RunSummary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("site", "round", "loss", *EVAL_MODES, "sent", "seconds"):
        table.add_column(name, justify="left" if name == "site" else "right")
    for row in summary.rows.values():
        metrics = [_number(row.metric(mode)) for mode in EVAL_MODES]
        progress = [sanitize(row.site), str(row.round or ""), _number(row.alone_loss if summary.baseline else row.loss)]
        cells = [*progress, *metrics, _bytes(row.bytes_up), f"{row.seconds:.0f}"]
        table.add_row(*cells, style="yellow" if row.failures else None)
    return table


def _line(summary: RunSummary, event: Event) -> str | None:
    name = event["event"]
    prefix = "alone: " if event.get("baseline") else ""
    if name == "started":
        return f"{prefix}{event['federation']}: {event['method']} on {event['model']}, {len(event['sites'])} sites"
    if name == "resumed":
        damaged = ", ".join(event.get("damaged", ()))
        skipped = f"; skipped damaged checkpoints: {damaged}" if damaged else ""
        return f"{prefix}resuming after round {event['round']} of {summary.rounds}{skipped}"
    if name == "round":
        rows = summary.rows.values()
        losses = [x for x in (row.alone_loss if prefix else row.loss for row in rows) if x is not None]
        loss = f", loss {sum(losses) / len(losses):.3f}" if losses else ""
        personal = summary.mean("personal") if not prefix else None
        metric = f", personal {personal:.3f}" if personal is not None else ""
        sites = f"{len(event['admitted'])} sites"
        return f"{prefix}round {event['round']}/{summary.rounds}: {sites}{loss}{metric}, {event['seconds']:.1f} s"
    if name == "grouped":
        return f"{len(event['groups'])} group{'s' * (len(event['groups']) > 1)} of sites: " + "; ".join(
            map(", ".join, event["groups"])
        )
    if name in NOTED:
        return f"{prefix}{note_of(event)}"
    if name in ("refused", "failed"):
        site = event.get("site") or "unknown node"
        reason = str(event["reason"]).removeprefix(f"site {site}: ")
        return f"{prefix}round {event['round']}: {site} left out: {reason}"
    return None


def _final_table(summary: RunSummary) -> Table:
    tasks = sorted({row.task for row in summary.rows.values() if row.task})
    metrics = [TASKS[t].primary_metric + (" (lower is better)" if TASKS[t].lower_is_better else "") for t in tasks]
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        title=sanitize(f"{summary.federation}: {', '.join(metrics)}"),
        title_justify="left",
        pad_edge=False,
    )
    shown = {name: cell for name, cell in _CELLS.items() if name not in ("alone", "gain") or summary.baseline}
    if not any(row.dropped for row in summary.rows.values()):
        del shown["drop"]
    table.add_column("site", no_wrap=True)
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary.rows.values():
        table.add_row(sanitize(row.site), *(cell(row) for cell in shown.values()))
    means = {c: _number(summary.mean(c)) for c in COLUMNS}
    if any(means.values()):
        gains = known_gains(summary) if means["alone"] else []
        means["gain"] = _gain(*mean_and_error(gains)) if gains else ""
        table.add_section()
        table.add_row("mean", *(means.get(name, "") for name in shown), style="bold")
    return table


_CELLS: dict[str, Callable[[SiteSummary], str]] = {
    "rows": lambda row: f"{row.train}+{row.test}",
    **{mode: lambda row, mode=mode: _number(row.metric(mode)) for mode in COLUMNS},
    "gain": lambda row: "" if row.gain is None else _gain(row.gain, row.gain_error),
    "sent": lambda row: _bytes(row.bytes_up),
    "sec": lambda row: f"{row.seconds:.0f}",
    "cut": lambda row: str(row.truncated),
    "drop": lambda row: str(row.dropped),
}


def _conclusions(summary: RunSummary) -> list[str]:
    """The lines below the final table."""
    lines = [_legend(summary)]
    if summary.source_federation:
        lines.append(
            f"The rows are generated texts, labelled by the models from {summary.source_federation}; some of them were "
            "held out for these metrics. The original training data was not read."
        )
    if summary.residual is not None:
        lines.append(f"In the last round mean(B)·mean(A) differed from mean(BA) by {summary.residual:.1%}.")
    if len(summary.groups) > 1:
        told = "; ".join(", ".join(group) for group in summary.groups)
        lines.append(
            f"The sites' first updates point in {len(summary.groups)} directions. Groups with an adapter each: {told}."
        )
    lines += [*_comparison(summary), *_advice(summary)]
    base, personal = summary.mean("base"), summary.mean("personal")
    tasks = [row.task for row in summary.rows.values() if row.task]
    if base is not None and personal is not None and _better(personal, base, tasks[0]) < 0:
        lines.append(
            "The personal models are worse than the base model. Train for more steps or change the learning rate."
        )
    if names := summary.without_personal_model():
        lines.append(f"{', '.join(names)} took part in no round and have no personal model. The means leave them out.")
    for row in summary.rows.values():
        lines += [f"{row.site} was left out of round {t}: {reason}" for t, reason in row.failures.items()]
        lines += [
            f"{row.site} had lost its personal state in round {t} and started from the shared adapter."
            for t in row.fresh
        ]
    lines += summary.failures
    return lines


def _legend(summary: RunSummary) -> str:
    alone = (
        "; alone: local-only training, for the same steps at the same learning rates; gain: personal − alone ± its "
        "standard error over test rows (of the mean: over sites)"
        if summary.baseline
        else ""
    )
    return (
        "rows: training + test. base: the base model; shared: with the shared adapter (where heads are personal, both "
        "with a head fitted to the site's training rows); personal: the site's own model"
        f"{alone}. sent: bytes that the site sent; sec: seconds of its work; cut: rows longer than max_length; drop: "
        f"rows without anything to learn from. Total time: {summary.seconds:.0f} s."
    )


def known_gains(summary: RunSummary) -> list[float]:
    """Return the gains of the sites whose personal model and baseline were measured."""
    return [row.gain for row in summary.rows.values() if row.gain is not None]


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of at least one value and its standard error, None for one value."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def _comparison(summary: RunSummary) -> list[str]:
    """Two lines that compare personal models with the baseline; none without a baseline."""
    gains = known_gains(summary)
    if not gains:
        return []
    mean, error = mean_and_error(gains)
    # Without a standard error no single site is told from chance.
    judged = [(r.gain, r.gain_error) for r in summary.rows.values() if r.gain is not None and r.gain_error is not None]
    better, worse = (sum(sign * gain > CLEAR * e for gain, e in judged) for sign in (1, -1))
    verdict = _VERDICTS[0 if error is None or abs(mean) <= CLEAR * error else 1 if mean > 0 else -1]
    counted = (
        f" Beyond {CLEAR:.0f} standard errors, {better} of {len(judged)} sites are better and {worse} worse."
        if judged
        else ""
    )
    rates = ", ".join(f"train.{name} = {rate:g}" for name, rate in summary.learning_rates.items())
    return [
        f"{verdict}: the personal models gain {_gain(mean, error)} over local-only training on average "
        f"({len(gains)} sites, one seed).{counted}",
        *([f"Both were trained at {rates}. Nothing was tuned for either."] if rates else []),
    ]


_VERDICTS = {
    1: "Collaboration helps",
    0: "It is not clear whether collaboration helps",
    -1: "Collaboration does not help",
}


def _advice(summary: RunSummary) -> list[str]:
    """A line if the training loss says that the shared adapter is still improving."""
    losses: dict[int, list[float]] = {}
    for (_, _, t), reply in summary.replies.items():
        if (loss := reply["metrics"].get("train.loss")) is not None:
            losses.setdefault(t, []).append(loss)
    if len(losses) < 2:
        return []
    first, last = (statistics.mean(losses[t]) for t in (min(losses), max(losses)))
    alone = [row.alone_loss for row in summary.rows.values() if row.alone_loss is not None]
    level = HIGH / 2 if alone and last > 2 * statistics.mean(alone) else HIGH  # sites alone get further
    if last < level * first:
        return []
    compared = f", and {statistics.mean(alone):.3f} in local-only training" if alone else ""
    return [
        f"The training loss is still {last:.3f} ({first:.3f} in round {min(losses)}{compared}). The shared adapter has "
        "not converged: use more rounds or a larger train.lr."
    ]


def _better(personal: float, alone: float, task: str) -> int:
    sign = (personal > alone) - (personal < alone)
    return -sign if TASKS[task].lower_is_better else sign


def _gain(gain: float, error: float | None) -> str:
    return f"{gain:+.3f}" + ("" if error is None else f" ±{error:.3f}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit == "MB" else f"{count:.0f} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.1f} GB"
