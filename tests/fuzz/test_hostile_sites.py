"""One site of four sends garbage: the federation ends, the other sites count, and every output stays readable."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from rich.console import Console

from colora.client.client_app import make_app
from colora.common.adapters.initialization import initial_shared_state
from colora.common.config.loader import recipe_from
from colora.common.config.schema import Recipe
from colora.common.event_log import Event, EventLog
from colora.common.protocol.types import PROTOCOL, WITHOUT_ARRAYS, SiteInfo, TrainReply, TrainRequest, hash_layout
from colora.server.reporting.console import LiveDisplay
from colora.server.reporting.events import parse_lines
from colora.server.reporting.report import print_report
from colora.server.rounds.checkpoint import Checkpoints
from colora.server.rounds.run_options import RosterEntry
from colora.server.rounds.strategy import AdapterStrategy
from colora.server.server_app import train_federation
from colora.simulation.local_grid import LocalGrid

from .mutations import TEXTS, mutate

NAMES = ("ada", "bob", "cyd", "dee")
HONEST = ["ada", "cyd", "dee"]
MAX_EVENT = 8000  # bytes of one line of the log


@dataclasses.dataclass
class Site:
    """An honest site whose training adds a constant."""

    name: str
    layout: str

    def site_info(self, federation: str, plan: str) -> SiteInfo:
        return SiteInfo(self.name, PROTOCOL, "model", "tokens", "chat", self.layout, "regression", 20, 5, 0, 0)

    def handle(self, request: TrainRequest) -> TrainReply:
        trained = {k: (v + 0.01).astype(np.float32) for k, v in request.shared.items()}
        shared = {} if request.kind in WITHOUT_ARRAYS else trained
        metrics = {"personal.loss": 1.0, "train.loss": 0.5, "validation.loss": 1 / request.round}
        return TrainReply(self.name, request.federation, request.round, request.key, shared, 10, 5, metrics, 0.1)


def recipe(rounds: int) -> Recipe:
    sites = [{"name": name, "source": "none.npz"} for name in NAMES]
    model, adapter = {"source": "synthetic:bilinear-6"}, {"rank": 2, "target_modules": ["proj"]}
    raw = {"name": "fed", "rounds": rounds, "model": model, "adapter": adapter, "data": {"task": "regression"}}
    raw["data"]["validation_fraction"] = 0.2
    return recipe_from({**raw, "site": sites, "server": {"quorum": 3, "max_attempts": 1, "keep": "best"}})


def hostile(app: ClientApp, rng: random.Random, kind: str) -> Any:
    """The app, in which bob's replies to messages of one kind ("join" or "train") are mutated."""

    def answer(message: Message, context: Context) -> Message:
        reply = app(message, context)
        is_join = message.metadata.group_id == "join"
        if context.node_config["partition-id"] != 1 or is_join != (kind == "join"):
            return reply
        if rng.random() < 0.1:
            return Message(Error(code=rng.choice((0, 2, 1001, 77)), reason=rng.choice(TEXTS)), reply_to=message)
        mutate(reply.content, rng)
        return reply

    return answer


def run(folder: Path, rounds: int, rng: random.Random, kind: str) -> str:
    """Run a federation with bob as the hostile site, and return all that a person sees of it."""
    settings, screen = recipe(rounds), io.StringIO()
    layout = hash_layout({key: value.shape for key, value in initial_shared_state(settings.plan).items()})
    sites = [Site(name, layout) for name in NAMES]
    app = make_app(lambda context: sites[int(context.node_config["partition-id"])])
    console = Console(file=screen, width=100)
    with LiveDisplay(console) as display:
        events = EventLog(folder / "events.jsonl", display)
        events.emit("started", federation="fed", method="colora", model="m", rounds=rounds, sites=list(NAMES))
        strategy = AdapterStrategy(settings, tuple(map(RosterEntry, NAMES)), events, folder / "spool")
        state = train_federation(
            LocalGrid(hostile(app, rng, kind), 4), strategy, Checkpoints(folder / "checkpoints", settings)
        )
        assert state.finalized
    print_report(display.summary, folder, console)
    return screen.getvalue() + (folder / "report.html").read_text(encoding="utf-8")


def check(folder: Path, seen: str, caplog: pytest.LogCaptureFixture) -> list[Event]:
    """Assert that the outputs are whole and harmless; return the events."""
    events, skipped = parse_lines(folder / "events.jsonl")
    assert not skipped
    assert not [
        record for record in caplog.records if record.name.startswith("colora")
    ]  # neither a listener nor a reader has failed
    lines = (folder / "events.jsonl").read_bytes().splitlines()
    assert max(map(len, lines)) < MAX_EVENT
    for event in events:
        for text in (v for v in event.values() if isinstance(v, str)):
            assert text.isprintable(), event
    assert all(character.isprintable() or character in "\n\t" for character in seen)
    assert "<script>" not in seen.partition("<body>")[2]
    for event in events:
        if event["event"] == "round":
            assert set(HONEST) <= set(event["admitted"])
            assert all(np.isfinite(w) and 0 < w <= 1e12 for w in event["weights"].values())
    return events


@pytest.mark.parametrize("rounds", [100, pytest.param(1500, marks=pytest.mark.slow)])
def test_replies_of_a_hostile_site_never_end_the_coordinator(
    tmp_path: Path, rounds: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "colora")
    events = check(tmp_path, run(tmp_path, rounds, random.Random(18), "train"), caplog)
    named = [e for e in events if e["event"] in ("refused", "failed") and e["site"] == "bob"]
    assert len(named) > rounds * 0.5  # some mutations do nothing
    assert {e["site"] for e in events if e["event"] in ("refused", "failed")} == {"bob"}


@pytest.mark.parametrize("joins", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_joins_of_a_hostile_site_never_end_the_coordinator(
    tmp_path: Path, joins: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "colora")
    refused = 0
    for number in range(joins):
        folder = tmp_path / str(number)
        events = check(folder, run(folder, 1, random.Random(number), "join"), caplog)
        refused += any(event["event"] in ("refused", "failed") for event in events)
    assert refused > joins * 0.5


def test_megabytes_of_text_become_a_short_line(tmp_path: Path) -> None:
    """A reason of 2 MB once became 24 MB of log."""
    events = EventLog(tmp_path / "events.jsonl")
    layout: dict[str, tuple[int, ...]] = {}
    strategy = AdapterStrategy(recipe(1), tuple(map(RosterEntry, NAMES)), events, tmp_path / "spool")
    assert layout == strategy.layout
    strategy.recorder.failed(1, "bob", "\x1b" * 2_000_000)
    assert len((tmp_path / "events.jsonl").read_bytes()) < 400
    assert json.loads((tmp_path / "events.jsonl").read_text())["reason"].endswith("…")
