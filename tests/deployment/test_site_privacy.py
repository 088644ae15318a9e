"""Differential privacy for whole sites over real processes: kills change neither the noise nor what is spent."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from colora.common.config.loader import recipe_from
from colora.common.training.accountant import Spending, epsilon_of
from colora.server.reporting.events import read_events
from colora.server.rounds.site_privacy import SECRET
from colora.simulation.run import simulate

from .conftest import Town, simulated_outcome
from .test_kills import AT_SERVER, VICTIMS, kill_each

ROUNDS, MORE = 12, 3  # rounds that the budget allows, and those that the recipe asks for beyond them


def give_secret(run: Path) -> None:
    """Write the same secret into every run folder, so that two runs have the same noise."""
    run.mkdir(parents=True, mode=0o700)
    secret = run / SECRET
    secret.touch(0o600)
    secret.write_text(f"{7:064x}\n")


@pytest.mark.slow
@pytest.mark.endurance
def test_kills_change_neither_the_noise_nor_the_budget(tmp_path: Path, place: Path, tiny_recipe: dict) -> None:
    """The run ends when its budget is spent, with the bits of a simulation that nobody disturbed."""
    budget = epsilon_of([Spending(2.0, 1.0, ROUNDS)], 1e-5, "test")
    tiny_recipe |= {"rounds": ROUNDS + MORE}
    tiny_recipe["server"] |= {
        "weights": "uniform",
        "privacy": {"noise_multiplier": 2.0, "epsilon": budget * 1.0001, "clip_norm": 0.1},
    }
    give_secret(tmp_path / "calm")
    calm = simulate(recipe_from(tiny_recipe), tmp_path / "calm", resume=False)
    town, table = Town(place / "town", tiny_recipe).build(), []
    give_secret(town.run)
    try:
        town.start()
        town.wait_for("round", 300, round=1)
        kill_each(town, [kind for kind in VICTIMS if kind in AT_SERVER] + ["trainer"], random.Random(3), table)
        assert town.wait("server", 600) == 0
        for row in table:
            print(row)
        assert town.outcome() == simulated_outcome(calm.path, town.names)
        noised = {event["round"]: event["epsilon"] for event in town.events("noised")}
        assert noised == {
            e["round"]: e["epsilon"] for e in read_events(calm.path / "events.jsonl") if e["event"] == "noised"
        }
        assert sorted(noised) == list(range(1, ROUNDS + 1))
        assert noised[ROUNDS] == pytest.approx(budget)
    finally:
        town.stop()
