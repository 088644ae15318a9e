"""Whole runs on tiny models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from colora.common.config.loader import recipe_from
from colora.common.methods import METHODS
from colora.common.protocol.codec import FOR_REQUESTS
from colora.server.reporting.page.build import build_page
from colora.server.reporting.page.fold import read_history
from colora.server.reporting.summary import summarize
from colora.simulation.run import simulate


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_to_its_end_and_reports_every_site(tiny_recipe: dict, tmp_path: Path, method: str) -> None:
    recipe = recipe_from({**tiny_recipe, "method": {"name": method}})
    summary = summarize(simulate(recipe, tmp_path / "run", resume=False).events())
    for row in summary.rows.values():
        assert row.metric("base") is not None
        assert row.metric("personal") is not None
        assert (row.metric("shared") is not None) == METHODS[method].shares
        assert not row.failures


@pytest.mark.slow
def test_a_codec_of_half_the_bits_sends_half_the_bytes_and_trains_as_well(tiny_recipe: dict, tmp_path: Path) -> None:
    sent: dict[str, int] = {}
    losses: dict[str, float] = {}
    adapter = {**tiny_recipe["adapter"], "rank": 16}
    for codec in FOR_REQUESTS:
        recipe = recipe_from({**tiny_recipe, "adapter": adapter, "communication": {"codec": codec}})
        board = summarize(simulate(recipe, tmp_path / codec, resume=False).events())
        assert not any(row.failures for row in board.rows.values())
        sent[codec] = sum(row.bytes_up for row in board.rows.values())
        losses[codec] = sum(row.metrics["personal.loss"] or 0 for row in board.rows.values()) / len(board.rows)
    for codec in ("fp16", "bf16"):
        assert 0.5 < sent[codec] / sent["safetensors"] < 0.6  # the rest is names, metrics and settings
        assert losses[codec] == pytest.approx(losses["safetensors"], abs=0.01)


def test_generation_sites_report_text_metrics(generation_recipe: dict, tmp_path: Path) -> None:
    summary = summarize(simulate(recipe_from(generation_recipe), tmp_path / "run", resume=False).events())
    for row in summary.rows.values():
        assert {"personal.rouge_l", "personal.exact_match", "personal.loss", "base.rouge_l"} <= set(row.metrics)
        assert 0 < row.measuring < row.seconds, "both training and measuring took time"


def test_mixed_tasks_share_one_adapter_with_uniform_weights(
    generation_recipe: dict, tiny_recipe: dict, tmp_path: Path
) -> None:
    site = {**tiny_recipe["site"][0], "task": "classification"}
    recipe = recipe_from({**generation_recipe, "site": [*generation_recipe["site"], site]})
    run = simulate(recipe, tmp_path / "run", resume=False)
    weights = [event["weights"] for event in run.events() if event["event"] == "round"]
    assert weights == [{"plain": 1.0, "chat": 1.0, "ada": 1.0}] * 2


def test_the_mean_of_products_loses_less_than_the_product_of_means(tiny_recipe: dict, tmp_path: Path) -> None:
    """In the first round, which begins with the same adapter."""
    first = {}
    for aggregator in ("mean", "product"):
        tiny_recipe["server"]["aggregator"] = aggregator
        run = simulate(recipe_from(tiny_recipe), tmp_path / aggregator, resume=False)
        first[aggregator] = next(event["residual"] for event in run.events() if event["event"] == "round")
    assert 0 < first["product"] < first["mean"]


@pytest.mark.parametrize("server", [{"groups": "similarity"}, {"aggregator": "product"}, {"aggregator": "median"}])
def test_a_baseline_shares_nothing_whatever_the_server_does(tiny_recipe: dict, tmp_path: Path, server: dict) -> None:
    tiny_recipe["simulation"]["baseline"] = True
    tiny_recipe["server"] |= server
    rows = summarize(simulate(recipe_from(tiny_recipe), tmp_path / "run", resume=False).events()).rows
    assert all(row.metric("alone") is not None for row in rows.values())


def test_krum_names_the_site_that_it_leaves_out(tiny_recipe: dict, tmp_path: Path) -> None:
    for site, name in zip(tiny_recipe["site"][:2], ("dee", "eve"), strict=True):
        copies = {key: f"{site[key]}.{name}.jsonl" for key in ("source", "test_source")}
        for key, copy in copies.items():
            shutil.copy(site[key], copy)
        tiny_recipe["site"].append({**site, **copies, "name": name})
    tiny_recipe["server"]["aggregator"] = "krum"
    run = simulate(recipe_from(tiny_recipe), tmp_path / "run", resume=False)
    left_out = {event["round"]: event["site"] for event in run.events() if event["event"] == "distant"}
    ended = [event for event in run.events() if event["event"] == "round"]
    assert left_out.keys() == {event["round"] for event in ended}
    assert all((weight == 0) == (site == left_out[e["round"]]) for e in ended for site, weight in e["weights"].items())
    page = build_page([read_history(run.path)])
    assert all(f"{site}" in page and "its update was far from the others" in page for site in left_out.values())
