"""The metrics of a run for Prometheus, from its events."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...common.event_log import Event
from ...common.prometheus import Metric
from .events import EventTail

UNKNOWN = "unknown"  # label of a site that the roster does not have


def run_metrics(folder: Path) -> Callable[[], list[Metric]]:
    """Return a reader of the metrics of the run in ``folder``, which takes the new events at each call."""
    tail, counts = EventTail(folder / "events.jsonl", 0), RunCounts()

    def read() -> list[Metric]:
        for event in tail.new():
            counts.take(event)
        return counts.metrics

    return read


class RunCounts:
    """Counts events."""

    def __init__(self) -> None:
        self.sites: tuple[str, ...] = ()
        self.round = Metric("colora_round", "Last round that has ended.")
        self.rounds = Metric("colora_rounds", "Rounds of the federation.")
        self.admitted = Metric("colora_round_sites", "Sites admitted in the last round.")
        self.seconds = Metric("colora_round_seconds", "Duration of the last round.")
        self.finished = Metric("colora_finished", "1 if the federation has ended, otherwise 0.")
        self.last = Metric("colora_last_event_timestamp_seconds", "Unix time of the last event.")
        self.seen = Metric("colora_site_last_reply_timestamp_seconds", "Unix time of the last reply.", ("site",))
        self.work = _counter("colora_site_seconds", "Seconds of work at a site.", "site", "phase")
        self.bytes = _counter("colora_bytes", "Bytes of the messages.", "site", "direction")
        self.replies = _counter("colora_replies", "Replies that were admitted.", "site")
        self.refused = _counter("colora_refusals", "Replies and joining sites that were refused.", "site")
        self.failed = _counter("colora_failures", "Errors of sites and missing replies.", "site")
        self.restarts = _counter("colora_restarts", "Restarts of a component.", "component")

    @property
    def metrics(self) -> list[Metric]:
        """All metrics."""
        return [value for value in vars(self).values() if isinstance(value, Metric)]

    def take(self, event: Event) -> None:
        """Count one event."""
        self.last.values[()] = event["time"]
        if handler := _HANDLERS.get(event["event"]):
            handler(self, event)

    def site(self, event: Event) -> str:
        """The label of an event's site. Names of strangers would be labels without number."""
        return event["site"] if event.get("site") in self.sites else UNKNOWN


def _counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(name, text, labels, kind="counter")


def _started(counts: RunCounts, event: Event) -> None:
    counts.sites = tuple(event["sites"])
    counts.rounds.values[()], counts.finished.values[()] = event["rounds"], 0
    counts.round.values.setdefault((), 0)


def _extended(counts: RunCounts, event: Event) -> None:
    counts.rounds.values[()], counts.finished.values[()] = event["rounds"], 0


def _round(counts: RunCounts, event: Event) -> None:
    counts.round.values[()], counts.seconds.values[()] = event["round"], event["seconds"]
    counts.admitted.values[()] = len(event["admitted"])


def _reply(counts: RunCounts, event: Event) -> None:
    site, measuring = counts.site(event), event.get("measuring", 0.0)
    counts.replies.add(1, site)
    counts.seen.values[site,] = event["time"]
    counts.work.add(event["seconds"] - measuring, site, "training")
    counts.work.add(measuring, site, "measuring")
    counts.bytes.add(event["bytes_down"], site, "down")
    counts.bytes.add(event["bytes_up"], site, "up")


def _secure_sum(counts: RunCounts, event: Event) -> None:
    for direction in ("up", "down"):
        for site, size in event[f"bytes_{direction}"].items():
            counts.bytes.add(size, counts.site({**event, "site": site}), direction)


_HANDLERS: dict[str, Callable[[RunCounts, Event], None]] = {
    "started": _started,
    "extended": _extended,
    "round": _round,
    "reply": _reply,
    "secure_sum": _secure_sum,
    "refused": lambda counts, event: counts.refused.add(1, counts.site(event)),
    "failed": lambda counts, event: counts.failed.add(1, counts.site(event)),
    "restarted": lambda counts, event: counts.restarts.add(1, event["what"]),
    "finished": lambda counts, event: counts.finished.values.update({(): 1}),
}
