"""The history of a run, from its events: what every round and every site did, and what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..summary import RunSummary, SiteSummary

Points = dict[int, float]  # rounds trained → value


@dataclass
class Cost:
    """What one site spent: bytes of its messages, and seconds of its work."""

    down: int = 0
    up: int = 0
    seconds: float = 0.0
    measuring: float = 0.0  # of ``seconds``

    def add(self, other: Cost) -> None:
        """Add another cost to this one."""
        for name in ("down", "up", "seconds", "measuring"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True)
class Incident:
    """Something out of the ordinary: ``kind`` is the name of its event. ``alone``: in the local-only baseline."""

    kind: str
    round: int
    site: str
    reason: str
    alone: bool = False


@dataclass
class RoundRecord:
    """One round; number 0 is the preparation, and the last number + 1 the finalization."""

    number: int
    asked: list[str] = field(default_factory=list)
    admitted: list[str] | None = None  # None until the round has ended
    weights: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    residual: float | None = None
    began: float | None = None  # time of its first event
    final: bool = False
    secure: bool = False  # the coordinator opened a sum only
    costs: dict[str, Cost] = field(default_factory=dict)  # of the sites that replied
    problems: dict[str, Incident] = field(default_factory=dict)  # the last one of a site
    clipped: set[str] = field(default_factory=set)
    validated: set[str] = field(default_factory=set)  # sites that measured the loss on validation rows after it

    @property
    def name(self) -> str:
        """The round's number, or what takes its place."""
        return "final" if self.final else str(self.number) if self.number else "start"

    @property
    def cost(self) -> Cost:
        """The cost of all sites together."""
        total = Cost()
        for cost in self.costs.values():
            total.add(cost)
        return total


@dataclass
class History:
    """The events of one run, in the order of the page."""

    label: str = ""  # distinguishes runs on one page
    summary: RunSummary = field(default_factory=RunSummary)
    events: int = 0
    skipped: str = ""  # a sentence about lines that are not events
    began: float | None = None
    ended: float | None = None  # time of the last event
    state: str = "not started"
    baseline_ended: bool = False
    rounds: dict[int, RoundRecord] = field(default_factory=dict)
    incidents: list[Incident] = field(default_factory=list)
    curves: dict[tuple[str, str, str], Points] = field(default_factory=dict)  # by (site, mode, metric)
    losses: dict[tuple[str, str], Points] = field(default_factory=dict)  # by (site, "personal" or "alone")
    tests: list[dict[str, Any]] = field(default_factory=list)  # of the division into groups
    cosines: dict[str, dict[str, float | None]] = field(default_factory=dict)
    weighting: str = ""
    identity: str = ""  # hash of the recipe
    at_site: str = ""  # the site whose own log this is; empty for the coordinator's
    settings: dict[str, Any] = field(default_factory=dict)  # the recipe; empty in logs of older versions
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def sites(self) -> list[SiteSummary]:
        """The sites in roster order."""
        return list(self.summary.rows.values())

    def tasks(self) -> dict[str, list[SiteSummary]]:
        """The sites by task; those that have not joined are left out."""
        tasks: dict[str, list[SiteSummary]] = {}
        for row in self.sites:
            if row.task:
                tasks.setdefault(row.task, []).append(row)
        return tasks

    def training_rounds(self) -> list[RoundRecord]:
        """The rounds of training that have ended, in order."""
        records = (record for _, record in sorted(self.rounds.items()))
        return [r for r in records if r.number and not r.final and r.admitted is not None]

    def group_of(self, site: str) -> int:
        """The index of a site's group; 0 if all sites share one adapter."""
        return next((i for i, group in enumerate(self.summary.groups) if site in group), 0)


def mean_points(history: History, sites: Sequence[str], mode: str, metric: str) -> Points:
    """The mean of a metric over the sites that measured it, by rounds trained."""
    return _means(history.curves.get((site, mode, metric), {}) for site in sites)


def mean_losses(history: History, mode: str) -> Points:
    """The mean training loss of each round, of the federation ("personal") or of local-only training ("alone")."""
    return _means(points for (_, kind), points in history.losses.items() if kind == mode)


def mean_metric(rows: Sequence[SiteSummary], mode: str) -> float | None:
    """The mean primary metric of sites with one task; once sites have personal models, of these only."""
    personal = [row for row in rows if row.metric("personal") is not None]
    known = [value for row in personal or rows if (value := row.metric(mode)) is not None]
    return sum(known) / len(known) if known else None


def other_metrics(rows: Sequence[SiteSummary], task_metrics: Sequence[str]) -> Mapping[str, dict[str, float]]:
    """The means over sites of all metrics of a task: metric → mode → mean. Metrics without values are left out."""
    table: dict[str, dict[str, float]] = {}
    for metric in task_metrics:
        for mode in ("base", "shared", "personal", "alone"):
            name = f"personal.{metric}" if mode == "alone" else f"{mode}.{metric}"
            found = [(row.alone if mode == "alone" else row.metrics).get(name) for row in rows]
            known = [value for value in found if value is not None]
            if known:
                table.setdefault(metric, {})[mode] = sum(known) / len(known)
    return table


def _means(curves: Iterable[Points]) -> Points:
    values: dict[int, list[float]] = {}
    for points in curves:
        for x, value in points.items():
            values.setdefault(x, []).append(value)
    return {x: sum(known) / len(known) for x, known in sorted(values.items())}
