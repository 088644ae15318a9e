"""What a run needs beside its recipe: roster, stop signal, retries and replay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...common.config.schema import Recipe
from ...common.errors import StateError
from ..reporting.events import read_events


@dataclass(frozen=True)
class Run:
    """One federation: what it does, whose sites, in order, and its folder."""

    recipe: Recipe
    roster: tuple[RosterEntry, ...]
    folder: Path


@dataclass(frozen=True)
class RosterEntry:
    """A site of the roster: its name and the first round that asks it."""

    site: str
    from_round: int = 1


@dataclass(frozen=True)
class Replay:
    """What a federation's log says of who counted: ``admitted`` sites by round (the close is the last round + 1).

    A run in which only those are asked comes to the same bits.
    """

    admitted: Mapping[int, Sequence[str]]
    weights: str


@dataclass(frozen=True)
class RunOptions:
    """How a federation is led.

    ``deployed``: with sites in processes of their own; too few of them are waited for, and what fails is tried again.
    ``stop`` is asked between rounds.
    """

    deployed: bool = False
    should_stop: Callable[[], bool] = lambda: False
    replay: Replay | None = None


class StopRequested(Exception):
    """Somebody asked the federation to stop while it waited."""


def read_replay(path: Path) -> Replay:
    """What an ``events.jsonl`` says of who counted; of a round done again, the last time. StateError."""
    events = read_events(path)
    agreed = [event["weights"] for event in events if event["event"] == "agreed"]
    admitted = {event["round"]: event["admitted"] for event in events if event["event"] == "round"}
    closed = {event["round"] + 1: event["sites"] for event in events if event["event"] == "closed"}
    if not agreed or not closed:
        raise StateError(f"--replay {path}", "the events.jsonl of a federation that has ended", "no end")
    return Replay({**admitted, **closed}, agreed[0])
