"""What is wrong with a run: problems that a person should look at, one sentence each."""

from __future__ import annotations

from collections.abc import Sequence

from ...common.errors import reason_in_words
from ...common.event_log import Event
from ...common.processes.health import ProcessStatus, ServiceStatus
from ..reporting.summary import RunSummary
from .run_phase import Phase

ANSWERS = ("joined", "reply", "failed", "refused")  # events that say how a site's last message was taken
LONGEST_WAIT = 120.0  # seconds without an event before a run whose sites are joining counts as stalled
LONGEST_ROUND = 3600.0  # likewise for a round without a deadline


def process_problems(
    phase: Phase, about: str, services: Sequence[ServiceStatus], processes: Sequence[ProcessStatus]
) -> list[str]:
    """Return what does not run or does not answer."""
    problems = [f"not running: {about}" if about else "not running"] if phase == "not running" else []
    problems += [f"{each.name} at {each.address} is {each.state}" for each in services if each.state != "serving"]
    return problems + [f"{each.name} (process {each.pid}) has exited" for each in processes if not each.alive]


def site_problems(events: Sequence[Event], roster: Sequence[str], now: float) -> list[str]:
    """Return the sites whose last message was an error or was refused, and those that a round cannot do without."""
    return [*_left_out(events, roster), *(_missing(events[-1], now) if events else [])]


def longest_idle(phase: Phase, summary: RunSummary, timeout: float | None) -> float:
    """Return after how many seconds without an event a run counts as stalled. Texts for a transfer take longer."""
    if phase in ("joining", "waiting") and not summary.ready_event:
        return LONGEST_WAIT
    return (timeout or LONGEST_ROUND) + LONGEST_WAIT


def _left_out(events: Sequence[Event], roster: Sequence[str]) -> list[str]:
    last = {event.get("site"): event for event in events if event["event"] in ANSWERS and not event.get("silent")}
    bad = [last[site] for site in roster if site in last and last[site]["event"] in ("failed", "refused")]
    return [
        f"{event['site']} was left out {f'of round {t}' if (t := event['round']) else 'before round 1'}: "
        f"{reason_in_words(str(event['reason']), event['site'])}"
        for event in bad
    ]


def _missing(last: Event, now: float) -> list[str]:
    """The sites without which the round of the last event has no quorum, if they have been offline for long."""
    offline = last.get("offline", ()) if last["event"] == "waiting" else ()
    if not offline:
        return []
    reachable = len(last["present"]) + len(last["missing"]) - len(offline)
    silent = now - last["time"] + last.get("seconds", 0)
    if reachable >= last["quorum"] or silent <= LONGEST_WAIT:
        return []
    who = f"{', '.join(offline)}: offline, silent for {silent:.0f} s"
    return [f"{last.get('when', 'the round')} has no quorum without {who}"]
