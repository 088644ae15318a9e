"""Summary of a run's events, with one entry per site. The live table, the report and ``colora status`` use it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...common.dataset import TASKS
from ...common.errors import reason_in_words
from ...common.event_log import Event
from ...common.protocol.types import EPSILON, FALLBACK_KEPT

Metrics = Mapping[str, float | None]
_SLOW = "takes minutes per site without a GPU"


@dataclass
class SiteSummary:
    """The results of one site so far.

    ``metrics`` and ``alone`` (those of the baseline) map names such as ``personal.accuracy`` to values.
    """

    site: str
    task: str = ""
    train: int = 0
    test: int = 0
    truncated: int = 0
    dropped: int = 0
    steps: int = 0  # optimizer steps of a round
    rank: int = 0  # of its adapter, where it is smaller than the federation's
    metrics: dict[str, float | None] = field(default_factory=dict)
    alone: dict[str, float | None] = field(default_factory=dict)
    gain: float | None = None  # of the personal model over local-only training; positive is better
    gain_error: float | None = None  # its standard error, paired by test row
    round: int = 0
    loss: float | None = None
    alone_loss: float | None = None  # the baseline's last training loss
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    measuring: float = 0.0  # of ``seconds``: those in which models were measured
    failures: dict[int, str] = field(default_factory=dict)  # round → why its reply was left out
    clipped: list[int] = field(default_factory=list)  # rounds in which its update was scaled down
    distant: list[int] = field(default_factory=list)  # rounds in which its update was left out as far from the others
    fresh: list[int] = field(default_factory=list)  # rounds in which it had lost its personal state

    @property
    def kept_local(self) -> bool | None:
        """Whether the site kept its local model (``train.fallback``); None if it had no choice."""
        kept = self.metrics.get(FALLBACK_KEPT)
        return None if kept is None else bool(kept)

    def metric(self, mode: str) -> float | None:
        """The task's primary metric of ``base``, ``shared``, ``personal`` or ``alone``; None if not measured."""
        if self.task not in TASKS:
            return None
        name = TASKS[self.task].primary_metric
        if mode == "alone":
            return self.alone.get(f"personal.{name}")
        return self.metrics.get(f"{mode}.{name}")


@dataclass
class RunSummary:
    """A federation and its local-only baseline, built up from their events in order."""

    federation: str = ""
    method: str = ""
    model: str = ""
    description: str = ""  # the recipe's own words
    rounds: int = 0
    round: int = 0
    residual: float | None = None
    baseline: bool = False  # whether the baseline has started
    seconds: float = 0.0
    learning_rates: dict[str, float] = field(default_factory=dict)  # by parameter group
    delta: float | None = None  # δ of differential privacy
    noised: Event | None = None  # the last round's event of differential privacy for each site
    budget_spent: bool = False  # the run ended since another round would exceed this budget
    source_federation: str = ""  # of a transfer: the federation in which the sites trained before
    groups: list[list[str]] = field(default_factory=list)  # of sites with an adapter of their own, the largest first
    extensions: list[Event] = field(default_factory=list)  # events by which the run got more rounds
    note: str = ""  # the current unusual condition, in words
    ready_event: str = ""  # the event by which a site reports the end of work that takes minutes; empty for none
    ready: list[str] = field(default_factory=list)  # sites that have reported it
    expected_ready: int = 0  # number of sites that will
    rows: dict[str, SiteSummary] = field(default_factory=dict)  # by site, in roster order
    failures: list[str] = field(default_factory=list)  # of nodes that are not a known site
    selected: Event | None = None  # the event that names the round that the run ends with
    secure_sums: dict[int, Event] = field(default_factory=dict)  # by round
    replies: dict[tuple[bool, str, int, str], Event] = field(default_factory=dict)  # by (baseline, site, round, kind)

    def update(self, event: Event) -> None:
        """Process one event. A round that was repeated after a restart counts once."""
        baseline = bool(event.get("baseline"))
        handler = _HANDLERS.get((event["event"], baseline)) or _HANDLERS.get((event["event"], None))
        if handler:
            handler(self, event)

    def site(self, site: str) -> SiteSummary:
        """Return a site's summary, creating it on first use."""
        return self.rows.setdefault(site, SiteSummary(site))

    def measuring_share(self, t: int, *, baseline: bool = False) -> float:
        """The fraction of the sites' work in round ``t`` that was measuring, not training."""
        replies = [event for (alone, _, number, _), event in self.replies.items() if (alone, number) == (baseline, t)]
        seconds = sum(event["seconds"] for event in replies)
        return sum(event.get("measuring", 0) for event in replies) / seconds if seconds else 0.0

    def mean(self, mode: str) -> float | None:
        """The mean primary metric over sites; None if tasks differ or nothing was measured.

        Once sites have personal models, the mean of every mode is over these sites.
        """
        personal = [row for row in self.rows.values() if row.metric("personal") is not None]
        values = [row.metric(mode) for row in personal or self.rows.values()]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len({r.task for r in self.rows.values() if r.task}) == 1 else None

    def epsilon_of_examples(self) -> float | None:
        """The largest ε that a site has spent on its training examples; None without differential privacy."""
        spent = [epsilon for row in self.rows.values() if (epsilon := row.metrics.get(EPSILON)) is not None]
        return max(spent, default=None)

    def without_personal_model(self) -> list[str]:
        """The sites with training rows that were evaluated and have no personal model, where others have one."""
        without = [row for row in self.rows.values() if row.metric("personal") is None]
        evaluated = [
            row.site for row in without if row.train and (row.metric("base") or row.metric("shared")) is not None
        ]
        return evaluated if len(without) < len(self.rows) else []


def summarize(events: Iterable[Event]) -> RunSummary:
    """Build the summary of these events."""
    summary = RunSummary()
    for event in events:
        summary.update(event)
    return summary


def note_of(event: Event) -> str:
    """Describe a waiting, restarted, late, transfer_started or finalizing event in words."""
    return _NOTES[event["event"]](event)


def _transfer_note(event: Event) -> str:
    sites, source = len(event["sites"]), event["source_federation"]
    return f"{sites} sites generate texts and label them with their models from {source} ({_SLOW})"


def _finalizing_note(event: Event) -> str:
    prepare = f", and prepare a later transfer ({_SLOW})" if event["prepares"] else ""
    return f"finalizing: {len(event['sites'])} sites personalize and evaluate{prepare}"


def _validated_note(event: Event) -> str:
    loss = "not finite" if event["loss"] is None else f"{event['loss']:.4f}"
    return f"round {event['round']}: validation loss {loss}, best round {event['best']}"


def _restarted_note(event: Event) -> str:
    return f"restarted the {event['what']}" + (f": {event['reason']}" if event.get("reason") else "")


def _waiting_note(event: Event) -> str:
    if "reason" in event:
        return f"waiting: {event['reason']}"
    seconds, present, quorum = event.get("seconds", 0), len(event["present"]), event["quorum"]
    if not event["missing"]:
        return f"waiting: {present} joined, {quorum} needed"
    if "round" not in event:
        since = f" for {seconds:.0f} s" if seconds else ""
        return f"waiting for {', '.join(event['missing'])}{since}: {present} joined, {quorum} needed"
    offline = event.get("offline", ())
    sites = ", ".join(f"{site} (offline)" if site in offline else site for site in event["missing"])
    silence = f"waiting for {sites}, silent for {seconds:.0f} s"
    return f"{event.get('when', 'a round')}: {silence}; {present} replied, quorum {quorum}"


def _budget_note(event: Event) -> str:
    return f"no round after {event['round']}: another would exceed server.privacy.epsilon"


_NOTES: dict[str, Callable[[Event], str]] = {
    "budget_spent": _budget_note,
    "tracker_failed": lambda event: f"the tracker {event['tracker']} stopped, the run goes on: {event['reason']}",
    "transfer_started": _transfer_note,
    "finalizing": _finalizing_note,
    "restarted": _restarted_note,
    "validated": _validated_note,
    "late": lambda event: f"round {event['round']}: {event['site']} {event['reason']}",
    "waiting": _waiting_note,
}


NOTED = frozenset(_NOTES)  # events that note_of() describes


def _set_note(summary: RunSummary, event: Event) -> None:
    summary.note = note_of(event)


def _tracker_failed(summary: RunSummary, event: Event) -> None:
    _set_note(summary, event)
    summary.failures.append(f"The tracker {event['tracker']} stopped: {event['reason']}")


def _transfer_started(summary: RunSummary, event: Event) -> None:
    _set_note(summary, event)
    summary.ready_event, summary.ready, summary.expected_ready = "site_ready", [], len(event["sites"])
    summary.source_federation = event["source_federation"]


def _finalizing(summary: RunSummary, event: Event) -> None:
    _set_note(summary, event)
    summary.ready_event = "reply" if event["prepares"] else ""
    summary.ready, summary.expected_ready = [], len(event["sites"])


def _ready(summary: RunSummary, event: Event) -> None:
    if event["event"] == summary.ready_event and event["site"] not in summary.ready:
        summary.ready.append(event["site"])
        summary.note = f"{len(summary.ready)} of {summary.expected_ready} sites are ready"


def _started(summary: RunSummary, event: Event) -> None:
    summary.federation, summary.method, summary.model = event["federation"], event["method"], event["model"]
    summary.rounds, summary.ready_event = event["rounds"], ""
    rates = event.get("learning_rates", {})
    summary.learning_rates = {name: rate for name, rate in rates.items() if rate is not None}
    if settings := event.get("settings"):  # a site writes them once for each plan
        summary.description = str(settings.get("description", ""))
        privacy = settings.get("privacy", {})
        delta = privacy.get("delta") if isinstance(privacy, dict) else None
        summary.delta = delta if isinstance(delta, float) else None
    for site in event["sites"]:
        summary.site(site)


def _baseline_started(summary: RunSummary, event: Event) -> None:
    summary.baseline, summary.round, summary.ready_event = True, 0, ""


def _joined(summary: RunSummary, event: Event) -> None:
    row = summary.site(event["site"])
    for name in ("task", "train", "test", "truncated", "dropped"):
        setattr(row, name, event[name])
    row.steps, row.rank = event.get("steps", 0), event.get("rank", 0)
    row.failures.pop(0, None)  # before it joined


def _extended(summary: RunSummary, event: Event) -> None:
    summary.extensions.append(event)
    summary.rounds = event["rounds"]


def _grouped(summary: RunSummary, event: Event) -> None:
    summary.groups = event["groups"]


def _round_started(summary: RunSummary, event: Event) -> None:
    summary.round, summary.note, summary.ready_event = event["round"], "", ""


def _round(summary: RunSummary, event: Event) -> None:
    summary.round, summary.residual = event["round"], event.get("residual")


def _reply(summary: RunSummary, event: Event) -> None:
    row, kind = summary.site(event["site"]), event.get("kind", "")
    key = (False, event["site"], event["round"], "validate" if kind == "validate" else "")
    before = summary.replies.get(key) if event["round"] else None  # round 0 holds all steps of a spectral start
    summary.replies[key] = event
    for name in ("bytes_up", "bytes_down", "seconds", "measuring"):
        setattr(row, name, getattr(row, name) + event.get(name, 0) - (before.get(name, 0) if before else 0))
    if kind == "validate":  # it is no part of a round
        return
    row.metrics.update(event["metrics"])
    row.failures.pop(event["round"], None)  # its round was repeated, and now it is admitted
    if event.get("fresh") and event["round"] not in row.fresh:
        row.fresh.append(event["round"])
    row.round = min(event["round"], summary.rounds)
    row.loss = event["metrics"].get("train.loss", row.loss)
    _ready(summary, event)


def _baseline_reply(summary: RunSummary, event: Event) -> None:
    row = summary.site(event["site"])
    if event.get("kind") == "validate":
        return
    row.alone.update(event["metrics"])
    row.alone_loss, row.round = event["metrics"].get("train.loss", row.alone_loss), min(event["round"], summary.rounds)
    alone, personal = row.metric("alone"), row.metric("personal")
    if alone is not None and personal is not None:
        row.gain = alone - personal if TASKS[row.task].lower_is_better else personal - alone


def _compared(summary: RunSummary, event: Event) -> None:
    row = summary.site(event["site"])
    row.gain, row.gain_error = event["gain"], event["standard_error"]


def _left_out(summary: RunSummary, event: Event) -> None:
    site = event.get("site")
    reason = reason_in_words(str(event["reason"]), site)
    if site in summary.rows:
        summary.rows[site].failures.setdefault(event["round"], reason)
    else:
        summary.failures.append(f"{site or 'unknown node'}: {reason}")


def _secure_sum(summary: RunSummary, event: Event) -> None:
    """Add the bytes of the steps after training, once for a round that was repeated."""
    before = summary.secure_sums.get(event["round"], {})
    summary.secure_sums[event["round"]] = event
    for name in ("bytes_up", "bytes_down"):
        for change, sign in ((event, 1), (before, -1)):
            for site, size in change.get(name, {}).items():
                row = summary.site(site)
                setattr(row, name, getattr(row, name) + sign * size)


def _clipped(summary: RunSummary, event: Event) -> None:
    rounds = summary.site(event["site"]).clipped
    if event["round"] not in rounds:
        rounds.append(event["round"])


def _distant(summary: RunSummary, event: Event) -> None:
    rounds = summary.site(event["site"]).distant
    if event["round"] not in rounds:
        rounds.append(event["round"])


def _noised(summary: RunSummary, event: Event) -> None:
    summary.noised = event


def _budget_spent(summary: RunSummary, event: Event) -> None:
    _set_note(summary, event)
    summary.budget_spent = True


def _selected(summary: RunSummary, event: Event) -> None:
    summary.selected = event


def _finished(summary: RunSummary, event: Event) -> None:
    summary.seconds += event["seconds"]


# By event and by whether it is the baseline's (None: either).
_HANDLERS: dict[tuple[str, bool | None], Callable[[RunSummary, Any], None]] = {
    ("started", False): _started,
    ("started", True): _baseline_started,
    ("extended", False): _extended,
    ("joined", False): _joined,
    ("grouped", False): _grouped,
    ("round_started", None): _round_started,
    ("round", False): _round,
    ("reply", False): _reply,
    ("reply", True): _baseline_reply,
    ("compared", True): _compared,
    ("validated", None): _set_note,
    ("selected", False): _selected,
    ("secure_sum", False): _secure_sum,
    ("clipped", False): _clipped,
    ("distant", False): _distant,
    ("noised", False): _noised,
    ("budget_spent", False): _budget_spent,
    ("refused", None): _left_out,
    ("failed", None): _left_out,
    ("finished", None): _finished,
    ("waiting", None): _set_note,
    ("restarted", None): _set_note,
    ("late", None): _set_note,
    ("tracker_failed", None): _tracker_failed,
    ("finalizing", None): _finalizing,
    ("transfer_started", False): _transfer_started,
    ("site_ready", False): _ready,
}
