"""Coordinator and sites as real processes: results equal to a simulation's, clean stops, late and slow sites."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from colora.client.trainer_service.audit_log import FILE as AUDIT
from colora.common.atomic_io import load_arrays
from colora.common.config.loader import recipe_from
from colora.server.rounds.run_options import read_replay
from colora.simulation.run import simulate

from .conftest import Town, last, simulated_outcome

pytestmark = [pytest.mark.slow, pytest.mark.endurance]


def wait_for_no_orphans(town: Town) -> None:
    ends = time.monotonic() + 15
    while town.orphans() and time.monotonic() < ends:
        time.sleep(0.2)
    assert [p.cmdline() for p in town.orphans()] == []


def test_a_deployed_federation_equals_its_simulation_and_leaves_nothing_behind(town: Town, tmp_path: Path) -> None:
    """After SIGTERM the server stops between rounds, and the same command continues the run."""
    town.start()
    town.wait_for("round", 240, round=1)
    town.commands["server"].send_signal(signal.SIGTERM)
    assert town.wait("server", 120) == 130
    assert "Run the same command to continue" in town.said("server")
    stopped = load_arrays(last(town.run / "checkpoints"), prefix="none/")[1]["round"]
    assert 1 <= stopped <= 3
    town.start("server")
    assert town.wait("server", 300) == 0
    town.stop()
    wait_for_no_orphans(town)
    simulated = simulate(recipe_from(town.recipe), tmp_path / "simulated", resume=False)
    assert town.outcome() == simulated_outcome(simulated.path, town.names)
    audited = [json.loads(line) for line in (town.state("ada") / AUDIT).read_text().splitlines()]
    assert {line.get("round") for line in audited} >= {1, 2, 3, 4}


def test_differences_both_ways_give_the_same_bits_when_deployed(tmp_path: Path, place: Path, tiny_recipe: dict) -> None:
    """A site whose state is lost between two rounds asks for the whole adapter, and its trainer starts from it."""
    tiny_recipe |= {"rounds": 4, "communication": {"update_bits": 4, "broadcast_bits": 4}}
    town = Town(place / "town", tiny_recipe).build()
    try:
        town.start()
        assert town.wait("server", 300) == 0
        simulated = simulate(recipe_from(tiny_recipe), tmp_path / "simulated", resume=False)
        assert town.outcome() == simulated_outcome(simulated.path, town.names)
        assert not any(event["whole"] for event in town.events("reply"))
        for path in town.state("bob").glob("round-*"):
            path.unlink()
        town.options = ("--rounds", "6")
        town.start("server")
        assert town.wait("server", 300) == 0
    finally:
        town.stop()
    late = [(event["site"], event["round"]) for event in town.events("reply") if event["whole"]]
    assert late == [("bob", 5)]
    assert {event["round"] for event in town.events("round")} == set(range(1, 7))
    assert not town.events("refused")


def test_benefit_weights_and_a_spectral_start_give_the_same_bits_when_deployed(
    tmp_path: Path, place: Path, tiny_recipe: dict
) -> None:
    tiny_recipe["server"] = {"quorum": 3, "weights": "benefit"}
    tiny_recipe["adapter"] |= {"init": "spectral"}
    town = Town(place / "town", tiny_recipe).build()
    try:
        town.start()
        assert town.wait("server", 300) == 0
    finally:
        town.stop()
    simulated = simulate(recipe_from(tiny_recipe), tmp_path / "simulated", resume=False)
    assert town.outcome() == simulated_outcome(simulated.path, town.names)


def test_a_finished_federation_can_get_more_rounds(tmp_path: Path, place: Path, tiny_recipe: dict) -> None:
    """The sites keep running. The result is that of a federation that had all rounds from the start."""
    town = Town(place / "town", tiny_recipe).build()
    try:
        town.start()
        assert town.wait("server", 300) == 0
        town.options = ("--rounds", "4")
        town.start("server")
        assert town.wait("server", 300) == 0
    finally:
        town.stop()
    assert "The run was extended from 2 to 4 rounds." in " ".join(town.said("server").split())
    simulated = simulate(recipe_from({**tiny_recipe, "rounds": 4}), tmp_path / "simulated", resume=False)
    assert town.outcome() == simulated_outcome(simulated.path, town.names)


@pytest.mark.parametrize("command", ["server", "ada"])
def test_kill_9_of_a_command_leaves_no_orphan(town: Town, command: str) -> None:
    town.start("server", "ada")
    town.wait_for("started", 120)
    ends = time.monotonic() + 120
    while not town.below("ada", "flower-superexec") and time.monotonic() < ends:
        time.sleep(0.1)
    family = psutil.Process(town.commands[command].pid).children(recursive=True)
    assert len(family) >= 3
    town.commands[command].kill()
    _, alive = psutil.wait_procs(family, timeout=15)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def test_a_straggler_is_left_out_and_told_and_the_log_replays_to_the_same_bits(
    tmp_path: Path, place: Path, tiny_recipe: dict
) -> None:
    """The quorum is two of three sites. One trainer is suspended beyond a deadline, and one site joins late."""
    tiny_recipe["rounds"] = 12
    tiny_recipe["server"] = {"quorum": 2, "timeout": 25.0, "optimizer": "momentum"}
    town = Town(place / "town", tiny_recipe).build()
    try:
        town.start("server", "ada", "bob")
        town.wait_for("round", 240, round=1)
        town.start("cyd")
        town.wait_for("joined", 120, site="cyd")
        (trainer,) = town.below("bob", "colora.client.trainer_service.server")
        town.wait_for("reply", 120, site="cyd")
        trainer.suspend()
        left_out = town.wait_for("failed", 120, site="bob")
        trainer.resume()
        town.wait_for("late", 120, site="bob")
        assert town.wait("server", 400) == 0
    finally:
        town.stop()
    assert "no answer within 25 s" in left_out["reason"]
    admitted = {event["round"]: event["admitted"] for event in town.events("round")}
    assert admitted[1] == ["ada", "bob"]
    assert "bob" not in admitted[left_out["round"]]
    assert any("cyd" in sites for sites in admitted.values())
    again = simulate(
        recipe_from(tiny_recipe), tmp_path / "again", resume=False, replay=read_replay(town.run / "events.jsonl")
    )
    assert town.outcome() == simulated_outcome(again.path, town.names)
