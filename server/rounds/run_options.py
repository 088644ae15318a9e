"""What a run needs besides its recipe: the roster, a stop signal, retries and a replay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...common.config.schema import Recipe
from ...common.errors import StateError
from ...common.secure_aggregation.identity import PublicKeys
from ..reporting.events import read_events


@dataclass(frozen=True)
class Run:
    """One federation: its recipe, its sites in order, and its run folder."""

    recipe: Recipe
    roster: tuple[RosterEntry, ...]
    folder: Path


@dataclass(frozen=True)
class RosterEntry:
    """A site of the roster: its name and the first round that it takes part in."""

    site: str
    from_round: int = 1


@dataclass(frozen=True)
class Replay:
    """The admitted sites of an earlier run, by round (finalization is the last round + 1), its weighting and groups.

    A run that asks only these sites produces the same bits from the same data.
    """

    admitted: Mapping[int, Sequence[str]]
    weights: str
    groups: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class RunOptions:
    """How a federation is run.

    ``deployed``: sites are separate processes, so the coordinator waits for missing sites and retries failed rounds.
    ``should_stop`` is called between rounds and while waiting. ``replay`` limits each round to the sites of an earlier
    run. ``fingerprints`` returns those of the coordinator's own copy of the base model, by field of ``SiteInfo``.
    ``public_keys`` are those of the sites for secure aggregation, as far as the coordinator has them.
    """

    deployed: bool = False
    should_stop: Callable[[], bool] = lambda: False
    replay: Replay | None = None
    fingerprints: Callable[[Recipe], Mapping[str, str]] = lambda recipe: {}
    public_keys: PublicKeys = field(default_factory=dict)


class StopRequested(Exception):
    """The federation was asked to stop. It can be continued from its last checkpoint."""


def read_replay(path: Path) -> Replay:
    """Read who was admitted from an ``events.jsonl``; of a repeated round, the last attempt. Raises StateError."""
    events = read_events(path)
    weights = [event["weights"] for event in events if event["event"] == "agreed"]
    admitted = {event["round"]: event["admitted"] for event in events if event["event"] == "round"}
    finalized = {event["round"] + 1: event["sites"] for event in events if event["event"] == "finalized"}
    if not weights or not finalized:
        raise StateError(
            f"--replay {path}",
            "the events.jsonl of a finished federation",
            "no event `finalized`",
            message=f"--replay {path} is not the event log of a finished federation.",
            hint="Use the events.jsonl of a run that has ended.",
        )
    groups = [event["groups"] for event in events if event["event"] == "grouped"]
    return Replay({**admitted, **finalized}, weights[0], groups[-1] if groups else ())
