"""Micro-batches and small devices take the same optimizer step as whole batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from colora.client.data.selection import load_site_rows
from colora.client.training.adapted_model import attach_adapters
from colora.client.training.schedule import phases
from colora.client.training.state_store import StateStore
from colora.client.training.trainer import Trainer
from colora.common.adapters.initialization import initial_shared_state
from colora.common.config.loader import recipe_from
from colora.common.config.schema import to_json
from colora.common.config.site_schema import SiteSettings
from colora.common.errors import ConfigError, ModelError, RefusedError
from colora.common.methods import group_of
from colora.common.models.base_model import load_base_model
from colora.common.protocol.types import TrainRequest

SMALL = 3  # examples that fit on the small device


def one_round(raw: dict, folder: Path, room: int | None = None) -> dict[str, torch.Tensor]:
    """Return all trained values of the first site after a round, on a device with memory for ``room`` examples."""
    recipe = recipe_from(raw)
    site = recipe.site[0]
    base = load_base_model(recipe.plan.model, generates=site.data.task == "generation")
    trainer = Trainer(
        attach_adapters(base, recipe.plan),
        load_site_rows(SiteSettings(site.name, site.data), 0),
        StateStore(folder, recipe.name),
    )
    if room is not None:
        collate = trainer.task.collate

        def small(examples: Sequence[Any]) -> Any:
            if len(examples) > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return collate(examples)

        trainer.task.collate = small  # type: ignore[method-assign]
    shared = initial_shared_state(recipe.plan, 0)
    trainer.handle(TrainRequest(recipe.name, 1, "train", 0, to_json(recipe.plan), shared, False))
    return {key: p.detach().clone() for key, p in trainer.parameters.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classification", "generation"])
def test_micro_batches_and_a_small_device_take_the_same_step(
    kind: str, tiny_recipe: dict, generation_recipe: dict, tmp_path: Path
) -> None:
    raw = tiny_recipe if kind == "classification" else generation_recipe
    raw["train"] |= {"optimizer": "sgd", "lr": 0.5, "batch_size": 8, "steps": 3}
    whole = one_round(raw, tmp_path / "whole")
    small = one_round(raw, tmp_path / "small", SMALL)
    parts = one_round({**raw, "train": {**raw["train"], "micro_batch": 2}}, tmp_path / "parts")
    again = one_round({**raw, "train": {**raw["train"], "gradient_checkpointing": True}}, tmp_path / "again")
    for key, value in whole.items():
        for other in (small, parts, again):
            assert torch.allclose(other[key], value, atol=1e-5), key


def test_an_error_without_memory_for_one_example_says_what_to_lower(tiny_recipe: dict, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"too little memory .* Lower model.max_length, .* or adapter.rank"):
        one_round(tiny_recipe, tmp_path, 0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["classification", "generation"])
def test_a_half_precision_base_trains_adapters_in_fp32(
    precision: str, kind: str, tiny_recipe: dict, generation_recipe: dict, tmp_path: Path
) -> None:
    raw = tiny_recipe if kind == "classification" else generation_recipe
    raw["train"] |= {"optimizer": "sgd", "lr": 0.5, "steps": 3}
    raw["private"] = "multilora"
    full = one_round(raw, tmp_path / "full")
    half = one_round({**raw, "model": {**raw["model"], "precision": precision}}, tmp_path / "half")
    start = one_round({**raw, "train": {**raw["train"], "lr": 0.0}}, tmp_path / "start")
    for key, value in half.items():
        assert value.dtype == torch.float32
        moved = (full[key] - start[key]).norm()
        assert (value - full[key]).norm() <= 0.1 * moved + 1e-6, key


def test_the_kind_of_a_private_adapter_cannot_change(tiny_recipe: dict, tmp_path: Path) -> None:
    one_round({**tiny_recipe, "private": "lora"}, tmp_path)
    recipe = recipe_from({**tiny_recipe, "private": {"kind": "lora", "rank": 2}})
    site = recipe.site[0]
    rows = load_site_rows(SiteSettings(site.name, site.data), 0)
    other = Trainer(
        attach_adapters(load_base_model(recipe.model, generates=False), recipe.plan),
        rows,
        StateStore(tmp_path, recipe.name),
    )
    order = TrainRequest(recipe.name, 2, "train", 1, to_json(recipe.plan), initial_shared_state(recipe.plan, 0), False)
    with pytest.raises(RefusedError, match=r"site ada: The private adapter is .*rank 2.*state of round 1 has .*rank 4"):
        other.handle(order)


def test_phases_train_their_groups_and_no_others(tiny_recipe: dict) -> None:
    tiny_recipe["private"] = "lora"
    tiny_recipe["train"] |= {
        "schedule": "phases",
        "phase": [{"steps": 2, "groups": ["private"]}, {"steps": 3, "groups": ["A", "B", "head"]}],
        "final_steps": 4,
        "final_groups": ["core"],
    }
    recipe = recipe_from(tiny_recipe)
    assert recipe.train.steps_per_round(9) == 5
    assert recipe.total_steps(9) == 2 * 5 + 4
    live = ["q.lora_A.weight", "q.lora_B.weight", "q.lora_core", "private.q.lora_A.weight", "head.classifier.weight"]
    values = dict.fromkeys(live)
    first, second = phases(recipe.plan, recipe.row(), values, "train", examples=9)
    assert (first.steps, {group_of(k) for k in first.keys}) == (2, {"private"})
    assert (second.steps, {group_of(k) for k in second.keys}) == (3, {"A", "B", "head"})
    (last,) = phases(recipe.plan, recipe.row(), values, "finalize", examples=9)
    assert (last.steps, {group_of(k) for k in last.keys}) == (4, {"core"})


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"schedule": "phases"}, r'train.schedule = "phases" needs \[\[train.phase\]\] tables'),
        (
            {"phase": [{"steps": 1, "groups": ["A"]}]},
            r'\[\[train.phase\]\] tables need train.schedule = "phases", not .joint.',
        ),
        (
            {"schedule": "phases", "phase": [{"steps": 1, "groups": ["private"]}]},
            r"A phase trains none of its groups \(private\)",
        ),
        ({"final_groups": ["A"]}, "train.final_groups may name only personal groups of colora, and A is not one"),
    ],
)
def test_invalid_phases_are_refused(train: dict, message: str, tiny_recipe: dict) -> None:
    tiny_recipe["train"] |= train
    with pytest.raises(ConfigError, match=message):
        recipe_from(tiny_recipe)
