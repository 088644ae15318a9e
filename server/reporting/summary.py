"""What the events add up to: one row a site. The live table and the final report read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...common.dataset import TASKS
from .events import Event

Metrics = Mapping[str, float | None]
_SLOW = "minutes a site without a GPU"


@dataclass
class SiteSummary:
    """One site so far. Metrics are by composition: ``base``, ``shared``, ``personal``, and ``alone``."""

    site: str
    task: str = ""
    train: int = 0
    test: int = 0
    truncated: int = 0
    dropped: int = 0
    metrics: dict[str, float | None] = field(default_factory=dict)  # "personal.accuracy"
    alone: dict[str, float | None] = field(default_factory=dict)
    round: int = 0
    loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    failures: dict[int, str] = field(default_factory=dict)  # round → why it was left out
    fresh: list[int] = field(default_factory=list)  # rounds in which its personal state was missing

    def metric(self, composition: str) -> float | None:
        """The task's primary metric of ``base``, ``shared``, ``personal`` or ``alone``; None if not measured."""
        name = TASKS[self.task].primary_metric if self.task in TASKS else ""
        if composition == "alone":
            return self.alone.get(f"personal.{name}")
        return self.metrics.get(f"{composition}.{name}")


@dataclass
class RunSummary:
    """A federation and its local-only baseline, told by their events in order."""

    federation: str = ""
    method: str = ""
    model: str = ""
    rounds: int = 0
    round: int = 0
    residual: float | None = None
    baseline: bool = False  # the baseline is running, or ran
    seconds: float = 0.0
    moved: str = ""  # the federation that these sites had before
    note: str = ""  # what is out of the ordinary now
    awaits: str = ""  # the event by which a site says that it has done what takes minutes: prepared, or written
    ready: list[str] = field(default_factory=list)  # those that have, of so many:
    awaited: int = 0
    rows: dict[str, SiteSummary] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)  # of nodes that are no known site
    replies: dict[tuple[bool, str, int], Event] = field(default_factory=dict)

    def update(self, event: Event) -> None:
        """Takes in one event; a round that was done again after a restart counts once."""
        baseline = bool(event.get("baseline"))
        handler = _HANDLERS.get((event["event"], baseline)) or _HANDLERS.get((event["event"], None))
        if handler:
            handler(self, event)

    def site(self, site: str) -> SiteSummary:
        """A site's row, new at the first call."""
        return self.rows.setdefault(site, SiteSummary(site))

    def mean(self, composition: str) -> float | None:
        """The mean primary metric over sites; None where sites have different metrics or none."""
        values = [row.metric(composition) for row in self.rows.values()]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len({r.task for r in self.rows.values() if r.task}) == 1 else None


def summarize(events: Iterable[Event]) -> RunSummary:
    """The board after these events."""
    board = RunSummary()
    for event in events:
        board.update(event)
    return board


def note_of(event: Event) -> str:
    """What a waiting, restarted, late, moving or closing event says, in words."""
    if event["event"] == "moving":
        return f"{len(event['sites'])} sites write texts and answer them as they did in {event['of']}: {_SLOW}"
    if event["event"] == "closing":
        more = f", and prepare a later move: {_SLOW}" if event["prepares"] else ""
        return f"closing: {len(event['sites'])} sites personalise and measure{more}"
    if event["event"] == "restarted":
        return f"the {event['what']} was started again" + (f": {event['reason']}" if event.get("reason") else "")
    if event["event"] == "late":
        return f"round {event['round']}: {event['site']} {event['reason']}"
    if event.get("missing"):
        here = len(event["present"])
        return f"waiting for {', '.join(event['missing'])}: {here} here, {event['quorum']} needed"
    return f"waiting: {event['reason']}"


def _noted(board: RunSummary, event: Event) -> None:
    board.note = note_of(event)


def _moving(board: RunSummary, event: Event) -> None:
    _noted(board, event)
    board.awaits, board.ready, board.awaited, board.moved = "met", [], len(event["sites"]), event["of"]


def _closing(board: RunSummary, event: Event) -> None:
    _noted(board, event)
    board.awaits, board.ready, board.awaited = "reply" if event["prepares"] else "", [], len(event["sites"])


def _ready(board: RunSummary, event: Event) -> None:
    if event["event"] == board.awaits and event["site"] not in board.ready:
        board.ready.append(event["site"])
        board.note = f"{len(board.ready)} of {board.awaited} sites are ready"


def _started(board: RunSummary, event: Event) -> None:
    board.federation, board.method, board.model = event["federation"], event["method"], event["model"]
    board.rounds, board.awaits = event["rounds"], ""
    for site in event["sites"]:
        board.site(site)


def _baseline_started(board: RunSummary, event: Event) -> None:
    board.baseline, board.round, board.awaits = True, 0, ""


def _joined(board: RunSummary, event: Event) -> None:
    row = board.site(event["site"])
    for name in ("task", "train", "test", "truncated", "dropped"):
        setattr(row, name, event[name])


def _round_started(board: RunSummary, event: Event) -> None:
    board.round, board.note, board.awaits = event["round"], "", ""


def _round(board: RunSummary, event: Event) -> None:
    board.round, board.residual = event["round"], event.get("residual")


def _reply(board: RunSummary, event: Event) -> None:
    row, key = board.site(event["site"]), (False, event["site"], event["round"])
    before = board.replies.get(key)
    board.replies[key] = event
    for name in ("bytes_up", "bytes_down", "seconds"):
        setattr(row, name, getattr(row, name) + event[name] - (before[name] if before else 0))
    row.metrics.update(event["metrics"])
    row.failures.pop(event["round"], None)  # asked again after a restart, and admitted
    if event.get("fresh") and event["round"] not in row.fresh:
        row.fresh.append(event["round"])
    row.round = min(event["round"], board.rounds)
    row.loss = event["metrics"].get("train.loss", row.loss)
    _ready(board, event)


def _baseline_reply(board: RunSummary, event: Event) -> None:
    row = board.site(event["site"])
    row.alone.update(event["metrics"])
    row.loss, row.round = event["metrics"].get("train.loss", row.loss), min(event["round"], board.rounds)


def _trouble(board: RunSummary, event: Event) -> None:
    site = event.get("site")
    if site in board.rows:
        board.rows[site].failures.setdefault(event["round"], str(event["reason"]).removeprefix(f"site {site}: "))
    else:
        board.failures.append(f"{site or 'a node'}: {event['reason']}")


def _finished(board: RunSummary, event: Event) -> None:
    board.seconds += event["seconds"]


_HANDLERS: dict[tuple[str, bool | None], Callable[[RunSummary, Any], None]] = {
    ("started", False): _started,
    ("started", True): _baseline_started,
    ("joined", False): _joined,
    ("round_started", None): _round_started,
    ("round", False): _round,
    ("reply", False): _reply,
    ("reply", True): _baseline_reply,
    ("refused", None): _trouble,
    ("failed", None): _trouble,
    ("finished", None): _finished,
    ("waiting", None): _noted,
    ("restarted", None): _noted,
    ("late", None): _noted,
    ("closing", None): _closing,
    ("moving", False): _moving,
    ("met", False): _ready,
}
