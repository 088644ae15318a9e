"""PEFT's names of the adapter's keys are read, and what does not fit is refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from colora.common.config.loader import load_site, recipe_from, with_overrides
from colora.common.config.schema import to_dict
from colora.common.errors import ConfigError

SITES = [{"name": "ada", "source": "a.csv"}]


def recipe(adapter: dict[str, Any], **more: Any) -> Any:
    return recipe_from({"name": "p", "rounds": 1, "model": {"source": "m"}, "site": SITES, "adapter": adapter, **more})


def test_both_spellings_are_the_same_recipe() -> None:
    theirs = {"r": 4, "lora_alpha": 6.0, "lora_dropout": 0.1, "use_rslora": True, "init_lora_weights": "gaussian"}
    ours = {"rank": 4, "alpha": 6.0, "dropout": 0.1, "rslora": True, "init": "gaussian"}
    assert recipe(theirs) == recipe(ours)
    assert recipe(theirs).identity == recipe(ours).identity
    assert to_dict(recipe(theirs))["adapter"]["rank"] == 4, "a run folder has one spelling"


def test_defaults_of_peft_may_be_written() -> None:
    assert recipe({"init_lora_weights": True, "use_dora": False}) == recipe({})


def test_the_private_adapter_is_read_alike_in_a_recipe_at_a_site_and_in_a_site_file(tmp_path: Path) -> None:
    table = {"kind": "lora", "r": 2, "lora_alpha": 3.0}
    assert recipe({}, private=table).private.rank == 2
    assert recipe({}, site=[{**SITES[0], "private": table}]).site[0].private.alpha == 3.0
    path = tmp_path / "site.toml"
    path.write_text('name = "ada"\n[data]\nsource = "a.csv"\n[private]\nkind = "lora"\nr = 2\n')
    private = load_site(path).private
    assert private is not None
    assert private.rank == 2


@pytest.mark.parametrize(
    ("adapter", "part"),
    [
        ({"r": 4, "rank": 4}, "adapter has both rank and r, which are two names of one key"),
        ({"lora_alpha": 4.0, "alpha": 8.0}, "adapter has both alpha and lora_alpha"),
        ({"init_lora_weights": True, "init": "kaiming"}, "adapter has both init and init_lora_weights"),
        ({"use_dora": True}, "adapter.use_dora is not possible: it scales the columns"),
        ({"init_lora_weights": "pissa"}, "it subtracts a part of the base model's weights"),
        ({"init_lora_weights": "pissa_niter_16"}, "it subtracts a part of the base model's weights"),
        ({"init_lora_weights": "olora"}, "adapter.init_lora_weights = 'olora' is not possible"),
        ({"init_lora_weights": "eva"}, "it is computed from data"),
        (
            {"init_lora_weights": False},
            "init_lora_weights = false is not possible: the untrained adapter would change the output",
        ),
        ({"init_lora_weights": "nonsense"}, "must be true, 'gaussian' or 'orthogonal', not 'nonsense'"),
        ({"init": "orthogonal", "rank": 3}, 'adapter.init = "orthogonal" needs even ranks, not 3'),
        ({"init": "orthogonal", "rank_pattern": {"query": 5}}, "needs even ranks, not 5"),
        ({"r": "four"}, "adapter.rank must be a valid integer, not 'four'"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(adapter: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(adapter)
    assert part in str(caught.value)


def test_an_override_in_the_other_spelling_is_refused_too() -> None:
    raw = {"name": "p", "rounds": 1, "model": {"source": "m"}, "site": SITES, "adapter": {"rank": 4}}
    with pytest.raises(ConfigError, match="both rank and r"):
        recipe_from(with_overrides(raw, ("adapter.r=8",)))


def test_scales_have_a_start_of_their_own() -> None:
    with pytest.raises(ConfigError, match="not possible with the scales of 'multilora'"):
        recipe({"init": "orthogonal"}, method={"name": "multilora"})
