"""Validation losses that a site reports out of range: they are left out, and the log stays whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from colora.common.event_log import EventLog
from colora.common.protocol.types import VALIDATION_LOSS
from colora.server.reporting.event_fields import parse_event
from colora.server.reporting.events import EventRecorder, parse_lines
from colora.server.rounds.checkpoint import ServerState
from colora.server.rounds.early_stopping import aggregate_validate
from colora.server.rounds.shared_adapter import SharedAdapter


def validated(folder: Path, *rounds: dict[str, float]) -> tuple[ServerState, list[dict[str, Any]]]:
    """Compare rounds with these losses by site; return the last state and the events."""
    events = EventLog(folder / "events.jsonl")
    state = ServerState(0, (SharedAdapter({"a": np.zeros(2, np.float32)}),))
    for t, losses in enumerate(rounds, 1):
        replies = {s: SimpleNamespace(reply=SimpleNamespace(metrics={VALIDATION_LOSS: x})) for s, x in losses.items()}
        strategy: Any = SimpleNamespace(collect=lambda *_, found=replies: found, recorder=EventRecorder(events))
        state = aggregate_validate(strategy, ServerState(t, state.adapters, best=state.best), {})
    found, skipped = parse_lines(folder / "events.jsonl")
    assert not skipped
    return state, found


@pytest.mark.parametrize("bad", [1e16, 1e308, float("inf"), float("nan")])
def test_a_loss_out_of_range_neither_damages_the_log_nor_holds_the_best_round(tmp_path: Path, bad: float) -> None:
    state, events = validated(tmp_path, {"a": 0.5, "b": 0.7, "c": bad}, {"a": 0.1, "b": 0.2, "c": 0.3})
    assert events[0]["losses"] == {"a": 0.5, "b": 0.7, "c": None}
    assert events[0]["loss"] == pytest.approx(0.6)  # of a and b
    assert events[1]["best"] == 2
    assert state.best
    assert state.best.losses == {"a": 0.1, "b": 0.2, "c": 0.3}


def test_a_round_that_no_site_could_measure_is_worse_than_any_other(tmp_path: Path) -> None:
    _, events = validated(tmp_path, {"a": float("nan")}, {"a": 9.0}, {"a": float("nan")})
    assert [(event["loss"], event["best"]) for event in events] == [(None, 1), (9.0, 2), (None, 2)]


NUMBERS: dict[str, dict[str, Any]] = {
    "round": {"round": 1, "admitted": ["a"], "weights": {"a": 1.0}, "residual": 1e200, "seconds": 1.0},
    "clipped": {"round": 1, "site": "a", "norm": 1e20, "bound": 1e19},
    "compared": {"site": "a", "gain": 1e300, "standard_error": float("inf")},
    "grouped": {"groups": [["a", "b"]], "cosines": {"a": {"b": float("nan")}}},
    "reply": {
        **{"round": 1, "site": "a", "metrics": {"train.loss": -1e16}, "bytes_down": 1, "bytes_up": 1, "seconds": 1.0}
    },
}


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_makes_a_line_that_the_readers_of_the_log_drop(tmp_path: Path, name: str) -> None:
    EventLog(tmp_path / "events.jsonl").emit(name, **NUMBERS[name])
    assert parse_event((tmp_path / "events.jsonl").read_bytes()), NUMBERS[name]
