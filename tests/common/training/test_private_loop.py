"""Differentially private training: the gradient of each example, its bound, and the noise."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from colora.client.data.selection import load_site_rows
from colora.client.training.adapted_model import attach_adapters
from colora.client.training.state_store import StateStore
from colora.client.training.trainer import Trainer
from colora.common.config.loader import load_site, recipe_from
from colora.common.config.schema import Plan, PrivateSettings
from colora.common.dataset import TASKS
from colora.common.methods import ABSENT, FROZEN, METHODS, PRIVATE_KINDS
from colora.common.models.base_model import load_base_model
from colora.common.training.loop import TrainCursor, TrainPhase
from colora.common.training.noise import NoiseSource
from colora.common.training.private_loop import PrivateLoop, example_gradients
from colora.simulation.partition import make_sites, write_site

CURSOR = TrainCursor(step=0, total=1, position=0, seed=1, noise=2)


def trainer_of(raw: dict, folder: Path, site: int = 0) -> Trainer:
    """The trainer of a recipe's site, with all parameters at random values."""
    recipe = recipe_from(raw)
    share = make_sites(recipe)[site]
    write_site(share, folder / "site")
    settings = load_site(folder / "site" / "site.toml")
    base = load_base_model(recipe.model, generates=TASKS[settings.data.task].needs_causal_lm)
    store = StateStore(folder / "state", recipe.name)
    trainer = Trainer(attach_adapters(base, recipe.plan), load_site_rows(settings, 0), store)
    trainer.model.select(trainer.private)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return trainer


def trained(trainer: Trainer) -> dict[str, torch.nn.Parameter]:
    return {k: p for k, p in trainer.parameters.items() if trainer.method.role(k) not in (FROZEN, ABSENT)}


def one_by_one(trainer: Trainer, examples: Any) -> list[dict[str, torch.Tensor]]:
    """The gradients of batches of one example."""
    found = []
    for example in examples:
        for parameter in trained(trainer).values():
            parameter.requires_grad_(True)
            parameter.grad = None
        trainer.task.loss(trainer.task.collate([example]))[0].backward()
        found.append({key: p.grad.clone() for key, p in trained(trainer).items() if p.grad is not None})
        for parameter in trained(trainer).values():
            parameter.requires_grad_(False)
            parameter.grad = None
    return found


@pytest.mark.parametrize("kind", PRIVATE_KINDS)
@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.shares])
def test_example_gradients_are_those_of_batches_of_one(
    tiny_recipe: dict, tmp_path: Path, method: str, kind: str
) -> None:
    trainer = trainer_of({**tiny_recipe, "method": {"name": method}, "private": kind}, tmp_path)
    examples = trainer.task.train.examples[:5]
    gradients, losses = example_gradients(trainer.task, trained(trainer), examples)
    expected = one_by_one(trainer, examples)
    assert gradients.keys() == expected[0].keys()
    for i, of_example in enumerate(expected):
        for key, gradient in of_example.items():
            assert float((gradients[key][i] - gradient).abs().max()) < 1e-6, key
    assert len(losses) == 5
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-3


@pytest.mark.parametrize("core", ["diagonal", "residual"])
def test_example_gradients_of_other_cores(tiny_recipe: dict, tmp_path: Path, core: str) -> None:
    trainer = trainer_of({**tiny_recipe, "adapter": {**tiny_recipe["adapter"], "core": core}}, tmp_path)
    examples = trainer.task.train.examples[:3]
    gradients, _ = example_gradients(trainer.task, trained(trainer), examples)
    for i, of_example in enumerate(one_by_one(trainer, examples)):
        assert max(float((gradients[k][i] - g).abs().max()) for k, g in of_example.items()) < 1e-6


@pytest.mark.parametrize("site", [0, 1], ids=["completions", "chats"])
def test_example_gradients_of_generation(generation_recipe: dict, tmp_path: Path, site: int) -> None:
    trainer = trainer_of({**generation_recipe, "private": "lora"}, tmp_path, site)
    examples = trainer.task.train.examples[:3]
    gradients, _ = example_gradients(trainer.task, trained(trainer), examples)
    for i, of_example in enumerate(one_by_one(trainer, examples)):
        assert max(float((gradients[k][i] - g).abs().max()) for k, g in of_example.items()) < 1e-6


class Everything(NoiseSource):
    """Draws every example and adds no noise."""

    def __init__(self) -> None:
        super().__init__("test")

    def sample(self, count: int, rate: float, step: int) -> list[int]:
        return list(range(count))

    def normal(self, count: int, step: int) -> np.ndarray:
        return np.zeros(count)


def step(trainer: Trainer, source: NoiseSource, *, noise: float = 1.0, max_norm: float = 0.1) -> dict[str, np.ndarray]:
    """Take one step of SGD with learning rate 1 and return how far the parameters moved, times the batch size."""
    parameters = trained(trainer)
    before = {key: p.detach().clone() for key, p in parameters.items()}
    settings = dataclasses.replace(
        trainer.plan.train, optimizer="sgd", lr=1.0, lr_schedule="constant", weight_decay=0.0
    )
    phase = TrainPhase(1, frozenset(parameters))
    PrivateLoop(noise, max_norm, source).train(trainer.task, parameters, [phase], settings, CURSOR)
    size = min(settings.batch_size, len(trainer.task.train.examples))
    moved = {key: (before[key] - p.detach()).double().numpy() * size for key, p in parameters.items()}
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(before[key])
    return moved


def norm(arrays: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(array).sum() for array in arrays.values())))


def test_one_example_changes_the_sum_by_at_most_the_bound(tiny_recipe: dict, tmp_path: Path) -> None:
    """Also an example whose gradient is a million times as large."""
    trainer = trainer_of(tiny_recipe, tmp_path)
    whole = step(trainer, Everything(), max_norm=0.1)
    task, encoded = trainer.task, trainer.task.train
    gradients = one_by_one(trainer, encoded.examples)
    assert min(norm({k: g.numpy() for k, g in each.items()}) for each in gradients) > 0.1, "all are clipped"
    for left_out in range(len(encoded.examples)):
        task.train = dataclasses.replace(
            encoded, examples=tuple(e for i, e in enumerate(encoded.examples) if i != left_out)
        )
        change = {key: whole[key] - value for key, value in step(trainer, Everything(), max_norm=0.1).items()}
        assert norm(change) == pytest.approx(0.1, rel=1e-3)
    task.train = encoded


def test_an_example_whose_gradient_is_not_finite_has_no_effect(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tiny_recipe, tmp_path)
    task, encoded = trainer.task, trainer.task.train
    loss_of, poisoned = task.loss_of, encoded.examples[3][0]

    def infinite(outputs: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        loss, terms = loss_of(outputs, batch)
        same = batch["input_ids"][0, : len(poisoned)].tolist() == list(poisoned)
        return (loss * float("inf") if same else loss), terms

    monkeypatch.setattr(task, "loss_of", infinite)
    moved = step(trainer, Everything())
    monkeypatch.setattr(task, "loss_of", loss_of)
    task.train = dataclasses.replace(encoded, examples=encoded.examples[:3] + encoded.examples[4:])
    without = step(trainer, Everything())
    assert all(np.isfinite(value).all() for value in moved.values())
    assert all(np.allclose(moved[key], without[key], atol=1e-6) for key in moved)


def test_the_noise_of_a_step_is_gaussian_and_has_the_promised_scale(tiny_recipe: dict, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_recipe, tmp_path)

    class Nothing(NoiseSource):
        def sample(self, count: int, rate: float, step: int) -> list[int]:
            return []

    moved = step(trainer, Nothing("a"), noise=3.0, max_norm=0.5)
    noise = np.concatenate([value.ravel() for value in moved.values()]) / 1.5
    assert len(noise) > 500
    assert stats.kstest(noise, "norm").pvalue > 0.01


def test_numbers_of_a_source_are_normal_repeat_and_depend_on_every_part() -> None:
    source = NoiseSource("secret", "site", "request")
    numbers = source.normal(200_000, step=3)
    assert stats.kstest(numbers, "norm").pvalue > 0.01
    assert numbers.std() == pytest.approx(1.0, abs=0.01)
    assert np.array_equal(numbers, NoiseSource("secret", "site", "request").normal(200_000, step=3))
    others = (source.normal(1000, step=4), NoiseSource("other", "site", "request").normal(1000, step=3))
    for other in others:
        assert abs(np.corrcoef(numbers[:1000], other)[0, 1]) < 0.15


def test_each_example_is_drawn_with_the_rate_independently() -> None:
    source, steps = NoiseSource("secret"), 4000
    drawn = np.zeros((steps, 10))
    for number in range(steps):
        drawn[number, source.sample(10, 0.3, number)] = 1
    assert drawn.mean(0) == pytest.approx(np.full(10, 0.3), abs=0.03)
    sizes = drawn.sum(1)
    assert sizes.var() == pytest.approx(10 * 0.3 * 0.7, rel=0.1)  # a fixed batch size would have none
    assert np.abs(np.corrcoef(drawn.T) - np.eye(10)).max() < 0.06


def test_counts_of_a_reply_do_not_tell_how_many_examples_were_drawn(tiny_recipe: dict, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_recipe, tmp_path)
    plan: Plan = trainer.plan
    phase = TrainPhase(3, frozenset(trained(trainer)))
    outcomes = {
        (outcome.terms, outcome.examples, outcome.applied)
        for seed in range(5)
        for outcome in [
            PrivateLoop(1.0, 1.0, NoiseSource(seed)).train(
                trainer.task, trained(trainer), [phase], plan.train, dataclasses.replace(CURSOR, total=3)
            )
        ]
    }
    assert outcomes == {(12, 12, 3)}
    assert plan.private == PrivateSettings("none")
