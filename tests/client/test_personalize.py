"""A new site fits its core and head to the shared adapter of a finished run."""

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
    """A finished run that cyd joins after the last round."""
    raw["site"][2]["from_round"] = ROUNDS + 1
    raw["train"] |= {"final_steps": STEPS}
    raw["server"] = {"quorum": 2}
    return simulate(recipe_from(raw), folder, resume=False)


@pytest.fixture(scope="module")
def run(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Such a run, for tests that only read it."""
    folder = tmp_path_factory.mktemp("finished")
    return finished(write_tiny_recipe(tiny_bert, folder), folder / "run")


def site_file(folder: Path, raw: dict, **tables: object) -> SiteSettings:
    """Write a site file for cyd, with its rows of the simulation."""
    data = {key: raw["site"][2][key] for key in ("source", "test_source")}
    folder.mkdir()
    settings = {"name": "cyd", "data": data, "trainer": {"threads": 1, "device": "cpu"}, **tables}
    (folder / "site.toml").write_text(tomli_w.dumps(settings))
    return load_site(folder / "site.toml")


def test_only_core_and_head_are_trained_as_in_a_simulation(run: RunFolder, tiny_recipe: dict, tmp_path: Path) -> None:
    adapter = read_saved_model(run.path)
    assert not adapter.is_personal
    result = personalize(site_file(tmp_path / "cyd", tiny_recipe), adapter)
    assert result.trained == {"core": RANK**2 * LAYERS, "head": 3 * 16 + 3}
    assert result.steps == STEPS
    assert {"base.accuracy", "shared.accuracy", "personal.accuracy"} <= set(result.metrics)
    mine, simulated = read_saved_model(tmp_path / "cyd"), read_saved_model(run.path / "sites" / "cyd")
    assert mine.path == result.state
    for key, value in adapter.shared.items():
        assert np.array_equal(mine.shared[key], value)
    assert set(mine.personal) == set(simulated.personal)
    for key, value in simulated.personal.items():
        assert np.array_equal(mine.personal[key], value), key


def test_a_repeated_call_returns_the_stored_result_and_another_one_is_not_overwritten_silently(
    run: RunFolder, tiny_recipe: dict, tmp_path: Path
) -> None:
    site, adapter = site_file(tmp_path / "cyd", tiny_recipe), read_saved_model(run.path)
    taken: list[tuple[int, int]] = []
    first = personalize(site, adapter, on_step=lambda done, total: taken.append((done, total)))
    assert taken[-1] == (STEPS, STEPS)
    before, taken[:] = load_arrays(first.state), []
    assert personalize(site, adapter, on_step=lambda done, total: taken.append((done, total))).metrics == first.metrics
    assert not taken
    assert load_arrays(first.state)[1] == before[1]
    other_adapter = dataclasses.replace(adapter, shared={key: 2 * value for key, value in adapter.shared.items()})
    for other, steps in ((adapter, 7), (other_adapter, None)):
        with pytest.raises(StateError, match=r"site cyd: .* holds a result of another adapter .* Use --replace"):
            personalize(site, other, steps=steps)
        assert load_arrays(first.state)[1] == before[1]
    personalize(site, adapter, steps=7, replace=True, on_step=lambda done, total: taken.append((done, total)))
    assert taken[-1] == (7, 7)


def test_a_site_with_a_smaller_rank_gets_a_core_of_that_rank(run: RunFolder, tiny_recipe: dict, tmp_path: Path) -> None:
    site = site_file(tmp_path / "cyd", tiny_recipe, allow={"max_rank": 2})
    first = personalize(site, read_saved_model(run.path))
    assert first.trained["core"] == 2**2 * LAYERS < RANK**2 * LAYERS
    assert personalize(site, read_saved_model(run.path)).metrics == first.metrics


def test_other_settings_train_again_and_a_participants_states_are_kept(
    run: RunFolder, tiny_recipe: dict, tmp_path: Path
) -> None:
    site, adapter = site_file(tmp_path / "cyd", tiny_recipe), read_saved_model(run.path)
    first = personalize(site, adapter)
    with_private = dataclasses.replace(site, private=PrivateSettings("lora", rank=2))
    with pytest.raises(StateError, match="of other settings"):
        personalize(with_private, adapter)
    private = personalize(with_private, adapter, replace=True)
    assert set(private.trained) == {"core", "head", "private"}
    assert "private" not in first.trained
    assert any(key.startswith("private.") for key in read_saved_model(first.state).personal)
    ada = run.path / "sites" / "ada"
    shutil.copytree(ada / "state", tmp_path / "cyd" / "state" / "copy")
    shutil.rmtree(tmp_path / "cyd" / "state" / "tiny")
    (tmp_path / "cyd" / "state" / "copy").rename(tmp_path / "cyd" / "state" / "tiny")
    with pytest.raises(StateError, match=r"site cyd: .*took no part in the federation, but found its states of"):
        personalize(site, adapter)


@pytest.mark.slow
def test_a_late_site_starts_at_the_full_learning_rate(tiny_recipe: dict, tmp_path: Path) -> None:
    """A linear schedule over the other sites' steps would leave a learning rate near zero."""
    tiny_recipe["train"] |= {"lr_schedule": "linear", "optimizer": "sgd", "max_grad_norm": 0.0}
    change = {}
    for schedule in ("linear", "constant"):
        tiny_recipe["train"]["lr_schedule"] = schedule
        run = finished(tiny_recipe, tmp_path / schedule)
        saved = read_saved_model(run.path / "sites" / "cyd")
        cores = [value for key, value in saved.personal.items() if key.endswith("lora_core")]
        change[schedule] = float(sum(np.abs(core - np.eye(RANK)).sum() for core in cores))
    assert change["linear"] > 0.4 * change["constant"]


def test_a_plan_that_the_site_forbids_and_a_method_that_shares_nothing_are_refused(
    run: RunFolder, tiny_recipe: dict, tmp_path: Path
) -> None:
    restricted = site_file(tmp_path / "cyd", tiny_recipe, allow={"methods": ["fedit"]})
    with pytest.raises(RefusedError, match=r"method.name.*allow.methods"):
        personalize(restricted, read_saved_model(run.path))
    assert not (tmp_path / "cyd" / "state").exists()
    alone = finished({**tiny_recipe, "method": {"name": "local"}}, tmp_path / "alone")
    with pytest.raises(StateError, match="method local shares no adapter"):
        personalize(restricted, read_saved_model(alone.path))
