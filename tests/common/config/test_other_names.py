"""Names that other tools use are no keys, and their errors suggest the key that is meant."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from colora.common.config.diagnostics import _paths
from colora.common.config.loader import recipe_from, with_overrides
from colora.common.config.other_names import OTHER_NAMES
from colora.common.config.schema import Recipe
from colora.common.config.site_schema import SiteSettings
from colora.common.errors import ConfigError
from colora.common.methods import ALSO_CALLED, METHODS

RAW: dict[str, Any] = {
    "name": "x",
    "rounds": 1,
    "model": {"source": "m"},
    "site": [{"name": "north", "source": "a.csv"}, {"name": "north.b", "source": "b.csv"}],
}


def message(**changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        recipe_from({**copy.deepcopy(RAW), **changes})
    return str(error.value)


def test_every_suggestion_is_a_key_and_no_other_name_is_one_beside_it() -> None:
    keys = {*_paths(Recipe), *_paths(SiteSettings)}
    assert set(OTHER_NAMES.values()) <= keys
    beside = {name: key.rpartition(".")[0] for name, key in OTHER_NAMES.items()}
    assert not keys & {f"{table}.{name}".lstrip(".") for name, table in beside.items()}
    assert set(ALSO_CALLED.values()) <= set(METHODS)
    assert not set(ALSO_CALLED) & set(METHODS)


@pytest.mark.parametrize(
    ("changes", "suggested"),
    [
        ({"lr": 1e-3}, "train.lr"),
        ({"learning_rate": 1e-3}, "train.lr"),
        ({"train": {"learning_rate": 1e-3}}, "lr"),
        ({"server": {"learning_rate": 1e-3}}, "lr"),
        ({"epochs": 3}, "train.epochs"),
        ({"num_train_epochs": 3}, "train.epochs"),
        ({"train": {"local_epochs": 3}}, "epochs"),
        ({"batch": 8}, "train.batch_size"),
        ({"lora_r": 8}, "adapter.rank"),
        ({"text": "body"}, "data.text"),
        ({"site": [{"name": "north", "file": "a.csv"}]}, "source"),
        ({"rouds": 3}, "rounds"),
        ({"method": {"name": "FedAvg"}}, "fedit"),
    ],
)
def test_another_name_and_a_key_of_another_table_suggest_the_key(changes: dict, suggested: str) -> None:
    assert f"Did you mean '{suggested}'?" in message(**changes)


def test_a_text_for_a_table_shows_how_it_is_written() -> None:
    assert message(method="fedavg").endswith('Write method.name = "fedit", or a table [method].')
    assert message(model="bert").endswith('Write model.source = "bert", or a table [model].')
    assert message(data="a.csv").endswith('Write data.source = "a.csv", or a table [data].')


def test_an_override_reaches_into_a_sites_table() -> None:
    raw = with_overrides(copy.deepcopy(RAW), ("site.north.train=16", "site.north.b.test=8"))
    recipe = recipe_from(raw)
    assert [(site.data.train, site.data.test) for site in recipe.site] == [(16, None), (None, 8)]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("site.nort.train=8", "there is no site 'nort'. Did you mean 'north'? The sites are north, north.b."),
        ("site.north=8", "names no key of the site. Write for example --set site.north.train=16."),
    ],
)
def test_an_override_of_no_site_or_no_key_is_refused(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        with_overrides(copy.deepcopy(RAW), (override,))
    assert str(error.value).endswith(told)
