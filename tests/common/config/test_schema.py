"""Recipes: round trips, inheritance by sites, overrides, identity, and rules that span keys."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from colora.common.config.loader import load_recipe, load_site, recipe_from, with_base_model
from colora.common.config.schema import MethodSettings, Plan, Recipe, TrainSettings, parse, to_dict, to_json
from colora.common.errors import ConfigError
from colora.common.methods import ABSENT, METHODS, PERSONAL, SHARED
from colora.simulation.run import local_only

SHIPPED = sorted((Path(__file__).resolve().parents[3] / "recipes").glob("*.toml"))
SMALL: dict[str, Any] = {
    "name": "small",
    "rounds": 2,
    "model": {"source": "synthetic:bilinear-4"},
    "site": [{"name": "ada", "source": "a.jsonl"}, {"name": "bob", "source": "b.jsonl"}],
}
FULL: dict[str, Any] = {
    "name": "full",
    "description": 'No key at its default: ΔW, "quoted".',
    "rounds": 7,
    "seed": -3,
    "model": {"source": "m", "revision": "v1", "max_length": 9, "device": "cpu"},
    "adapter": {"rank": 3, "alpha": 1.5, "dropout": 0.1, "target_modules": "q|v", "core": "diagonal", "rslora": True},
    "method": {"name": "fedit", "A": "frozen", "core": "absent"},
    "train": {
        "schedule": "alternating",
        "personal_steps": 4,
        "shared_steps": 5,
        "core_lr": 0.0,
        "persist_optimizer_state": True,
    },
    "evaluation": {"every": 0, "generate_at_end_only": False},
    "data": {"task": "generation", "prompt": "q", "completion": "a", "where": {"k": "v"}, "train": 8},
    "site": [{"name": "ada", "source": "a.csv", "from_round": 2}, {"name": "bob", "source": "b.csv", "labels": ["x"]}],
    "server": {"optimizer": "yogi", "lr": 1e-5, "weights": "uniform", "quorum": 1, "timeout": 1e9},
    "simulation": {"engine": "ray", "threads": 2, "baseline": True},
}
SPLIT: dict[str, Any] = {
    **{key: SMALL[key] for key in ("name", "rounds", "model")},
    "data": {"source": "a.jsonl", "labels": ["x", "y"]},
    "partition": {"by": "dirichlet", "sites": 3, "alpha": 0.1},
}


def recipes() -> list[Any]:
    own = [pytest.param(recipe_from(raw), id=raw["name"]) for raw in (SMALL, FULL)]
    return [
        *own,
        pytest.param(recipe_from(SPLIT), id="split"),
        *(pytest.param(load_recipe(p), id=p.stem) for p in SHIPPED),
    ]


@pytest.mark.parametrize("recipe", recipes())
def test_a_recipe_survives_a_dictionary_toml_and_json(recipe: Recipe) -> None:
    assert recipe_from(to_dict(recipe)) == recipe
    assert recipe_from(json.loads(to_json(recipe))) == recipe
    read = recipe_from(tomllib.loads(tomli_w.dumps(to_dict(recipe))))
    assert read == recipe
    assert read.identity == recipe.identity


@pytest.mark.parametrize("recipe", recipes())
def test_the_plan_survives_json_and_has_no_key_of_data_sites_or_server(recipe: Recipe) -> None:
    plan = recipe.plan
    assert parse(Plan, json.loads(to_json(plan))) == plan
    assert not {"data", "site", "partition", "server", "simulation", "description"} & set(to_dict(plan))


def test_a_site_inherits_keys_that_it_does_not_set() -> None:
    shared = {"source": "all.jsonl", "text": "body", "train": 5}
    recipe = recipe_from(
        {
            **SMALL,
            "data": shared,
            "site": [
                {"name": "plain"},
                {"name": "own", "source": "own.jsonl", "train": 7},
                {"name": "table", "data": {"text": "words", "test": 3}},
                {"name": "both", "data": {"train": 1, "test": 2}, "train": 9, "from_round": 2},
            ],
        }
    )
    actual = {s.name: (s.data.source, s.data.text, s.data.train, s.data.test, s.from_round) for s in recipe.site}
    assert actual == {
        "plain": ("all.jsonl", "body", 5, None, 1),
        "own": ("own.jsonl", "body", 7, None, 1),
        "table": ("all.jsonl", "words", 5, 3, 1),
        "both": ("all.jsonl", "body", 9, 2, 2),
    }
    assert recipe.data.source == "all.jsonl"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("rounds=9", ("rounds",), 9),
        ("train.lr=1e-5", ("train", "lr"), 1e-5),
        ("train.lr = 1", ("train", "lr"), 1.0),
        ("simulation.baseline=true", ("simulation", "baseline"), True),
        ("method.name=fedit", ("method", "name"), "fedit"),
        ('method.name="ffa"', ("method", "name"), "ffa"),
        ("description=two words = one text", ("description",), "two words = one text"),
        ('adapter.target_modules=["proj", "key"]', ("adapter", "target_modules"), ("proj", "key")),
        ("adapter.target_modules=q.*", ("adapter", "target_modules"), "q.*"),
        ("data.where.k=v", ("data", "where"), {"k": "v"}),
        ('model={source = "other"}', ("model", "source"), "other"),
    ],
)
def test_an_override_changes_its_key_and_nothing_else(
    tmp_path: Path, override: str, key: tuple[str, ...], value: object
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps({**SMALL, "site": [{**site, "where": {"k": "v"}} for site in SMALL["site"]]}))
    plain, changed = load_recipe(path), load_recipe(path, (override,))
    actual: Any = changed
    for part in key:
        actual = getattr(actual, part)
    assert actual == value
    others = {f.name for f in dataclasses.fields(Recipe)} - {key[0]}
    assert all(getattr(plain, name) == getattr(changed, name) for name in others)


def test_a_later_override_wins(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(SMALL))
    assert load_recipe(path, ("rounds=3", "train.steps=4", "rounds=5")).rounds == 5


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"description": "other words"}, True),
        ({"simulation": {"engine": "ray", "threads": 3, "baseline": True}}, True),
        ({"train": {"lr": 1e-3}}, True),  # the default, written out
        ({"train": {"lr": 2e-3}}, False),
        ({"seed": 1}, False),
        ({"rounds": 3}, True),  # a run can be extended
        ({"server": {"quorum": 2}}, False),
        ({"method": {"head": "shared"}}, False),
        ({"site": SMALL["site"][::-1]}, False),
        ({"site": [{**site, "train": 3} for site in SMALL["site"]]}, False),
    ],
)
def test_the_identity_changes_with_keys_that_can_change_a_result(change: dict[str, Any], same: bool) -> None:
    assert (recipe_from({**SMALL, **change}).identity == recipe_from(SMALL).identity) == same


@pytest.mark.parametrize("name", METHODS)
def test_a_method_without_changes_is_its_row_in_the_table(name: str) -> None:
    assert MethodSettings(name).row() == METHODS[name]


def test_a_recipe_changes_the_roles_of_groups() -> None:
    row = MethodSettings("colora", B="personal", core="absent", head="shared").row()
    assert (row.A, row.B, row.core, row.head) == (SHARED, PERSONAL, ABSENT, SHARED)


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.core is ABSENT])
def test_a_core_cannot_be_added_to_a_method_without_cores(name: str) -> None:
    with pytest.raises(ConfigError, match="has no core") as caught:
        recipe_from({**SMALL, "method": {"name": name, "core": "personal"}})
    assert caught.value.field == "method.core"
    assert caught.value.hint == "Remove method.core, or choose a method that has one: colora."
    assert recipe_from({**SMALL, "method": {"name": name, "core": "absent"}}).row() == METHODS[name]


def test_steps_add_up() -> None:
    train = {"steps": 5, "personal_steps": 2, "shared_steps": 4, "final_steps": 3}
    joint = recipe_from({**SMALL, "train": train})
    alternating = recipe_from({**SMALL, "train": {**train, "schedule": "alternating"}})
    assert (joint.total_steps(7), alternating.total_steps(7)) == (2 * 5 + 3, 2 * (2 + 4) + 3)


def test_paths_in_a_site_file_start_at_its_folder(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    data = {"source": "rows.jsonl", "test_source": "absent.jsonl"}
    (tmp_path / "site.toml").write_text(tomli_w.dumps({"name": "ada", "data": data}))
    site = load_site(tmp_path / "site.toml")
    assert (site.data.source, site.data.test_source) == (str((tmp_path / "rows.jsonl").resolve()), "absent.jsonl")


def test_a_personal_head_is_fitted_by_request_and_in_a_transfer() -> None:
    probe, random, shared = {"head_init": "probe"}, {"head_init": "random"}, {"head": "shared"}
    recipe = recipe_from(SMALL)
    assert not recipe.probes_head
    assert with_base_model(recipe, "other").probes_head
    assert recipe_from({**SMALL, "train": probe}).probes_head
    assert not with_base_model(recipe_from({**SMALL, "train": random}), "other").probes_head
    assert not with_base_model(recipe_from({**SMALL, "method": shared}), "other").probes_head
    with pytest.raises(ConfigError, match=r'train.head_init = "probe" needs personal heads'):
        recipe_from({**SMALL, "train": probe, "method": shared})


def test_a_local_only_baseline_prepares_no_transfer() -> None:
    recipe = recipe_from({**SMALL, "transfer": {"prepare": True}})
    assert recipe.transfer.prepare
    assert not local_only(recipe).transfer.prepare


def _with_train(task: str = "classification", **train: Any) -> Recipe:
    site = {"name": "ada", "source": "a.csv", "task": task}
    return recipe_from({"name": "t", "rounds": 1, "model": {"source": "m"}, "site": [site], "train": train})


def test_a_warm_up_is_given_once() -> None:
    assert _with_train(warmup_ratio=0.1).train.warmup_ratio == 0.1
    with pytest.raises(ConfigError, match=r"both train.warmup_steps and train.warmup_ratio"):
        _with_train(warmup_ratio=0.1, warmup_steps=3)


@pytest.mark.parametrize("train", [{"class_weights": "balanced"}, {"label_smoothing": 0.1}])
def test_a_setting_of_labels_is_refused_where_no_site_has_labels(train: dict[str, Any]) -> None:
    assert _with_train("multilabel", **train)
    with pytest.raises(ConfigError, match="has no effect: no site of the recipe classifies texts"):
        _with_train("generation", **train)


@pytest.mark.parametrize(
    ("epochs", "examples", "steps"),
    [
        (1.0, 16, 4),
        (1.0, 17, 5),  # the last step begins the next pass
        (2.0, 6, 3),
        (0.5, 16, 2),
        (0.1, 40, 1),
        (0.28, 100, 7),  # 7.000000000000001 in floating point
        (3.0, 2, 3),  # a batch has no more examples than the site
        (1.0, 0, 0),
    ],
)
def test_epochs_give_the_steps_of_so_many_passes(epochs: float, examples: int, steps: int) -> None:
    train = TrainSettings(epochs=epochs, batch_size=4)
    assert train.steps_per_round(examples) == steps
    assert train.examples_per_round(examples) == steps * min(4, examples)
    assert dataclasses.replace(recipe_from(SMALL), rounds=3, train=train).total_steps(examples) == 3 * steps


def test_steps_and_epochs_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"sets both train\.steps and train\.epochs"):
        recipe_from({**SMALL, "train": {"steps": 5, "epochs": 1}})
    with pytest.raises(ConfigError, match=r'train\.epochs needs train\.schedule = "joint", not \'alternating\''):
        recipe_from({**SMALL, "train": {"schedule": "alternating", "epochs": 1}})
    with pytest.raises(ConfigError, match=r"train\.epochs"):
        recipe_from({**SMALL, "train": {"epochs": 0}})
    recipe = recipe_from({**SMALL, "train": {"epochs": 0.5}})
    assert recipe_from(to_dict(recipe)) == recipe  # as a run folder stores it
    assert recipe_from(SMALL).train.steps_per_round(1000) == 5


def test_a_delimiter_of_two_characters_is_told_what_it_must_be() -> None:
    raw = {**SMALL, "data": {**SMALL.get("data", {}), "delimiter": ";;"}}
    with pytest.raises(ConfigError, match=r"delimiter must be one character, not ';;'"):
        recipe_from(raw)


@pytest.mark.parametrize("name", METHODS)
def test_products_are_averaged_where_a_and_b_are_shared_without_scales(name: str) -> None:
    raw = {**SMALL, "method": {"name": name}, "server": {"aggregator": "product"}}
    if name in ("fedit", "colora", "local"):  # the last one shares nothing
        assert recipe_from(raw).server.aggregator == "product"
    else:
        with pytest.raises(ConfigError, match=f"'{name}' does not share just A and B"):
            recipe_from(raw)
