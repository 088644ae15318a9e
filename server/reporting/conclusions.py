"""What follows from a run's results: whether collaboration helped, and what to change."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ...common.dataset import TASKS
from ...common.protocol.types import FALLBACK_DIFFERENCE, FALLBACK_ERROR
from ...common.standard_error import mean_and_error
from .summary import RunSummary, SiteSummary

CLEAR = 2.0  # a site's gain counts if it is larger than so many standard errors over its test rows
LEVEL = 0.95  # of the confidence interval of the mean gain over sites
HIGH = 0.5  # a training loss above this fraction of the first round's is high


@dataclass(frozen=True)
class Comparison:
    """Personal models against local-only training: the mean gain over ``sites``, and which sites differ clearly.

    ``better`` and ``worse`` count sites beyond two standard errors, out of ``judged`` whose standard error is known.
    """

    mean: float
    error: float | None  # standard error of the mean over sites; None for one site
    sites: int
    judged: int
    better: int
    worse: int

    @property
    def verdict(self) -> str:
        """A sentence without its full stop. With few sites, Student's t needs more than two standard errors."""
        if self.error is None or abs(self.mean) <= _quantile(self.sites - 1) * self.error:
            return "It is not clear whether collaboration helps"
        return "Collaboration helps" if self.mean > 0 else "Collaboration hurts"

    @property
    def counts(self) -> str:
        """A sentence about the sites that differ clearly; empty if no standard error is known."""
        if not self.judged:
            return ""
        return (
            f"Beyond {CLEAR:.0f} standard errors, {self.better} of {self.judged} sites are better and "
            f"{self.worse} worse."
        )


def compare_gains(rows: Sequence[SiteSummary]) -> Comparison | None:
    """Compare the personal models of these sites with local-only training; None without a baseline."""
    gains = [row.gain for row in rows if row.gain is not None]
    if not gains:
        return None
    mean, error = mean_and_error(gains)
    # Without a standard error no single site is told from chance.
    judged = [(r.gain, r.gain_error) for r in rows if r.gain is not None and r.gain_error is not None]
    better, worse = (sum(sign * gain > CLEAR * e for gain, e in judged) for sign in (1, -1))
    return Comparison(mean, error, len(gains), len(judged), better, worse)


def _quantile(freedom: int) -> float:
    """Of Student's t: the mean of values without an effect is nearer to 0 than so many standard errors, at LEVEL."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def learning_rates(summary: RunSummary) -> str:
    """A sentence that names the learning rates of both; empty if they are not known."""
    rates = ", ".join(f"train.{name} = {rate:g}" for name, rate in summary.learning_rates.items())
    tuned = "colora compare tunes the rates of each method and repeats it over seeds."
    return f"Both were trained at {rates}. {tuned}" if rates else ""


def measuring(summary: RunSummary) -> list[str]:
    """A line that says how much of the sites' work was evaluation, and what makes it less."""
    seconds, measured = (sum(getattr(row, name) for row in summary.rows.values()) for name in ("seconds", "measuring"))
    if not measured:
        return []
    keys = "evaluation.every and data.test"
    if any(row.task in TASKS and TASKS[row.task].needs_causal_lm for row in summary.rows.values()):
        keys = "evaluation.every, evaluation.max_new_tokens and data.test"
    rest = round(seconds) - round(measured)  # so that the two add up
    return [
        f"The sites worked for {seconds:.0f} s: {rest} s of training and other work, {measured:.0f} s of evaluation, "
        f"which {keys} limit."
    ]


def advice(summary: RunSummary) -> list[str]:
    """A line if the training loss says that the shared adapter is still improving."""
    if summary.selected and (summary.selected["early"] or summary.selected["kept"] < summary.selected["round"]):
        return []  # the validation loss says that more rounds are no better
    losses: dict[int, list[float]] = {}
    for (_, _, t, _), reply in summary.replies.items():
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


def ranks(summary: RunSummary) -> list[str]:
    """A line about the sites whose adapters have a smaller rank than the federation's."""
    smaller = [f"{row.site} {row.rank}" for row in summary.rows.values() if row.rank]
    return [f"Sites with adapters of a smaller rank (allow.max_rank): {', '.join(smaller)}."] if smaller else []


def fallbacks(summary: RunSummary) -> list[str]:
    """A line about the sites that kept their local models, and by what; or that none did."""
    chose = [row for row in summary.rows.values() if row.kept_local is not None]
    kept = [f"{row.site} ({_lower_loss(row)})" for row in chose if row.kept_local]
    if kept:
        return [
            f"{len(kept)} of {len(chose)} sites kept their local model, whose loss on their validation rows is lower: "
            f"{', '.join(kept)}. For these sites, personal is the local model."
        ]
    return [f"No site's local model was clearly better on its validation rows ({len(chose)} sites)."] if chose else []


def _lower_loss(row: SiteSummary) -> str:
    difference, error = row.metrics.get(FALLBACK_DIFFERENCE), row.metrics.get(FALLBACK_ERROR)
    return "the other is not finite" if difference is None else f"by {difference:.3f} ±{error or 0:.3f}"


def extensions(summary: RunSummary) -> list[str]:
    """A line for each time that the run got more rounds."""
    lines = []
    for event in summary.extensions:
        before, rounds, key = event["before"], event["rounds"], event["inexact"]
        same = f"The result is that of a run of {rounds} rounds."
        differs = (
            f"Rounds 1 to {before} were planned for {before} rounds by {key}, so the result differs from that of a run "
            f"of {rounds} rounds."
        )
        lines.append(f"The run was extended from {before} to {rounds} rounds. {differs if key else same}")
    return lines


def selection(summary: RunSummary) -> list[str]:
    """Lines about the round that the run ended with, where validation losses decided it."""
    if not summary.selected:
        return []
    last, kept = summary.selected["round"], summary.selected["kept"]
    lines = []
    if summary.selected["early"]:
        lines.append(
            f"The run ended after round {last} of {summary.rounds}: the validation loss had stopped improving "
            "(server.patience)."
        )
    if kept != last:
        lines.append(f"The final models are those of round {kept}, whose validation loss was the lowest.")
    return lines


def warnings(summary: RunSummary) -> list[str]:
    """Lines about results that are worse than the base model, and sites without a personal model."""
    lines = []
    base, personal = summary.mean("base"), summary.mean("personal")
    tasks = [row.task for row in summary.rows.values() if row.task]
    if base is not None and personal is not None and _better(personal, base, tasks[0]) < 0:
        lines.append(
            "The personal models are worse than the base model. Train for more steps or change the learning rate."
        )
    if names := summary.without_personal_model():
        lines.append(f"{', '.join(names)} took part in no round and have no personal model. The means leave them out.")
    return lines


def _better(personal: float, alone: float, task: str) -> int:
    sign = (personal > alone) - (personal < alone)
    return -sign if TASKS[task].lower_is_better else sign


def privacy(summary: RunSummary) -> list[str]:
    """What the run has spent of the sites' privacy budgets; none without differential privacy."""
    return [*_privacy_of_sites(summary), *_privacy_of_examples(summary)]


def _privacy_of_sites(summary: RunSummary) -> list[str]:
    """What the noise at the coordinator has spent."""
    event = summary.noised
    if event is None:
        return []
    budget = "" if event["budget"] is None else f" of {event['budget']:g}"
    lines = [
        f"Differential privacy for each site: the shared adapters have spent ε = {event['epsilon']:.3g}{budget} at "
        f"δ = {event['delta']:g}. In the last round {len(event['clipped'])} of {event['sites']} updates were clipped "
        f"to a norm of {event['bound']:g}, and every number of the mean got noise with a standard deviation of "
        f"{event['noise']:.3g}."
    ]
    if summary.budget_spent:
        alone = " Local-only training took all rounds." if summary.baseline else ""
        lines.append(
            f"The run ended after round {event['round']} of {summary.rounds}: another round would exceed the privacy "
            f"budget{budget} (server.privacy.epsilon).{alone}"
        )
    return lines


def _privacy_of_examples(summary: RunSummary) -> list[str]:
    """What the noise at the sites has spent."""
    spent = summary.epsilon_of_examples()
    if spent is None:
        return []
    shown = any(row.metric("personal") is not None for row in summary.rows.values())
    withheld = "" if shown else ' Metrics stay at the sites. A simulation can set privacy.metrics = "all".'
    delta = f" at δ = {summary.delta:g}" if summary.delta else ""
    return [
        f"Differential privacy for each training example: the sites have spent at most ε = {spent:.3g}{delta}."
        f"{withheld}"
    ]
