"""Whatever a damaged log holds, the page is made: what is no event is skipped, and the rest is shown."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest

from colora.server.reporting.event_fields import parse_event
from colora.server.reporting.page.build import build_page

from .reading import Page
from .runs import Event, baseline, history_of, run

SITES = {"ada": (0.5, 0.8), "bob": (0.7, 0.65)}
VALUES: list[Any] = [
    0,
    1,
    -1,
    0.5,
    1e15,
    10**15,
    -1e15,
    "",
    "x" * 300,
    "ada",
    [],
    ["ada"],
    {},
    {"ada": 1.0},
    None,
    True,
]
OTHERS: list[Event] = [
    {"event": "failed", "round": 2, "site": None, "reason": None},
    {"event": "clipped", "round": 2, "site": "bob", "norm": 1.0, "bound": 0},
    {"event": "grouped", "groups": [["ada"], ["bob"]], "tests": [], "cosines": {"ada": {}}},
    {"event": "restarted", "what": "run"},
    {"event": "tracker_failed", "tracker": "wandb", "reason": "OSError"},
    {"event": "resumed", "round": 1},
]


def damage(value: Any, rng: random.Random) -> Any:
    """Replace one value somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        return {**value, key: damage(value[key], rng)}
    return rng.choice(VALUES)


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_log_has_a_page(seed: int) -> None:
    rng = random.Random(seed)
    log = [*run(SITES), *({"time": 1.8e9, **event} for event in OTHERS)]
    rng.shuffle(log)
    log = [damage(copy.deepcopy(event), rng) if rng.random() < 0.2 else event for event in log if rng.random() < 0.95]
    events = [event for line in log if (event := parse_event(json.dumps(line).encode()))]
    page = Page(build_page([history_of(events, baseline(SITES, {}))]))
    assert "Recipe and versions" in page.text
