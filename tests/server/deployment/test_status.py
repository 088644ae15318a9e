"""Status of a run: the folder of a simulated run with its events truncated, fake health services and real pids."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import tomli_w
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from rich.console import Console

from colora.cli import main
from colora.common.config.loader import read_toml, recipe_from
from colora.common.errors import StateError
from colora.common.processes.supervised import free_port, write_services
from colora.server.deployment.gateway.proxy import Upstream
from colora.server.deployment.gateway.server import GatewayServer, ListenAddress
from colora.server.deployment.status import newest_run, run_status, show_run
from colora.server.reporting.events import read_events
from colora.simulation.run import simulate

SITES = ["ada", "bob", "cyd"]
Health = Callable[..., str]


FINISHED: list[Path] = []


@pytest.fixture
def run(tiny_recipe: dict, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a finished run, which is simulated once."""
    if not FINISHED:
        FINISHED.append(simulate(recipe_from(tiny_recipe), tmp_path_factory.mktemp("once") / "run", resume=False).path)
    return shutil.copytree(FINISHED[0], tmp_path / "runs" / "tiny")


@pytest.fixture
def serve_health() -> Iterator[Health]:
    """Starts health services with a given state."""
    servers = []

    def start(serving: bool = True) -> str:
        server, states = grpc.server(ThreadPoolExecutor(1)), health.HealthServicer()
        kinds = health_pb2.HealthCheckResponse
        states.set("", kinds.SERVING if serving else kinds.NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(states, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None).wait()


def cut(run: Path, after: str, *more: dict, checkpoint: int | None = None) -> float:
    """Truncate the events after the first ``after``, append ``more``, and delete later checkpoints; the last time."""
    events = read_events(run / "events.jsonl")
    last = next(i for i, event in enumerate(events) if event["event"] == after)
    kept = events[: last + 1] + [{"time": events[last]["time"], **event} for event in more]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))
    for path in (run / "checkpoints").glob("round-*"):
        if checkpoint is None or path.name > f"round-{checkpoint:06d}.safetensors":
            path.unlink()
    return kept[-1]["time"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``colora status`` in this process, as if started in ``folder``; (exit code, stdout, stderr)."""

    def run(*arguments: str, folder: Path) -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["colora", "status", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return (int(stop.value.code or 0), *capsys.readouterr())

    return run


def test_a_finished_run_is_healthy_and_complete(run: Path) -> None:
    status = run_status(run)
    assert (status.phase, status.round, status.rounds, status.healthy) == ("finished", 2, 2, True)
    assert (status.federation, status.method) == ("tiny", "colora")
    assert status.checkpoint is not None
    assert (status.checkpoint.round, status.checkpoint.finalized) == (2, True)
    assert [site.site for site in status.sites] == SITES
    for site in status.sites:
        assert site.admitted == 2
        assert site.seen is not None
        assert 0 <= site.seen < 120
        assert {"personal.accuracy", "base.accuracy", "train.loss"} <= set(site.metrics)
    assert status.as_dict() == json.loads(json.dumps(status.as_dict(), default=list), object_hook=_lists)


def _lists(value: dict) -> dict:
    """Convert lists to tuples, which JSON does not have."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}


ROUND_2 = {"event": "round", "round": 2, "admitted": [], "weights": {}, "seconds": 1.0}


@pytest.mark.parametrize(
    ("after", "more", "phase", "about"),
    [
        ("started", [], "joining", ""),
        ("joined", [], "joining", ""),
        (
            "started",
            [{"event": "waiting", "missing": ["bob", "cyd"], "present": ["ada"], "quorum": 3}],
            "waiting",
            "for bob, cyd",
        ),
        ("round_started", [], "training", ""),
        ("round_started", [{"event": "joined", "site": "cyd", **dict.fromkeys(["task"], "classification")}], None, ""),
        ("reply", [], "training", ""),
        ("round", [], "training", ""),
        ("round", [{"event": "round_started", "round": 2, "sites": []}, ROUND_2], "finalizing", ""),
        ("round", [{"event": "waiting", "when": "round 2", "reason": "two of three"}], "waiting", "two of three"),
        ("round", [{"event": "run_failed", "reason": "quorum", "final": False}], "waiting", "quorum"),
        ("round", [{"event": "run_failed", "reason": "bad", "final": True}], "not running", "bad"),
        ("round", [{"event": "stopped"}], "not running", "stopped on request; the same command continues the run"),
        ("round", [{"event": "restarted", "what": "run"}], "training", ""),
    ],
)
def test_the_phase_follows_from_the_events(run: Path, after: str, more: list[dict], phase: str, about: str) -> None:
    counts = {"task": "classification", "train": 1, "test": 1, "truncated": 0, "dropped": 0}
    more = [{**counts, **event} if event["event"] == "joined" else event for event in more]
    now = cut(run, after, *more, checkpoint=1)
    status = run_status(run, now + 1)
    assert (status.phase, status.about) == (phase or "training", about)
    assert status.healthy == (status.phase != "not running")


def test_a_restarted_run_is_joining_and_names_its_checkpoint(run: Path) -> None:
    started = read_events(run / "events.jsonl")[0]
    now = cut(run, "round", started, {"event": "resumed", "round": 1}, checkpoint=1)
    status = run_status(run, now + 1)
    assert status.phase == "joining"
    assert (status.checkpoint and status.checkpoint.round, status.round) == (1, 1)


def test_a_failed_site_is_reported_with_its_reason(run: Path) -> None:
    failed = {"event": "failed", "round": 2, "site": "bob", "reason": "no answer within 5 s"}
    now = cut(run, "round", {"event": "round_started", "round": 2}, failed, checkpoint=1)
    bob = run_status(run, now + 7).sites[1]
    assert bob.failures == {2: "no answer within 5 s"}
    assert bob.admitted == 1
    assert bob.seen is not None
    assert bob.seen > 7  # since its reply; a failure is not a message of the site


def test_a_site_whose_last_answer_was_an_error_needs_a_person_until_it_answers(run: Path) -> None:
    events = {event["event"]: event for event in read_events(run / "events.jsonl")}
    error = {"event": "failed", "round": 2, "site": "bob", "reason": "DataError: data.label"}
    silent = {"event": "failed", "round": 2, "site": "cyd", "reason": "no reply within 5 s", "silent": True}
    now = cut(run, "round", error, silent, checkpoint=1)
    why = "the site has an error in its data (data.label); the log of the site has the details"
    assert run_status(run, now + 1).problems == (f"bob was left out of round 2: {why}",)
    now = cut(run, "round", error, {**events["reply"], "site": "bob"}, checkpoint=1)
    assert run_status(run, now + 1).healthy


@pytest.mark.parametrize(
    ("offline", "after", "problem"),
    [
        (["bob", "cyd"], 61, "round 2 has no quorum without bob, cyd: offline, silent for 121 s"),
        (["bob", "cyd"], 59, None),
        (["cyd"], 61, None),  # bob and ada are enough
    ],
)
def test_a_round_that_an_offline_site_keeps_from_its_quorum_needs_a_person(
    run: Path, offline: list[str], after: float, problem: str | None
) -> None:
    waiting = {"when": "round 2", "round": 2, "missing": ["bob", "cyd"], "present": ["ada"], "quorum": 2}
    now = cut(run, "round", {"event": "waiting", **waiting, "offline": offline, "seconds": 60}, checkpoint=1)
    status = run_status(run, now + after)
    assert status.problems == ((problem,) if problem else ())
    assert status.phase == "training"
    assert status.about.startswith("round 2: waiting for bob")


def test_a_notice_that_the_wait_goes_on_is_no_progress(run: Path) -> None:
    waiting = {"event": "waiting", "when": "join", "missing": ["bob"], "present": ["ada"], "quorum": 2}
    first = cut(run, "started", waiting)
    now = cut(run, "started", waiting, {**waiting, "seconds": 125, "time": first + 125})
    assert run_status(run, now + 1).problems == ("no event for 2 min",)


@pytest.mark.parametrize(("after", "patience"), [("joined", 120), ("round_started", 3600)])
def test_a_run_without_events_for_long_is_unhealthy(run: Path, after: str, patience: float) -> None:
    now = cut(run, after)
    write_services(run / "services.json", {"pids": {"server": os.getpid()}})
    assert run_status(run, now + patience - 10).healthy
    late = run_status(run, now + patience + 200)
    assert "no event for" in late.problems[0]


def test_services_and_processes_are_checked(run: Path, serve_health: Health) -> None:
    now = cut(run, "round_started")
    with GatewayServer(ListenAddress("127.0.0.1", 0), Upstream("http://127.0.0.1:9")) as gateway:
        services = {"gateway": gateway.address, "superlink_health": serve_health(), "pids": {"server": os.getpid()}}
        write_services(run / "services.json", services)
        status = run_status(run, now + 1)
        assert status.healthy
        assert {service.name: service.state for service in status.services} == {
            "gateway": "serving",
            "superlink": "serving",
        }
        assert [(process.name, process.alive) for process in status.processes] == [("server", True)]


def test_services_that_are_down_are_named(run: Path, serve_health: Health) -> None:
    now = cut(run, "round_started")
    gateway, superlink = f"127.0.0.1:{free_port()}", serve_health(False)
    exited = subprocess.Popen([sys.executable, "-c", ""])
    exited.wait()
    write_services(
        run / "services.json",
        {"gateway": gateway, "superlink_health": superlink, "pids": {"server": os.getpid(), "superlink": exited.pid}},
    )
    status = run_status(run, now + 1)
    assert status.problems == (
        f"gateway at {gateway} is down",
        f"superlink at {superlink} is not serving",
        f"superlink (process {exited.pid}) has exited",
    )
    assert status.phase == "training"


def test_a_run_whose_coordinator_has_exited_is_not_running(run: Path) -> None:
    """The pid is this process's, which is alive, but the file is older, so it refers to an earlier process."""
    now = cut(run, "round_started")
    write_services(run / "services.json", {"pids": {"server": os.getpid()}})
    os.utime(run / "services.json", (1e9, 1e9))
    status = run_status(run, now + 1)
    assert (status.phase, status.healthy) == ("not running", False)
    assert status.problems[0] == "not running: it was last training"


def test_a_finished_run_needs_no_services(run: Path) -> None:
    write_services(run / "services.json", {"gateway": f"127.0.0.1:{free_port()}", "pids": {"server": None}})
    status = run_status(run)
    assert status.healthy
    assert status.services == status.processes == ()


def test_a_run_that_has_only_been_prepared_is_joining(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "events.jsonl").unlink()
    status = run_status(run)
    assert (status.phase, status.checkpoint, status.idle) == ("joining", None, None)
    assert [site.site for site in status.sites] == SITES


def test_the_page_shows_progress_and_failures(run: Path) -> None:
    now = cut(
        run, "round", {"event": "failed", "round": 2, "site": "bob", "reason": "gone [away]\x1b[2J"}, checkpoint=1
    )
    console = Console(record=True, width=160, file=(run / "page").open("w"))
    show_run(run_status(run, now + 5), console)
    page = console.export_text()
    for words in (
        "round 1 of 2, training",
        "checkpoint: round 1",
        "ada",
        "round 2: gone [away]",
        "last event: 5 s ago",
    ):
        assert words in page
    assert "\x1b" not in page


def test_the_newest_run_is_the_one_that_changed_last(run: Path) -> None:
    other = shutil.copytree(run, run.parent / "other")
    (run.parent / "no run").mkdir()
    for folder, when in ((run, 2e9), (other, 1e9)):
        for name in ("recipe.toml", "events.jsonl"):
            os.utime(folder / name, (when, when))
    assert newest_run(run.parent) == run
    os.utime(other / "events.jsonl", (3e9, 3e9))
    assert newest_run(run.parent) == other
    with pytest.raises(StateError, match="There is no run in"):
        newest_run(run / "sites")


def test_the_commands_exit_codes_and_its_json(run: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    home = run.parent.parent
    code, out, err = command(folder=home)
    assert (code, err) == (0, "")
    assert "tiny: colora" in out
    status = json.loads(command(str(run), "--json", folder=home)[1])
    assert (status["kind"], status["version"], status["phase"], status["healthy"]) == ("run", 1, "finished", True)
    cut(run, "round", {"event": "stopped"}, checkpoint=1)
    code, out, _ = command(str(run), "--json", folder=home)
    assert (code, json.loads(out)["phase"]) == (1, "not running")
    (run / "events.jsonl").write_text("no json\n")
    code, out, _ = command(str(run), folder=home)
    assert code == 1
    assert "events.jsonl: 1 of 1 lines are not events" in out
    for wrong in (str(home / "nowhere"), str(run / "sites")):
        code, out, err = command(wrong, folder=home)
        assert (code, out) == (2, "")
        assert err.startswith("colora: ")
        assert err.count("\n") == 1


def test_the_spent_budget_of_a_run_is_the_largest_that_a_site_reported(run: Path) -> None:
    assert run_status(run).privacy is None
    recipe = {**read_toml(run / "recipe.toml"), "privacy": {"epsilon": 8.0, "delta": 1e-6}}
    (run / "recipe.toml").write_text(tomli_w.dumps(recipe))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]

    def status(*spent: float) -> dict:
        values = iter(spent)
        for event in events:
            if event["event"] == "reply" and (value := next(values, None)) is not None:
                event["metrics"]["privacy.epsilon"] = value
        (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        found = run_status(run)
        page = Console(record=True, width=200, file=io.StringIO())
        show_run(found, page)
        assert f"privacy budget for examples spent: {found.privacy}\n" in page.export_text()
        return json.loads(json.dumps(found.as_dict()))["privacy"]

    assert status() == {"epsilon": None, "delta": 1e-6, "budget": 8.0}
    assert status(1.5, 2.5, 2.0) == {"epsilon": 2.5, "delta": 1e-6, "budget": 8.0}


def test_the_table_has_a_column_for_what_the_sites_sent(run: Path) -> None:
    def columns() -> str:
        page = Console(record=True, width=160, file=io.StringIO())
        show_run(run_status(run), page)
        return next(line for line in page.export_text().splitlines() if "last round" in line)

    assert "personal" in columns()
    assert "ε" not in columns()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    for event in events:
        if event["event"] == "reply":
            event["metrics"] = {"privacy.epsilon": 1.5}
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert "personal" not in columns()
    assert "ε" in columns()


def test_the_budget_that_the_coordinators_noise_has_spent_is_told(run: Path) -> None:
    recipe = read_toml(run / "recipe.toml")
    recipe["server"]["privacy"] = {"noise_multiplier": 1.5, "epsilon": 9.0}
    (run / "recipe.toml").write_text(tomli_w.dumps(recipe))
    assert run_status(run).as_dict()["site_privacy"] == {"epsilon": None, "delta": 1e-5, "budget": 9.0}
    fields = {"clipped": {"ada": 2.5}, "bound": 1.0, "noise": 0.4, "epsilon": 3.25, "delta": 1e-5, "budget": 9.0}
    event = {"event": "noised", "time": 1.0, "round": 2, "sites": 3, **fields}
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    status = run_status(run)
    assert status.as_dict()["site_privacy"] == {"epsilon": 3.25, "delta": 1e-5, "budget": 9.0}
    page = Console(record=True, width=200, file=io.StringIO())
    show_run(status, page)
    assert "privacy budget for sites spent: at most ε = 3.25 of 9 at δ = 1e-05\n" in page.export_text()
