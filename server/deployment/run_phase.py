"""The phase of a run, from its events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from ...common.event_log import Event
from ..reporting.summary import RunSummary, note_of
from ..rounds.checkpoint import CheckpointInfo

Phase = Literal["joining", "waiting", "training", "finalizing", "finished", "not running"]
ROUND_EVENTS = ("round_started", "reply", "round", "failed", "refused", "late")  # events that occur within rounds


def phase_of(events: list[Event], summary: RunSummary, checkpoint: CheckpointInfo | None) -> tuple[Phase, str]:
    """Return the phase by the events since the last start, and its details."""
    events = [event for event in events if event["event"] not in ("site_ready", "tracker_failed")]
    if checkpoint and checkpoint.finalized and checkpoint.round >= summary.rounds:
        return "finished", ""
    if not events:
        return "joining", "there are no events yet"
    last, names = events[-1], _since_start(events)
    if "finished" in names:
        return "finished", ""
    if last["event"] in _PHASE_BY_LAST_EVENT:
        return _PHASE_BY_LAST_EVENT[last["event"]](last)
    if not set(names) & set(ROUND_EVENTS):
        return "joining", ""
    if "finalizing" in names and "round_started" not in names[_last_index(names, "finalizing") :]:
        return "finalizing", ""
    between_rounds = "round" in names and "round_started" not in names[_last_index(names, "round") :]
    return ("finalizing" if between_rounds and summary.round >= summary.rounds else "training"), ""


def _since_start(events: list[Event]) -> list[str]:
    names = [event["event"] for event in events]
    starts = [i for i, name in enumerate(names) if name in ("started", "extended")]
    return names[starts[-1] :] if starts else names


def _last_index(names: list[str], name: str) -> int:
    return len(names) - 1 - names[::-1].index(name)


def _waiting_phase(event: Event) -> tuple[Phase, str]:
    if "round" in event:  # a round that goes on
        return ("finalizing" if event.get("when") == "finalize" else "training"), note_of(event)
    return "waiting", f"for {', '.join(event['missing'])}" if event.get("missing") else str(event.get("reason", ""))


def _failed_phase(event: Event) -> tuple[Phase, str]:
    return ("not running" if event.get("final") else "waiting"), str(event["reason"])


_PHASE_BY_LAST_EVENT: dict[str, Callable[[Event], tuple[Phase, str]]] = {
    "stopped": lambda event: ("not running", "stopped on request; the same command continues the run"),
    "run_failed": _failed_phase,
    "waiting": _waiting_phase,
}


def last_change(events: Sequence[Event]) -> float:
    """Return the time of the last event that is more than a notice that the wait goes on."""
    changes = [event["time"] for event in events if event["event"] != "waiting" or "seconds" not in event]
    return changes[-1] if changes else events[-1]["time"]
