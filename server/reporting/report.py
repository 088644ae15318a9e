"""The final report of a run: the table of its sites, and the conclusions from it."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...common.dataset import EVAL_MODES, TASKS
from ...common.foreign_text import printable, sanitize
from ...common.protocol.types import FALLBACK_DIFFERENCE, FALLBACK_ERROR
from .console import number, size
from .events import Event
from .summary import RunSummary, SiteSummary

COLUMNS = (*EVAL_MODES, "alone")
CLEAR = 2.0  # a difference counts if it is larger than so many standard errors
HIGH = 0.5  # a training loss above this fraction of the first round's is high


def print_report(summary: RunSummary, folder: Path, console: Console) -> None:
    """Print the final table and the conclusions from it, and write both to ``report.html``."""
    page = Console(record=True, width=120, file=io.StringIO())
    for target in (console, page):
        target.print(_final_table(summary))
        for line in _conclusions(summary):
            target.print(Text(printable(line)))
    page.save_html(str(folder / "report.html"))
    console.print(Text(printable(f"Run folder: {folder}")), soft_wrap=True)


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
    if not _unequal_steps(summary):
        del shown["steps"]
    table.add_column("site", no_wrap=True)
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary.rows.values():
        table.add_row(sanitize(row.site), *(cell(row) for cell in shown.values()))
    means = {c: number(summary.mean(c)) for c in COLUMNS}
    if any(means.values()):
        gains = known_gains(summary) if means["alone"] else []
        means["gain"] = _gain(*mean_and_error(gains)) if gains else ""
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
    lines = [_legend(summary), *_measuring(summary)]
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
            f"The sites' first updates have different directions. Each of these groups has its own adapter: {told}."
        )
    lines += [*_comparison(summary), *_advice(summary)]
    base, personal = summary.mean("base"), summary.mean("personal")
    tasks = [row.task for row in summary.rows.values() if row.task]
    if base is not None and personal is not None and _better(personal, base, tasks[0]) < 0:
        lines.append(
            "The personal models are worse than the base model. Train for more steps or change the learning rate."
        )
    lines += [*_fallback(summary), *map(_extension, summary.extensions)]
    if names := summary.without_personal_model():
        lines.append(f"{', '.join(names)} took part in no round and have no personal model. The means leave them out.")
    for row in summary.rows.values():
        if row.clipped:
            rounds = ", ".join(map(str, row.clipped))
            lines.append(
                f"The update of {row.site} was much larger than the others and was scaled down in round {rounds}."
            )
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


def _fallback(summary: RunSummary) -> list[str]:
    """The sites that kept their local models, and by what; or that none did."""
    chose = [row for row in summary.rows.values() if row.kept_local is not None]
    kept = [f"{row.site} ({_lower_loss(row)})" for row in chose if row.kept_local]
    if kept:
        return [
            f"{len(kept)} of {len(chose)} sites kept their local model, whose loss on their validation rows is lower: "
            f"{', '.join(kept)}. For these sites, personal is the local model."
        ]
    return [f"No site's local model was clearly better on its validation rows ({len(chose)} sites)."] if chose else []


def _extension(event: Event) -> str:
    before, rounds, key = event["before"], event["rounds"], event["inexact"]
    told = f"The run was extended from {before} to {rounds} rounds."
    if key is None:
        return f"{told} The result is that of a run of {rounds} rounds."
    return (
        f"{told} Rounds 1 to {before} were planned for {before} rounds by {key}, so the result differs from that of a "
        f"run of {rounds} rounds."
    )


def _lower_loss(row: SiteSummary) -> str:
    difference, error = row.metrics.get(FALLBACK_DIFFERENCE), row.metrics.get(FALLBACK_ERROR)
    return "the other is not finite" if difference is None else f"by {difference:.3f} ±{error or 0:.3f}"


def _legend(summary: RunSummary) -> str:
    alone = (
        "; alone: local-only training, for the same steps at the same learning rates; gain: personal − alone ± its "
        "standard error over test rows (of the mean: over sites)"
        if summary.baseline
        else ""
    )
    steps = "steps: optimizer steps of a round. " if _unequal_steps(summary) else ""
    return (
        f"rows: training + test. {steps}base: the base model; shared: with the shared adapter (where heads are "
        "personal, both with a head fitted to the site's training rows); personal: the site's own model"
        f"{alone}. sent: bytes that the site sent; sec: seconds of its work; cut: rows longer than max_length; drop: "
        f"rows without anything to learn from. Total time: {summary.seconds:.0f} s."
    )


def _measuring(summary: RunSummary) -> list[str]:
    """A line that says how much of the sites' work was measuring, and what makes it less."""
    seconds, measuring = (sum(getattr(row, name) for row in summary.rows.values()) for name in ("seconds", "measuring"))
    if not measuring:
        return []
    keys = "evaluation.every and data.test"
    if any(row.task in TASKS and TASKS[row.task].needs_causal_lm for row in summary.rows.values()):
        keys = "evaluation.every, evaluation.max_new_tokens and data.test"
    rest = round(seconds) - round(measuring)  # so that the two add up
    return [
        f"The sites worked for {seconds:.0f} s: {rest} s of training and other work, {measuring:.0f} s of measuring, "
        f"which {keys} limit."
    ]


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
