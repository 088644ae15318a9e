"""What a tracker logs is read back with its own library, and compared with the run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import tracking

from colora.common import trackers
from colora.common.config.loader import recipe_from
from colora.common.errors import ConfigError
from colora.common.event_log import Event
from colora.common.foreign_text import clean
from colora.server.reporting.events import read_events
from colora.server.reporting.run_folder import RunFolder
from colora.server.reporting.summary import note_of, summarize
from colora.simulation.run import simulate

Series = dict[str, list[tuple[int, float]]]  # tag → (step, value) of every point


def tracked(raw: dict, rounds: int, folder: Path, *, resume: bool = False, **options: Any) -> RunFolder:
    settings = {**raw, "rounds": rounds, "tracking": {"trackers": ["tensorboard"]}, "evaluation": {"every": 1}}
    return simulate(recipe_from(settings), folder, resume=resume, **options)


def logged(run: RunFolder) -> Series:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run.path / "trackers" / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(p.step, p.value) for p in accumulator.Scalars(tag)] for tag in tags}


@pytest.mark.parametrize("stops", [(3,), (1, 3)], ids=["at once", "extended"])
def test_every_round_is_logged_once_with_the_metrics_of_every_site(
    tiny_recipe: dict, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    tiny_recipe["simulation"]["baseline"] = True
    for i, rounds in enumerate(stops):
        run = tracked(tiny_recipe, rounds, tmp_path / "run", resume=i > 0)
    series, sites = logged(run), [name for name, _ in run.read_roster()]
    replies = [e for e in read_events(run.path / "events.jsonl") if e["event"] == "reply" and e["kind"] == "train"]
    for site in sites:
        told = [(e["round"], e["metrics"]["train.loss"]) for e in replies if e["site"] == site]
        assert series[f"train.loss/{site}"] == [(t, pytest.approx(loss)) for t, loss in told]
        assert [step for step, _ in series[f"personal.accuracy/{site}"]] == [2, 3]  # none before round 1
        row = summarize(run.events()).rows[site]
        assert series[f"final.personal.accuracy/{site}"][-1] == (3, pytest.approx(row.metric("personal")))
        assert series[f"gain/{site}"][-1] == (3, pytest.approx(row.gain))
    assert [step for step, _ in series["train.loss"]] == [1, 2, 3]


ERROR = "no route\x1b[2J to the tracker"


class Broken(tracking.TensorBoardTracker):
    """Raises at the second row."""

    def log(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
        if step == 2:
            raise OSError(ERROR)


def test_a_tracker_that_raises_is_named_once_and_the_run_goes_on(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Broken)
    told: list[Event] = []
    run = tracked(tiny_recipe, 3, tmp_path / "run", listener=told.append)
    assert "finished" in {event["event"] for event in told}
    failures = [event for event in read_events(run.path / "events.jsonl") if event["event"] == "tracker_failed"]
    assert [event for event in told if event["event"] == "tracker_failed"] == failures
    assert summarize(told).failures == [f"The tracker tensorboard stopped: OSError: {clean(ERROR)}"]
    (line,) = map(note_of, failures)
    assert line == f"the tracker tensorboard stopped, the run goes on: OSError: {clean(ERROR)}"


def test_a_tracker_that_is_not_installed_is_named_before_the_run(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package tensorboard\. Install it: pip install tensorboard"):
        tracked(tiny_recipe, 1, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Buffering:
    """Like W&B offline: a session's rows are in its file when it is closed. One that is killed has none."""

    killed = False

    def __init__(self, run_name: str, **options: Any) -> None:
        self.rows: list[int] = []
        number = len(list(Path(options["dir"]).glob("wandb/*")))
        self.file = Path(options["dir"]) / "wandb" / f"offline-run-{number}-{time.monotonic_ns()}" / "rows"
        self.file.parent.mkdir(parents=True)
        self.tracker = SimpleNamespace(id="run")

    def store_init_configuration(self, values: dict) -> None: ...

    def log(self, values: dict, step: int) -> None:
        self.rows.append(step)

    def finish(self) -> None:
        if self.killed:
            raise RuntimeError("killed")
        self.file.write_text(json.dumps(self.rows))


def test_a_killed_session_of_wandb_is_logged_again_and_a_closed_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "check_installed", lambda names: None)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Buffering)
    for last, killed in ((1, False), (3, True), (4, False)):
        rows = [trackers.TrackedRow(f"round {t}", t, {"loss": 1.0}) for t in range(1, last + 1)]
        run = trackers.TrackedRun("n", "p", tmp_path, lambda rows=rows: lambda: rows, {}, lambda *failure: None)
        Buffering.killed = killed
        with trackers.Trackers(["wandb"], run):
            pass
    sessions = sorted((tmp_path / "wandb").glob("*/rows"))
    assert [json.loads(file.read_text()) for file in sessions] == [[1], [2, 3, 4]]
