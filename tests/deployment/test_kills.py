"""kill -9 of any process at a random moment: the run finishes with the same results as an undisturbed one.

Run with ``COLORA_KILLS=24 pytest -n 0 -s -m endurance tests/deployment/test_kills.py`` for more victims.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from itertools import cycle, islice
from pathlib import Path

import pytest

from colora.common.config.loader import recipe_from
from colora.simulation.run import simulate

from .conftest import Town, simulated_outcome

KILLS = int(os.environ.get("COLORA_KILLS", "8"))
SEED = int(os.environ.get("COLORA_KILL_SEED", "0"))
VICTIMS = {  # kind → the process of a command (none: the command itself)
    "trainer": "colora.client.trainer_service.server",
    "SuperNode": "flower-supernode",
    "ClientApp": "flwr-clientapp",
    "ServerApp": "flwr-serverapp",
    "SuperLink": "flower-superlink",
    "gateway": "colora.server.deployment.gateway.process",
    "colora server": None,
    "colora client": None,
}
AT_SERVER = {"ServerApp", "SuperLink", "gateway", "colora server"}


def kill_one(town: Town, kind: str, rng: random.Random) -> None:
    """Wait for a random time, and for the victim to run; then kill it."""
    command = "server" if kind in AT_SERVER else rng.choice(town.names)
    time.sleep(rng.uniform(0, 4))
    name = VICTIMS[kind]
    if name is None:
        town.commands[command].send_signal(signal.SIGKILL)
        return
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        if found := town.below(command, name):
            time.sleep(rng.uniform(0, 1) if kind == "ClientApp" else 0)
            if found[0].is_running():
                found[0].kill()
                return
        time.sleep(0.02)
    raise AssertionError(f"no {kind} to kill")


def rounds(town: Town) -> int:
    return max((event["round"] for event in town.events("round")), default=0)


@pytest.mark.slow
@pytest.mark.endurance
@pytest.mark.parametrize("communication", [{}, {"update_bits": 4, "broadcast_bits": 4}], ids=["fp32", "4 bits"])
def test_any_process_may_be_killed_at_any_moment(
    tmp_path: Path, place: Path, tiny_recipe: dict, communication: dict
) -> None:
    """Half of the kills are in a run of half the rounds, and the others after ``--rounds`` has extended it."""
    tiny_recipe["communication"] = communication
    half = 3 * KILLS // 2 + 1  # rounds: a kill takes two on average
    tiny_recipe["rounds"] = 2 * half
    tiny_recipe["train"] |= {"final_steps": 2, "persist_optimizer_state": True}
    tiny_recipe["server"] |= {"optimizer": "adam"}
    calm = simulate(recipe_from(tiny_recipe), tmp_path / "calm", resume=False)
    town, rng = Town(place / "town", {**tiny_recipe, "rounds": half}).build(), random.Random(SEED)
    kinds = list(islice(cycle(VICTIMS), KILLS))
    rng.shuffle(kinds)
    table: list[tuple[str, int, float]] = []
    try:
        town.start()
        town.wait_for("round", 300, round=1)
        kill_each(town, kinds[: KILLS // 2], rng, table)
        assert town.wait("server", 600) == 0
        assert rounds(town) == half
        town.options = ("--rounds", str(tiny_recipe["rounds"]))
        town.start("server")
        town.wait_for("round", 300, round=half + 1)
        kill_each(town, kinds[KILLS // 2 :], rng, table)
        assert town.wait("server", 600) == 0
        report(table, statistics.median(event["seconds"] for event in town.events("round")))
        for event in town.events("restarted"):
            print(f"  {event['time']:.0f} {event['what']} restarted: {event.get('reason', 'it had ended')}")
        assert town.outcome() == simulated_outcome(calm.path, town.names)
    finally:
        town.stop()
    ends = time.monotonic() + 10
    while town.orphans() and time.monotonic() < ends:
        time.sleep(0.2)
    assert town.orphans() == []


def kill_each(town: Town, kinds: list[str], rng: random.Random, table: list[tuple[str, int, float]]) -> None:
    """Kill one process after the other, each after the end of a round that began after the kill before it.

    ``table`` gets a row for each: its kind, the round before it, and the seconds to the end of the next one.
    """
    for kind in kinds:
        before = rounds(town)
        kill_one(town, kind, rng)
        killed = time.monotonic()
        at = rounds(town)
        while rounds(town) == at and time.monotonic() < killed + 240:
            town.tend()
            time.sleep(0.05)
        assert rounds(town) > at, f"stuck after {kind}:\n{town.last_words()}"
        table.append((kind, at, time.monotonic() - killed))
        while rounds(town) < max(at, before) + 1:
            time.sleep(0.05)


def report(table: list[tuple[str, int, float]], calm: float) -> None:
    """Print victims, rounds and the seconds from each kill to the next round's end. ``calm`` is the median round."""
    print(f"\nmedian round: {calm:.1f} s; seconds from the kill to the end of the next round")
    for kind, at, seconds in table:
        print(f"  {kind:14} after round {at:3}  {seconds:6.1f} s")
    for kind in VICTIMS:
        of = [seconds for victim, _, seconds in table if victim == kind]
        if of:
            print(
                f"  median {kind:14} {statistics.median(of):6.1f} s, less a round {statistics.median(of) - calm:6.1f} s"
            )
