"""Event logs of valid lines with odd values: every reader of a log shows them, and none ends in a traceback."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from colora.server.deployment.status import run_status
from colora.server.reporting.console import LiveDisplay
from colora.server.reporting.event_fields import OPTIONAL, REQUIRED, is_event
from colora.server.reporting.events import parse_lines
from colora.server.reporting.report import print_report
from colora.server.reporting.run_folder import RunFolder

from .mutations import TEXTS
from .test_hostile_sites import recipe

NAMES = ["ada", "bob"]
VALUES: tuple[Any, ...] = (
    *(0, 1, 2, 3, 7, 10**12, -1.5, 0.0, 0.5, 1e15, True, False, None, "", "ada", "bob", "generation", "poetry", "join"),
    *([], NAMES, ["ada"], [["ada"], ["bob"]], {}, {"ada": 1.0}, {"ada": None}, {"personal.accuracy": 0.5}),
    *({"personal.": 1.0, "personal.accuracy": 0.1}, {"ada": {"ada": 1.0, "bob": None}, "bob": {}}),
    {"privacy": {"delta": 1e-5}, "train": [], "description": 5},
    [{"groups": [["ada"], ["bob"]], "p_value": 0.01}],
    *TEXTS[:8],
)
HEAD = {"event": "started", "federation": "f", "method": "colora", "model": "m", "rounds": 3, "sites": NAMES}


def odd_event(rng: random.Random) -> dict[str, Any]:
    """An event that the readers accept, with any of the values that its fields may have."""
    name = rng.choice([*REQUIRED, "waiting", "waiting", "joined", "joined", "reply"])
    while True:
        fields = [*REQUIRED.get(name, {}), *(f for f in OPTIONAL.get(name, {}) if rng.random() < 0.5)]
        event = {"time": float(rng.randrange(100)), "event": name}
        for field in fields:
            check = {**REQUIRED.get(name, {}), **OPTIONAL.get(name, {})}[field]
            event[field] = rng.choice([value for value in VALUES if check(value)])
        if is_event(event):
            return event


@pytest.mark.parametrize("seed", range(40))
def test_every_reader_shows_any_valid_event(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    shared, alone = ([HEAD | {"time": 0.0}, *(odd_event(rng) for _ in range(30))] for _ in range(2))
    RunFolder(tmp_path).write_recipe(recipe(3))
    (tmp_path / "baseline").mkdir()
    for folder, events in ((tmp_path, shared), (tmp_path / "baseline", alone)):
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert not parse_lines(tmp_path / "events.jsonl")[1]
    console = Console(file=io.StringIO(), width=100)
    display = LiveDisplay(console)
    for event in [*shared, *({**event, "baseline": True} for event in alone)]:
        display(event)
    print_report(display.summary, tmp_path, console)
    for end in range(1, len(shared) + 1):  # each event is the last at some time
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in shared[:end]))
        run_status(tmp_path, now=1e9)


@pytest.mark.parametrize("damage", [{"missing": []}, {"missing": ["ada"]}, {"missing": [], "present": []}])
def test_a_waiting_event_that_says_neither_why_nor_for_whom_is_no_event(damage: dict[str, Any]) -> None:
    assert not is_event({"time": 1.0, "event": "waiting", **damage})
    assert is_event({"time": 1.0, "event": "waiting", "missing": [], "present": ["ada"], "quorum": 2})
