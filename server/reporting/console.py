"""Terminal output: a live table, or one line per round without a terminal, and the final report."""

from __future__ import annotations

import io
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ...common.dataset import EVAL_MODES, TASKS
from .events import Event
from .summary import RunSummary, SiteSummary, note_of

COLUMNS = (*EVAL_MODES, "alone")
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
                self.console.print(line, highlight=False, soft_wrap=True)


def print_report(summary: RunSummary, folder: Path, console: Console) -> None:
    """Print the final table and the conclusions from it, and write both to ``report.html``."""
    page = Console(record=True, width=120, file=io.StringIO())
    for target in (console, page):
        target.print(_final_table(summary))
        for line in _conclusions(summary):
            target.print(line, highlight=False)
    page.save_html(str(folder / "report.html"))
    console.print(f"Run folder: {folder}", highlight=False, soft_wrap=True)


def _headline(summary: RunSummary) -> Text:
    if summary.baseline:
        return Text(f"{summary.federation}: baseline (each site alone), round {summary.round} of {summary.rounds}")
    phase = f"round {summary.round} of {summary.rounds}" if summary.round else "waiting for sites to join"
    note = f" ({summary.note})" if summary.note else ""
    return Text(f"{summary.federation}: {summary.method} on {summary.model}, {phase}{note}")


def _progress_table(summary: RunSummary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("site", "round", "loss", *EVAL_MODES, "sent", "seconds"):
        table.add_column(name, justify="left" if name == "site" else "right")
    for row in summary.rows.values():
        metrics = [_number(row.metric(mode)) for mode in EVAL_MODES]
        progress = [row.site, str(row.round or ""), _number(row.loss)]
        cells = [*progress, *metrics, _bytes(row.bytes_up), f"{row.seconds:.0f}"]
        table.add_row(*cells, style="yellow" if row.failures else None)
    return table


def _line(summary: RunSummary, event: Event) -> str | None:
    name = event["event"]
    prefix = "alone: " if event.get("baseline") else ""
    if name == "started":
        return f"{prefix}{event['federation']}: {event['method']} on {event['model']}, {len(event['sites'])} sites"
    if name == "resumed":
        return f"{prefix}resuming after round {event['round']} of {summary.rounds}"
    if name == "round":
        losses = [r.loss for r in summary.rows.values() if r.loss is not None]
        loss = f", loss {sum(losses) / len(losses):.3f}" if losses else ""
        personal = summary.mean("personal") if not prefix else None
        metric = f", personal {personal:.3f}" if personal is not None else ""
        sites = f"{len(event['admitted'])} sites"
        return f"{prefix}round {event['round']}/{summary.rounds}: {sites}{loss}{metric}, {event['seconds']:.1f} s"
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
        padding=(0, 1, 0, 0),
        title=f"{summary.federation}: {', '.join(metrics)}",
        title_justify="left",
        pad_edge=False,
    )
    shown = [c for c in COLUMNS if c != "alone" or summary.baseline]
    table.add_column("site", no_wrap=True)
    for name in ("rows", *shown, "sent", "recv", "sec", "cut", "drop"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary.rows.values():
        table.add_row(*_cells(row, shown))
    means = [_number(summary.mean(c)) for c in shown]
    if any(means):
        table.add_section()
        table.add_row("mean", "", *means, style="bold")
    return table


def _cells(row: SiteSummary, shown: list[str]) -> list[str]:
    metrics = [_number(row.metric(c)) for c in shown]
    counts = [str(row.truncated), str(row.dropped)]
    traffic = [_bytes(row.bytes_up), _bytes(row.bytes_down), f"{row.seconds:.0f}"]
    return [row.site, f"{row.train}+{row.test}", *metrics, *traffic, *counts]


def _conclusions(summary: RunSummary) -> list[RenderableType]:
    """The lines below the final table."""
    lines: list[RenderableType] = [_legend(summary)]
    if summary.source_federation:
        lines.append(
            f"The rows are generated texts, labelled by the models from {summary.source_federation}; some of them were "
            "held out for these metrics. The original training data was not read."
        )
    if summary.residual is not None:
        lines.append(f"In the last round mean(B)·mean(A) differed from mean(BA) by {summary.residual:.1%}.")
    lines += _comparison(summary)
    base, personal, tasks = summary.mean("base"), summary.mean("personal"), [row.task for row in summary.rows.values()]
    if base is not None and personal is not None and _better(personal, base, tasks[0]) < 0:
        lines.append(
            "The personal models are worse than the base model. Train for more steps or change the learning rate."
        )
    for row in summary.rows.values():
        lines += [f"{row.site} was left out of round {t}: {reason}" for t, reason in row.failures.items()]
        lines += [
            f"{row.site} had lost its personal state in round {t} and started from the shared adapter."
            for t in row.fresh
        ]
    lines += summary.failures
    return lines


def _legend(summary: RunSummary) -> str:
    alone = "; alone: trained for the same steps without the other sites" if summary.baseline else ""
    return (
        "rows: training + test. base: the base model; shared: with the shared adapter (where heads are personal, both "
        "with a head fitted to the site's training rows); personal: the site's own model"
        f"{alone}. sent, recv: bytes sent and received by the site; sec: seconds of its work; cut: rows longer than "
        f"max_length; drop: rows without anything to learn from. Total time: {summary.seconds:.0f} s."
    )


def _comparison(summary: RunSummary) -> list[str]:
    """One line that compares personal models with the baseline; none without a baseline."""
    pairs = [(r.metric("personal"), r.metric("alone"), r.task) for r in summary.rows.values()]
    gaps = [(_better(p, a, task), p - a) for p, a, task in pairs if p is not None and a is not None]
    if not gaps:
        return []
    wins, losses = (sum(sign == s for sign, _ in gaps) for s in (1, -1))
    mean = sum(sign * abs(gap) for sign, gap in gaps) / len(gaps)  # positive: personal is better
    half = len(gaps) / 2
    verdict = _VERDICTS[(wins > half and mean > 0) - (losses > half and mean < 0)]
    return [
        f"{verdict}: personal is better than training alone at {wins} of {len(gaps)} sites and worse at {losses} "
        f"(on average {abs(mean):.3f} {'better' if mean > 0 else 'worse'}; one seed)."
    ]


_VERDICTS = {
    1: "Collaboration helps",
    0: "It is not clear whether collaboration helps",
    -1: "Collaboration does not help",
}


def _better(personal: float, alone: float, task: str) -> int:
    sign = (personal > alone) - (personal < alone)
    return -sign if TASKS[task].lower_is_better else sign


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit == "MB" else f"{count:.0f} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.1f} GB"
