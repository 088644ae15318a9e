"""Secure aggregation over real processes: a third of the sites lost in every step, and kills with noise as well."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from colora.common.atomic_io import load_arrays
from colora.common.config.loader import recipe_from
from colora.common.models.saved import SHARED
from colora.server.rounds.run_options import read_replay
from colora.simulation.run import simulate

from .conftest import Town, last
from .test_kills import VICTIMS, kill_each

# What the site is about to answer when it is lost: the audit log has a line before the reply is sent. By step, whether
# the site may be in the sum, and whether it may be among those that shared keys and are not in it.
STEPS = {
    "train": {(False, False)},
    "share": {(False, False), (False, True)},
    "mask": {(False, True), (True, False)},
    "open": {(True, False)},
}


def secure(raw: dict, **server: Any) -> dict:
    raw["train"] |= {"max_update_norm": 0.05, "final_steps": 2}
    raw["server"] |= server
    raw["privacy"] = {"secure_aggregation": True, "min_sites": 2}
    return raw


def build(town: Town) -> Town:
    """Build it, and let the sites accept sums of two sites."""
    town.build()
    for site in town.recipe["site"]:
        data = {key: site[key] for key in ("source", "test_source")}
        allow = {"min_sites": 2, "require_secure_aggregation": True}
        town.write_site(site["name"], data=data, trainer={"threads": 1, "seeds": "recipe"}, allow=allow)
    return town


def answered(town: Town, name: str) -> list[tuple[int, str]]:
    """Rounds and steps that a site has answered, by its audit log."""
    path = town.state(name) / "audit.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [(line["round"], line["phase"]) for line in found if line["kind"] in ("reply", "sum")]


def lose(town: Town, name: str, step: str) -> int:
    """Kill all processes of a site while it answers this step of a round that begins later; return the round.

    The site is started again when the round has ended.
    """
    before, ends = max((t for t, _ in answered(town, name)), default=0), time.monotonic() + 200
    while time.monotonic() < ends:
        if rounds := [t for t, answer in answered(town, name) if answer == step and t > before]:
            command = psutil.Process(town.commands[name].pid)
            for process in (*command.children(recursive=True), command):
                process.kill()
            town.commands[name].wait(20)
            town.wait_for("round", 200, round=rounds[-1])
            town.start(name)
            return rounds[-1]
        time.sleep(0.002)
    raise AssertionError(f"{name} has not answered {step}:\n{town.last_words()}")


@pytest.mark.slow
@pytest.mark.endurance
def test_a_third_of_the_sites_may_be_lost_in_every_step(tmp_path: Path, place: Path, tiny_recipe: dict) -> None:
    """The oracle is a plain simulation with the same sites in each round."""
    tiny_recipe["rounds"] = 10
    town = build(Town(place / "town", secure(tiny_recipe, quorum=2, timeout=15.0)))
    try:
        town.start()
        town.wait_for("round", 200, round=1)
        lost = {step: lose(town, "cyd", step) for step in STEPS}
        assert town.wait("server", 400) == 0
        sums = {event["round"]: event for event in town.events("secure_sum")}
        print(lost, {t: (each["sites"], each["dropped"]) for t, each in sums.items()})
        found = {step: ("cyd" in sums[t]["sites"], "cyd" in sums[t]["dropped"]) for step, t in lost.items()}
        assert all(found[step] in possible for step, possible in STEPS.items())
        replay = read_replay(town.run / "events.jsonl")
        simulate(recipe_from({**tiny_recipe, "privacy": {}}), tmp_path / "plain", resume=False, replay=replay)
        folders = (town.run, tmp_path / "plain")
        ends = [load_arrays(last(folder / "checkpoints"), prefix=SHARED)[0] for folder in folders]
        assert max(float(np.abs(ends[0][key] - ends[1][key]).max()) for key in ends[0]) < 1e-5
    finally:
        town.stop()


def private_town(folder: Path, raw: dict) -> Town:
    """Sites with secrets that the test chose, so that two towns have the same noise."""
    town = build(Town(folder, raw))
    for number, name in enumerate(town.names):
        path = town.site(name) / "site.toml"
        path.write_text(path.read_text().replace('seeds = "recipe"', 'seeds = "secret"'))
        secret = town.site(name) / "state" / "site.secret"
        secret.parent.mkdir(mode=0o700)
        secret.touch(0o600)
        secret.write_text(f"{number:064x}\n")
    return town


def spendings(town: Town) -> dict[str, Any]:
    """What each site has spent, by its ledger."""
    ledgers = {name: town.state(name).parent / "privacy.json" for name in town.names}
    return {name: json.loads(path.read_text())["spendings"] for name, path in ledgers.items()}


@pytest.mark.slow
@pytest.mark.endurance
def test_a_run_whose_processes_are_killed_ends_with_the_bits_of_a_calm_one(place: Path, tiny_recipe: dict) -> None:
    """Every kind of process is killed, with secure aggregation and differential privacy for examples.

    The noise comes from the sites' secrets, so the calm run is a deployment with the same ones. Both spend the same.
    """
    kinds = list(VICTIMS)
    tiny_recipe["rounds"] = 2 * len(kinds) + 2
    raw = secure(tiny_recipe, quorum=3)
    raw["privacy"] |= {"noise_multiplier": 1.0}
    calm, town, table = private_town(place / "calm", raw), private_town(place / "town", raw), []
    try:
        calm.start()
        assert calm.wait("server", 900) == 0
        calm.stop()
        town.start()
        town.wait_for("round", 300, round=1)
        kill_each(town, kinds, random.Random(1), table)
        assert town.wait("server", 900) == 0
        for row in table:
            print(row)
        assert town.outcome() == calm.outcome()
        assert spendings(town) == spendings(calm)
        assert all(spendings(town).values())
    finally:
        calm.stop()
        town.stop()
