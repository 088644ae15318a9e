"""A site that comes when all is trained: its core and head only, on the adapter as it is."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from colora.client.personalize import personalize
from colora.common.atomic_io import load_arrays
from colora.common.config.loader import load_site, recipe_from
from colora.common.config.schema import PrivateSettings
from colora.common.config.site_schema import SiteSettings
from colora.common.errors import RefusedError, StateError
from colora.common.models.saved import read_saved_model
from colora.server.reporting.run_folder import RunFolder
from colora.simulation.run import simulate
from tests.conftest import write_tiny_recipe

ROUNDS, STEPS, RANK, LAYERS = 2, 4, 4, 4  # two modules in each of two layers


def finished(raw: dict, folder: Path) -> RunFolder:
    """A run in which cyd comes after the last round."""
    raw["site"][2]["from_round"] = ROUNDS + 1
    raw["train"] |= {"final_steps": STEPS}
    raw["server"] = {"quorum": 2}
    return simulate(recipe_from(raw), folder, resume=False)


@pytest.fixture(scope="module")
def run(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Such a run, for the tests that only read it."""
    folder = tmp_path_factory.mktemp("finished")
    return finished(write_tiny_recipe(tiny_bert, folder), folder / "run")


def site_file(folder: Path, raw: dict, **tables: object) -> SiteSettings:
    """cyd as a site of its own, with the rows it has in the simulation."""
    data = {key: raw["site"][2][key] for key in ("source", "test_source")}
    folder.mkdir()
    about = {"name": "cyd", "data": data, "trainer": {"threads": 1, "device": "cpu"}, **tables}
    (folder / "site.toml").write_text(tomli_w.dumps(about))
    return load_site(folder / "site.toml")


def test_only_cores_and_heads_are_trained_and_simulation_does_the_same(
    run: RunFolder, tiny_recipe: dict, tmp_path: Path
) -> None:
    adapter = read_saved_model(run.path)
    assert not adapter.is_personal
    joined = personalize(site_file(tmp_path / "cyd", tiny_recipe), adapter)
    assert joined.trained == {"core": RANK**2 * LAYERS, "head": 3 * 16 + 3}
    assert joined.steps == STEPS
    assert {"base.accuracy", "shared.accuracy", "personal.accuracy"} <= set(joined.metrics)
    mine, simulated = read_saved_model(tmp_path / "cyd"), read_saved_model(run.path / "sites" / "cyd")
    assert mine.path == joined.state
    for key, value in adapter.shared.items():
        assert np.array_equal(mine.shared[key], value)
    assert set(mine.personal) == set(simulated.personal)
    for key, value in simulated.personal.items():
        assert np.array_equal(mine.personal[key], value), key


def test_asked_again_it_finds_its_work_done_and_more_steps_are_other_work(
    run: RunFolder, tiny_recipe: dict, tmp_path: Path
) -> None:
    site, adapter = site_file(tmp_path / "cyd", tiny_recipe), read_saved_model(run.path)
    taken: list[tuple[int, int]] = []
    first = personalize(site, adapter, watch=lambda done, total: taken.append((done, total)))
    assert taken[-1] == (STEPS, STEPS)
    before, taken[:] = load_arrays(first.state), []
    assert personalize(site, adapter, watch=lambda done, total: taken.append((done, total))).metrics == first.metrics
    assert not taken
    assert load_arrays(first.state)[1] == before[1]
    personalize(site, adapter, steps=7, watch=lambda done, total: taken.append((done, total)))
    assert taken[-1] == (7, 7)


def test_a_participants_states_are_not_touched_and_other_settings_are_other_work(
    run: RunFolder, tiny_recipe: dict, tmp_path: Path
) -> None:
    site, adapter = site_file(tmp_path / "cyd", tiny_recipe), read_saved_model(run.path)
    first = personalize(site, adapter)
    private = personalize(dataclasses.replace(site, private=PrivateSettings("lora", rank=2)), adapter)
    assert set(private.trained) == {"core", "head", "private"}
    assert "private" not in first.trained
    assert any(key.startswith("private.") for key in read_saved_model(first.state).personal)
    ada = run.path / "sites" / "ada"
    shutil.copytree(ada / "state", tmp_path / "cyd" / "state" / "copy")
    shutil.rmtree(tmp_path / "cyd" / "state" / "tiny")
    (tmp_path / "cyd" / "state" / "copy").rename(tmp_path / "cyd" / "state" / "tiny")
    with pytest.raises(StateError, match="site cyd: --join-core: expected a site that took no part"):
        personalize(site, adapter)


def test_a_late_site_starts_at_the_full_learning_rate(tiny_recipe: dict, tmp_path: Path) -> None:
    """A linear schedule over the steps of the others would have left it next to nothing."""
    tiny_recipe["train"] |= {"lr_schedule": "linear", "optimizer": "sgd", "max_grad_norm": 0.0}
    moved = {}
    for schedule in ("linear", "constant"):
        tiny_recipe["train"]["lr_schedule"] = schedule
        run = finished(tiny_recipe, tmp_path / schedule)
        saved = read_saved_model(run.path / "sites" / "cyd")
        cores = [value for key, value in saved.personal.items() if key.endswith("lora_core")]
        moved[schedule] = float(sum(np.abs(core - np.eye(RANK)).sum() for core in cores))
    assert moved["linear"] > 0.4 * moved["constant"]


def test_what_the_site_does_not_allow_or_nobody_shared_is_refused(
    run: RunFolder, tiny_recipe: dict, tmp_path: Path
) -> None:
    careful = site_file(tmp_path / "cyd", tiny_recipe, allow={"methods": ["fedit"]})
    with pytest.raises(RefusedError, match=r"method.name: expected one of fedit \(allow.methods\), found 'colora'"):
        personalize(careful, read_saved_model(run.path))
    assert not (tmp_path / "cyd" / "state").exists()
    alone = finished({**tiny_recipe, "method": {"name": "local"}}, tmp_path / "alone")
    with pytest.raises(StateError, match="a method that shares something, found local"):
        personalize(careful, read_saved_model(alone.path))
