"""Federations in which sites train adapters of different ranks (``allow.max_rank``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from colora.common.atomic_io import load_arrays
from colora.common.config.loader import recipe_from
from colora.common.errors import ConfigError
from colora.common.models.saved import SHARED, TRAINED
from colora.server.reporting.conclusions import ranks
from colora.server.reporting.run_folder import RunFolder
from colora.server.reporting.summary import summarize
from colora.simulation.run import simulate


def run(
    raw: dict, folder: Path, *, engine: str = "local", max_ranks: tuple[int, ...] = (1, 2, 4), **server: Any
) -> RunFolder:
    raw = {**raw, "server": {**raw["server"], **server}, "simulation": {**raw["simulation"], "engine": engine}}
    raw["site"] = [{**site, "max_rank": rank} for site, rank in zip(raw["site"], max_ranks, strict=True)]
    return simulate(recipe_from(raw), folder, resume=False)


def arrays(folder: Path, prefix: str, number: int = 1) -> dict[str, np.ndarray]:
    found = load_arrays(next(folder.glob(f"round-{number:06d}*")), prefix=prefix)[0]
    return {key: value.astype(np.float64) for key, value in found.items()}


@pytest.mark.parametrize("engine", ["local", "batched"])
def test_the_product_rule_averages_the_products_of_all_ranks(engine: str, tiny_recipe: dict, tmp_path: Path) -> None:
    """Three sites of ranks 1, 2 and 4: the adapter is the best approximation of the mean of their products.

    B begins at zero, so the product that a site sends after the first round has the site's rank.
    """
    found = run(tiny_recipe, tmp_path / "run", engine=engine, aggregator="product", weights="uniform")
    mean = arrays(found.path / "checkpoints", SHARED)
    sites = [arrays(found.path / "sites" / name / "state", TRAINED) for name in ("ada", "bob", "cyd")]
    for a in (key for key in mean if "lora_A" in key):
        b = a.replace("lora_A", "lora_B")
        assert [np.linalg.matrix_rank(site[b] @ site[a], tol=1e-5) for site in sites] == [1, 2, 4]
        u, values, v = np.linalg.svd(sum(site[b] @ site[a] for site in sites) / 3)
        np.testing.assert_allclose(mean[b] @ mean[a], (u[:, :4] * values[:4]) @ v[:4], atol=1e-5)


def test_the_report_names_the_sites_and_their_ranks(tiny_recipe: dict, tmp_path: Path) -> None:
    summary = summarize(run(tiny_recipe, tmp_path / "run").events())
    assert ranks(summary) == ["Sites with adapters of a smaller rank (allow.max_rank): ada 1, bob 2."]


def test_both_engines_and_a_second_run_give_equal_results(tiny_recipe: dict, tmp_path: Path) -> None:
    names = ("local1", "local2", "batched1")
    runs = [run(tiny_recipe, tmp_path / name, engine=name[:-1], max_ranks=(2, 2, 4)) for name in names]
    one, again, batched = (arrays(found.path / "checkpoints", SHARED, 2) for found in runs)
    assert all(np.array_equal(one[key], again[key]) for key in one)
    assert max(float(np.abs(one[key] - batched[key]).max()) for key in one) < 1e-5


def test_a_rank_that_a_site_cannot_have_is_refused_before_the_run(tiny_recipe: dict, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"site ada.*the adapter of rank 4 cannot have a rank of 1 at site ada"):
        run({**tiny_recipe, "method": {"name": "ffa"}}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sites_of_a_smaller_rank_have_no_part_in_the_trial(tiny_recipe: dict, tmp_path: Path) -> None:
    """Their updates fill other columns, so a trial would divide by rank. They join the largest group."""
    found = run(tiny_recipe, tmp_path / "run", max_ranks=(2, 4, 4), groups="similarity", quorum=2)
    events = list(found.events())
    assert [event["groups"] for event in events if event["event"] == "grouped"] == [[["bob", "cyd"]]]
    assert [event["admitted"] for event in events if event["event"] == "round"] == [["ada", "bob", "cyd"]] * 2
