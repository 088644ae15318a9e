"""The rows that trackers log of a federation: one for each round, one for its end, one for the local-only baseline.

A row holds what the coordinator sees, per site (``train.loss/SITE``) and as the mean over sites (``train.loss``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...common.config.schema import Recipe, TrackingSettings, to_dict
from ...common.event_log import Event, EventLog, Listener
from ...common.protocol.types import VALIDATION_LOSS
from ...common.trackers import TrackedRow, TrackedRun, Trackers
from .events import EventTail
from .page.fold import extend
from .page.history import History, RoundRecord


def track(recipe: Recipe, folder: Path, listener: Listener | None = None) -> Trackers:
    """Return a context manager within which the recipe's trackers log the run in ``folder``.

    ``listener`` receives the event of a tracker that failed.

    Raises ConfigError if the package of a tracker is not installed.
    """

    def failed(tracker: str, reason: str) -> None:
        EventLog(folder / "events.jsonl", listener).emit("tracker_failed", tracker=tracker, reason=reason)

    return track_folder(folder, recipe.name, recipe.tracking, to_dict(recipe), failed)


def track_folder(
    folder: Path,
    name: str,
    tracking: TrackingSettings,
    configuration: Mapping[str, Any],
    failed: Callable[[str, str], None],
) -> Trackers:
    """Return a context manager within which trackers log the ``events.jsonl`` in ``folder`` as the run ``name``.

    ``failed`` receives the name of a tracker that failed, and why.

    Raises ConfigError if the package of a tracker is not installed.
    """
    project = tracking.project or "colora"
    run = TrackedRun(name, project, folder / "trackers", lambda: _reader(folder), configuration, failed)
    return Trackers(tracking.trackers, run)


def _reader(folder: Path) -> Callable[[], Iterator[TrackedRow]]:
    history = History()
    logs = (EventTail(folder / "events.jsonl", 0), False), (EventTail(folder / "baseline" / "events.jsonl", 0), True)

    def read() -> Iterator[TrackedRow]:
        for tail, baseline in logs:
            for event in tail.new():
                yield from _rows(history, {**event, "baseline": True} if baseline else event)

    return read


def _rows(history: History, event: Event) -> Iterator[TrackedRow]:
    """Take the next event; yield the row that it completes."""
    extend(history, event)
    name, alone = event["event"], bool(event.get("baseline"))
    if name == "round" and not alone:
        t = event["round"]
        yield TrackedRow(f"round {t}", t, _metrics(history, history.rounds[t]))
    elif name == "validated" and not alone:
        losses = {f"{VALIDATION_LOSS}/{site}": loss for site, loss in event["losses"].items() if loss is not None}
        mean = {} if event["loss"] is None else {VALIDATION_LOSS: event["loss"]}
        yield TrackedRow(f"validation {event['round']}", event["round"], losses | mean)
    elif name == "finalized" and not alone:
        t = event["round"]
        metrics = _metrics(history, history.rounds[t + 1])
        yield TrackedRow(f"final {t}", t, {f"final.{key}": value for key, value in metrics.items()})
    elif name == "compared" or (name == "finished" and alone):
        yield from _alone(history, event)


def _metrics(history: History, record: RoundRecord) -> dict[str, float]:
    """The metrics of a round. A site evaluates the adapter that it receives, before it trains."""
    t, by_site = record.number, {}
    for (site, kind), points in history.losses.items():
        if kind == "personal" and t in points and site in record.costs:
            by_site["train.loss", site] = points[t]
    for (site, mode, metric), points in history.curves.items():
        if mode != "alone" and t - 1 in points and site in record.costs:
            by_site[f"{mode}.{metric}", site] = points[t - 1]
    by_name: dict[str, list[float]] = {}
    for (name, _), value in by_site.items():
        by_name.setdefault(name, []).append(value)
    metrics = {f"{name}/{site}": value for (name, site), value in by_site.items()}
    metrics |= {name: sum(values) / len(values) for name, values in by_name.items()}
    for site, cost in record.costs.items():
        metrics |= {f"seconds/{site}": cost.seconds, f"bytes/{site}": float(cost.down + cost.up)}
    metrics |= {f"weight/{site}": weight for site, weight in record.weights.items()}
    metrics |= {"sites": float(len(record.admitted or ())), "bytes": float(record.cost.down + record.cost.up)}
    return metrics if record.seconds is None else {**metrics, "seconds": record.seconds}


def _alone(history: History, event: Event) -> Iterator[TrackedRow]:
    """Yield the results of a site's local-only training: its metrics, and the gain of the personal model over it."""
    t = history.summary.rounds
    if event["event"] == "compared":
        site = event["site"]
        if event["gain"] is None:
            return
        yield TrackedRow(f"gain {t} {site}", t, {f"gain/{site}": event["gain"]})
        return
    metrics = {
        f"alone.{name.removeprefix('personal.')}/{row.site}": value
        for row in history.sites
        for name, value in row.alone.items()
        if value is not None and name.startswith("personal.")
    }
    yield TrackedRow(f"alone {t}", t, metrics)
