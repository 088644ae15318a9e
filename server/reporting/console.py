"""Terminal output while a run goes on: a live table, or one line per round without a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ...common.dataset import EVAL_MODES
from ...common.errors import reason_in_words
from ...common.event_log import Event
from ...common.foreign_text import printable, sanitize
from .round_progress import RoundProgress
from .summary import NOTED, RunSummary, note_of

PHASES = ("started", "agreed", "round_started", "finalizing")  # events with which a new elapsed time begins


class LiveDisplay:
    """Displays events as they happen: a context manager that is called with each event.

    In a terminal a spinner shows from the first moment what is being done, and for how long.
    """

    def __init__(self, console: Console) -> None:
        self.console, self.summary = console, RunSummary()
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
        self.headline = Progress(*columns, console=console)  # drawn by ``live``
        self.phase = self.headline.add_task("starting")
        self.progress = RoundProgress(console)
        self.live = Live(self.headline, console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> LiveDisplay:
        if self.live:
            self.live.__enter__()
        return self

    def say(self, line: str) -> None:
        """Print a line, above the table."""
        self.console.print(Text(printable(line)), soft_wrap=True)

    def __exit__(self, *exc: object) -> None:
        if self.live:
            self.live.__exit__(None, None, None)

    def __call__(self, event: Event) -> None:
        """Process one event, and redraw the table or print the event's line."""
        before = len(self.summary.ready)
        self.summary.update(event)
        self.progress(event)
        if self.live:
            if event["event"] in PHASES:
                self.headline.reset(self.phase)
            self.headline.update(self.phase, description=_headline(self.summary))
            self.live.update(Group(self.headline, self.progress.bar, _progress_table(self.summary)), refresh=True)
        else:
            new = len(self.summary.ready) > before
            line = f"{self.summary.note} ({event['site']})" if new else _line(self.summary, event)
            if line:
                self.say(line)


def _headline(summary: RunSummary) -> str:
    if summary.baseline:
        where = f"round {summary.round} of {summary.rounds}"
        return printable(f"{summary.federation}: baseline (each site alone), {where}")
    phase = f"round {summary.round} of {summary.rounds}" if summary.round else "waiting for sites to join"
    note = f" ({summary.note})" if summary.note else ""
    phase += _epsilon_of(summary)
    return printable(f"{summary.federation}: {summary.method} on {summary.model}, {phase}{note}")


def _progress_table(summary: RunSummary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("site", "round", "loss", *EVAL_MODES, "sent", "seconds"):
        table.add_column(name, justify="left" if name == "site" else "right")
    for row in summary.rows.values():
        metrics = [number(row.metric(mode)) for mode in EVAL_MODES]
        progress = [sanitize(row.site), str(row.round or ""), number(row.alone_loss if summary.baseline else row.loss)]
        cells = [*progress, *metrics, size(row.bytes_up), f"{row.seconds:.0f}"]
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
        sites = _sites_of(summary, event)
        epsilon = _epsilon_of(summary) if not prefix else ""
        share = summary.measuring_share(event["round"], baseline=bool(prefix))
        took = f"{event['seconds']:.1f} s" + (f" ({share:.0%} evaluation)" if share else "")
        return f"{prefix}round {event['round']}/{summary.rounds}: {sites}{loss}{metric}{epsilon}, {took}"
    if name == "grouped":
        return f"{len(event['groups'])} group{'s' * (len(event['groups']) > 1)} of sites: " + "; ".join(
            map(", ".join, event["groups"])
        )
    if name in NOTED:
        return f"{prefix}{note_of(event)}"
    if name in ("refused", "failed"):
        site = event.get("site") or "unknown node"
        reason = reason_in_words(str(event["reason"]), site)
        what = f"round {event['round']}: {site} left out" if event["round"] else f"before round 1: {site} cannot join"
        return f"{prefix}{what}: {reason}"
    return None


def _sites_of(summary: RunSummary, event: Event) -> str:
    """Whose updates the round averaged; with secure aggregation, out of how many that took part in the sum."""
    opened = summary.secure_sums.get(event["round"]) if not event.get("baseline") else None
    if opened:
        return f"secure sum of {len(opened['sites'])} of {len(opened['sites']) + len(opened['dropped'])} sites"
    return f"{len(event['admitted'])} sites"


def _epsilon_of(summary: RunSummary) -> str:
    """The privacy budget spent so far: by the noise at the coordinator, and at the site that has spent most."""
    parts = [f", site-level ε = {summary.noised['epsilon']:.3g}"] if summary.noised else []
    spent = summary.epsilon_of_examples()
    return "".join([*parts, f", example-level ε = {spent:.3g}" if spent is not None else ""])


def number(value: float | None) -> str:
    """Format a metric; empty if it was not measured."""
    return "" if value is None else f"{value:.3f}"


def size(count: int) -> str:
    """Format a number of bytes."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit == "MB" else f"{count:.0f} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.1f} GB"
