"""The final report of a run: the table of its sites, and the conclusions from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...common.dataset import EVAL_MODES, TASKS
from ...common.foreign_text import printable, sanitize
from .conclusions import (
    advice,
    compare_gains,
    extensions,
    fallbacks,
    learning_rates,
    measuring,
    privacy,
    ranks,
    selection,
    warnings,
)
from .console import number, size
from .page.build import write_page
from .summary import RunSummary, SiteSummary

COLUMNS = (*EVAL_MODES, "alone")


def print_report(summary: RunSummary, folder: Path, console: Console) -> None:
    """Print the final table and the conclusions from it, and write ``report.html`` from the events in ``folder``."""
    console.print(_final_table(summary))
    for line in _conclusions(summary):
        console.print(Text(printable(line)))
    write_page([folder], folder / "report.html")
    console.print(Text(printable(f"Run folder: {folder}")), soft_wrap=True)


def _final_table(summary: RunSummary) -> Table:
    tasks = sorted({row.task for row in summary.rows.values() if row.task in TASKS})  # a log may name any other
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
    if not _unequal_steps(summary):
        del shown["steps"]
    table.add_column("site", no_wrap=True)
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary.rows.values():
        table.add_row(sanitize(row.site), *(cell(row) for cell in shown.values()))
    means = {c: number(summary.mean(c)) for c in COLUMNS}
    if any(means.values()):
        compared = compare_gains(list(summary.rows.values())) if means["alone"] else None
        means["gain"] = _gain(compared.mean, compared.error) if compared else ""
        table.add_section()
        table.add_row("mean", *(means.get(name, "") for name in shown), style="bold")
    return table


_CELLS: dict[str, Callable[[SiteSummary], str]] = {
    "rows": lambda row: f"{row.train}+{row.test}",
    "steps": lambda row: str(row.steps),
    **{mode: lambda row, mode=mode: number(row.metric(mode)) for mode in COLUMNS},
    "gain": lambda row: "" if row.gain is None else _gain(row.gain, row.gain_error),
    "sent": lambda row: size(row.bytes_up),
    "sec": lambda row: f"{row.seconds:.0f}",
    "cut": lambda row: str(row.truncated),
    "drop": lambda row: str(row.dropped),
}


def _unequal_steps(summary: RunSummary) -> bool:
    """Whether a round has different numbers of steps at different sites, as with ``train.epochs``."""
    return len({row.steps for row in summary.rows.values() if row.train}) > 1


def _conclusions(summary: RunSummary) -> list[str]:
    """The lines below the final table."""
    lines = [*filter(None, [summary.description]), _legend(summary), *measuring(summary)]
    if summary.source_federation:
        lines.append(
            f"The rows are generated texts, labelled by the models from {summary.source_federation}; some of them were "
            "held out for these metrics. The original training data was not read."
        )
    lines += [*privacy(summary), *ranks(summary)]
    if summary.residual is not None:
        lines.append(f"In the last round mean(B)·mean(A) differed from mean(BA) by {summary.residual:.1%}.")
    if len(summary.groups) > 1:
        told = "; ".join(", ".join(group) for group in summary.groups)
        lines.append(
            f"The sites' first updates have different directions. Each of these groups has its own adapter: {told}."
        )
    lines += [*_comparison(summary), *advice(summary), *fallbacks(summary)]
    lines += [*selection(summary), *extensions(summary)]
    lines += warnings(summary)
    for row in summary.rows.values():
        if row.clipped:
            rounds = ", ".join(map(str, row.clipped))
            lines.append(
                f"The update of {row.site} was much larger than the others and was scaled down in round {rounds}."
            )
        if row.distant:
            rounds = ", ".join(map(str, row.distant))
            lines.append(f"The update of {row.site} was far from the others and was not averaged in round {rounds}.")
        lines += [
            f"{row.site} was left out {f'of round {t}' if t else 'before round 1'}: {reason}"
            for t, reason in row.failures.items()
        ]
        lines += [
            f"{row.site} had lost its personal state in round {t} and started from the shared adapter."
            for t in row.fresh
        ]
    lines += summary.failures
    return lines


def _legend(summary: RunSummary) -> str:
    steps = "ended by the same rule on validation rows" if summary.selected else "for the same steps"
    alone = (
        f"; alone: local-only training, {steps} at the same learning rates; gain: personal − alone ± its "
        "standard error over test rows (of the mean: over sites)"
        if summary.baseline
        else ""
    )
    down, up = (size(sum(getattr(row, name) for row in summary.rows.values())) for name in ("bytes_down", "bytes_up"))
    steps = "steps: optimizer steps of a round. " if _unequal_steps(summary) else ""
    return (
        f"rows: training + test. {steps}base: the base model; shared: with the shared adapter (where heads are "
        "personal, both with a head fitted to the site's training rows); personal: the site's own model"
        f"{alone}. sent: bytes that the site sent (all sites: {up}, and {down} received); sec: seconds of "
        "its work; cut: rows longer than max_length; drop: "
        f"rows without anything to learn from. Total time: {summary.seconds:.0f} s."
    )


def _comparison(summary: RunSummary) -> list[str]:
    """Two lines that compare personal models with the baseline; none without a baseline."""
    compared = compare_gains(list(summary.rows.values()))
    if not compared:
        return []
    verdict = (
        f"{compared.verdict}: the personal models gain {_gain(compared.mean, compared.error)} over local-only training "
        f"on average ({compared.sites} sites, one seed)."
    )
    return [" ".join(filter(None, (verdict, compared.counts))), *filter(None, [learning_rates(summary)])]


def _gain(gain: float, error: float | None) -> str:
    return f"{gain:+.3f}" + ("" if error is None else f" ±{error:.3f}")
