"""What a person sees: one live table, one line a round where there is no terminal, one final table."""

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


class LiveDisplay:
    """Shows events as they happen. Use as a context; call it with each event."""

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
        """Takes in one event and redraws, or prints its line."""
        before = len(self.summary.ready)
        self.summary.update(event)
        if self.live:
            self.live.update(Group(_headline(self.summary), _progress_table(self.summary)), refresh=True)
        else:
            new = len(self.summary.ready) > before
            line = f"{self.summary.note} ({event['site']})" if new else _line(self.summary, event)
            if line:
                self.console.print(line, highlight=False, soft_wrap=True)


def print_report(board: RunSummary, folder: Path, console: Console) -> None:
    """Prints the final table and what it says, and writes both to ``report.html``."""
    page = Console(record=True, width=120, file=io.StringIO())
    for target in (console, page):
        target.print(_final_table(board))
        for line in _findings(board):
            target.print(line, highlight=False)
    page.save_html(str(folder / "report.html"))
    console.print(f"Run folder: {folder}", highlight=False, soft_wrap=True)


def _headline(board: RunSummary) -> Text:
    if board.baseline:
        return Text(f"{board.federation}: baseline, every site alone, round {board.round} of {board.rounds}")
    phase = f"round {board.round} of {board.rounds}" if board.round else "sites are joining"
    note = f" ({board.note})" if board.note else ""
    return Text(f"{board.federation}: {board.method} on {board.model}, {phase}{note}")


def _progress_table(board: RunSummary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("site", "round", "loss", *EVAL_MODES, "sent", "seconds"):
        table.add_column(name, justify="left" if name == "site" else "right")
    for row in board.rows.values():
        metrics = [_number(row.metric(c)) for c in EVAL_MODES]
        cells = [
            row.site,
            str(row.round or ""),
            _number(row.loss),
            *metrics,
            _bytes(row.bytes_up),
            f"{row.seconds:.0f}",
        ]
        table.add_row(*cells, style="yellow" if row.failures else None)
    return table


def _line(board: RunSummary, event: Event) -> str | None:
    name = event["event"]
    who = "alone: " if event.get("baseline") else ""
    if name == "started":
        return f"{who}{event['federation']}: {event['method']} on {event['model']}, {len(event['sites'])} sites"
    if name == "resumed":
        return f"{who}going on after round {event['round']} of {board.rounds}"
    if name == "round":
        losses = [r.loss for r in board.rows.values() if r.loss is not None]
        loss = f", loss {sum(losses) / len(losses):.3f}" if losses else ""
        personal = board.mean("personal") if not who else None
        metric = f", personal {personal:.3f}" if personal is not None else ""
        sites = f"{len(event['admitted'])} sites"
        return f"{who}round {event['round']}/{board.rounds}: {sites}{loss}{metric}, {event['seconds']:.1f} s"
    if name in ("waiting", "restarted", "late", "closing", "moving"):
        return f"{who}{note_of(event)}"
    if name in ("refused", "failed"):
        site = event.get("site") or "a node"
        reason = str(event["reason"]).removeprefix(f"site {site}: ")
        return f"{who}round {event['round']}: {site} left out: {reason}"
    return None


def _final_table(board: RunSummary) -> Table:
    tasks = sorted({row.task for row in board.rows.values() if row.task})
    kinds = [TASKS[t].primary_metric + (" (lower is better)" if TASKS[t].lower_is_better else "") for t in tasks]
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"{board.federation}: {', '.join(kinds)}",
        title_justify="left",
        pad_edge=False,
    )
    shown = [c for c in COLUMNS if c != "alone" or board.baseline]
    right = ("rows", *shown, "sent", "recv", "sec", "cut", "drop")
    table.add_column("site", no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    for row in board.rows.values():
        table.add_row(*_cells(row, shown))
    means = [_number(board.mean(c)) for c in shown]
    if any(means):
        table.add_section()
        table.add_row("mean", "", *means, style="bold")
    return table


def _cells(row: SiteSummary, shown: list[str]) -> list[str]:
    metrics = [_number(row.metric(c)) for c in shown]
    counts = [str(row.truncated), str(row.dropped)]
    traffic = [_bytes(row.bytes_up), _bytes(row.bytes_down), f"{row.seconds:.0f}"]
    return [row.site, f"{row.train}+{row.test}", *metrics, *traffic, *counts]


def _findings(board: RunSummary) -> list[RenderableType]:
    lines: list[RenderableType] = [
        f"rows: training+test. base: the bare model; shared: the shared adapter only (both with a head fitted to the "
        f"site's training rows where heads are personal); personal: the site's own model"
        f"{'; alone: the same steps without the others' if board.baseline else ''}. sent and recv by the site; cut: "
        f"longer than max_length; drop: nothing to learn from. {board.seconds:.0f} s in all."
    ]
    if board.moved:
        lines.append(
            f"The rows are written texts with the answers of {board.moved}'s models, some of them held out for these "
            "figures; what the sites once trained on was not read."
        )
    if board.residual is not None:
        lines.append(f"mean(B)·mean(A) was {board.residual:.1%} away from mean(BA) in the last round.")
    pairs = [(r.metric("personal"), r.metric("alone"), r.task) for r in board.rows.values()]
    judged = [(_better(p, a, task), p - a) for p, a, task in pairs if p is not None and a is not None]
    if judged:
        wins, losses = (sum(sign == s for sign, _ in judged) for s in (1, -1))
        mean = sum(sign * abs(gap) for sign, gap in judged) / len(judged)  # above zero: better
        most = len(judged) / 2
        verdict = _VERDICTS[(wins > most and mean > 0) - (losses > most and mean < 0)]
        lines.append(
            f"{verdict}: personal is better than training alone at {wins} of {len(judged)} sites, worse at {losses} "
            f"(on average {abs(mean):.3f} {'better' if mean > 0 else 'worse'}; one seed)."
        )
    base, personal = board.mean("base"), board.mean("personal")
    if base is not None and personal is not None and _better(personal, base, next(iter(board.rows.values())).task) < 0:
        lines.append("The personal models are behind the bare model: train longer, or at another learning rate.")
    for row in board.rows.values():
        lines += [f"{row.site} was left out of round {t}: {reason}" for t, reason in row.failures.items()]
        lines += [f"{row.site} had lost its personal state in round {t} and started anew" for t in row.fresh]
    lines += board.failures
    return lines


_VERDICTS = {
    1: "Collaboration shows",
    0: "Whether collaboration helps is not clear here",
    -1: "Collaboration does not show",
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
