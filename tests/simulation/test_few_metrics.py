"""A federation whose sites round or withhold their metrics trains the same and ends with a report."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from colora.client.trainer_service.release import SiteSize, release
from colora.common.atomic_io import load_arrays
from colora.common.config.loader import recipe_from
from colora.common.protocol.types import BENEFIT, TrainReply, TrainRequest, hash_arrays
from colora.server.reporting.events import read_events
from colora.simulation import site_pool
from colora.simulation.run import simulate

TEST_ROWS = 10
Rule = Literal["all", "rounded", "none"]


def run_with(rule: Rule, recipe: dict, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Simulate sites that send what a deployed site with ``allow.metrics = rule`` sends; return the events."""
    handle = site_pool.SimulatedSite.handle

    def released(self: site_pool.SimulatedSite, request: TrainRequest) -> TrainReply:
        return release(handle(self, request), rule, SiteSize(30, TEST_ROWS)).reply

    with monkeypatch.context() as patch:
        patch.setattr(site_pool.SimulatedSite, "handle", released)
        result = simulate(recipe_from(recipe), out, resume=False)
    return list(read_events(result.path / "events.jsonl"))


def test_without_metrics_the_shared_adapter_is_the_same(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every, none = (run_with(rule, tiny_recipe, tmp_path / rule, monkeypatch) for rule in ("all", "none"))
    assert [e["metrics"] for e in none if e["event"] == "reply"] == [{}] * (3 * (tiny_recipe["rounds"] + 1))
    last = f"checkpoints/round-{tiny_recipe['rounds']:06d}.safetensors"
    trained = [load_arrays(tmp_path / rule / last, prefix="shared/")[0] for rule in ("all", "none")]
    assert trained[0]
    assert hash_arrays(trained[0]) == hash_arrays(trained[1])
    assert [e["event"] for e in none][-1] == [e["event"] for e in every][-1]


def test_rounded_ratios_still_weigh_the_sites(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 examples: the ratios come in fifths."""
    tiny_recipe["server"] = {"quorum": 3, "weights": "benefit"}
    events = run_with("rounded", tiny_recipe, tmp_path / "run", monkeypatch)
    ratios = [e["metrics"][BENEFIT] for e in events if e["event"] == "reply" and e["kind"] == "train"]
    assert len(ratios) == 3 * tiny_recipe["rounds"]
    assert all(abs(5 * ratio - round(5 * ratio)) < 1e-9 for ratio in ratios)
    weights = [e["weights"] for e in events if e["event"] == "round"]
    assert all(abs(sum(each.values()) - 1) < 1e-6 for each in weights)
