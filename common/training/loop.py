"""The training loop: plain functions of (task, parameters, settings) that a notebook can call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..config.schema import TrainSettings
from ..methods import group_of
from ..seeds import seed_from
from ..tasks.base import Task
from .micro_batch import MicroBatcher

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
OptimizerState = dict[str, torch.Tensor]  # "<parameter>/<name of the moment>" → value
StepCallback = Callable[[int, int], None]  # (steps done, steps of the round); what it raises ends the training


@dataclass(frozen=True)
class TrainPhase:
    """``steps`` optimiser steps on the parameters named by ``keys``; all others stand still."""

    steps: int
    keys: frozenset[str]


@dataclass(frozen=True)
class TrainOutcome:
    """What a run of phases did. ``terms`` are loss terms: answer tokens, or labelled texts."""

    loss: float
    terms: int
    examples: int
    optimizer_state: OptimizerState = field(default_factory=dict)


@dataclass(frozen=True)
class TrainCursor:
    """Where a site stands: ``step`` of ``total`` global optimiser steps, ``position`` examples already drawn.

    ``moments`` are the optimiser's, where it goes on with those of the round before.
    """

    step: int
    total: int
    position: int
    seed: int  # of the site: the order of its data
    noise: int  # of the site and round: dropout
    moments: Mapping[str, torch.Tensor] | None = None


def train(
    task: Task,
    parameters: Mapping[str, nn.Parameter],
    phases: Sequence[TrainPhase],
    settings: TrainSettings,
    stretch: TrainCursor,
    watch: StepCallback | None = None,
) -> TrainOutcome:
    """Trains ``parameters`` in place, phase after phase, from where ``stretch`` says.

    Data order: epoch e is a permutation seeded by (site, e), and ``position`` moves on from round to round, so no
    round repeats the last one's examples. The learning rate follows the global step. ``watch`` is called at the start
    and after each step.
    """
    optimizer = make_optimizer(parameters, settings)
    if stretch.moments:
        _load_optimizer_state(optimizer, parameters, stretch.moments)
    factor = lr_factor(settings, stretch.total)
    rates = [group["lr"] for group in optimizer.param_groups]
    draws, fit = (
        batch_indices(len(task.train.examples), settings.batch_size, stretch),
        MicroBatcher(settings.micro_batch),
    )
    step, loss_sum, terms, examples = stretch.step, 0.0, 0, 0
    planned, watch = sum(phase.steps for phase in phases), watch or (lambda done, total: None)
    watch(0, planned)
    with torch.random.fork_rng():
        torch.manual_seed(stretch.noise)
        task.module.train()
        for phase in phases:
            _train_only(parameters, phase.keys)
            for _ in range(phase.steps):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor(step)
                chosen = [task.train.examples[i] for i in next(draws)]
                loss, n = fit.step(task, optimizer, chosen, settings.max_grad_norm)
                step, loss_sum, terms, examples = (
                    step + 1,
                    loss_sum + loss * n,
                    terms + n,
                    examples + len(chosen),
                )
                watch(step - stretch.step, planned)
    _train_only(parameters, frozenset())
    kept = _save_optimizer_state(optimizer, parameters) if settings.persist_optimizer_state else {}
    return TrainOutcome(loss_sum / terms if terms else float("nan"), terms, examples, kept)


def make_optimizer(parameters: Mapping[str, nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """One optimiser with a learning rate a group: A and B, core, private, head. MultiLoRA's scales never decay."""
    rates = {"core": settings.core_lr, "head": settings.head_lr, "private": settings.private_lr}
    kinds = {key: (group_of(key), key.endswith("lora_scale")) for key in parameters}
    groups = []
    for kind in dict.fromkeys(kinds.values()):
        rate, decay = rates.get(kind[0]), 0.0 if kind[1] else settings.weight_decay
        mine = [parameters[key] for key in parameters if kinds[key] == kind]
        groups.append({"params": mine, "lr": settings.lr if rate is None else rate, "weight_decay": decay})
    return OPTIMIZERS[settings.optimizer](groups, weight_decay=settings.weight_decay)  # type: ignore[call-arg]


def lr_factor(settings: TrainSettings, total: int) -> Any:
    """Global step → factor on the learning rate: transformers' schedules by their usual names."""
    from transformers import get_scheduler

    carrier = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler: Any = get_scheduler(settings.lr_schedule, carrier, settings.warmup_steps, total)
    return scheduler.lr_lambdas[0]


def batch_indices(examples: int, batch_size: int, stretch: TrainCursor) -> Iterator[list[int]]:
    """Endless batches of example indices, from ``stretch.position`` on; epochs run into each other."""
    position, batch_size = stretch.position, min(batch_size, examples)
    orders: dict[int, list[int]] = {}

    def index(at: int) -> int:
        epoch, offset = divmod(at, examples)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed_from(stretch.seed, "epoch", epoch))
            orders[epoch] = torch.randperm(examples, generator=generator).tolist()
            orders.pop(epoch - 2, None)
        return orders[epoch][offset]

    while True:
        yield [index(at) for at in range(position, position + batch_size)]
        position += batch_size


def _train_only(parameters: Mapping[str, nn.Parameter], keys: frozenset[str]) -> None:
    for key, parameter in parameters.items():
        parameter.requires_grad_(key in keys)
        parameter.grad = None


def _save_optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> OptimizerState:
    return {
        f"{key}/{name}": value.detach().to("cpu", copy=True)
        for key, parameter in parameters.items()
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def _load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    moments: Mapping[str, torch.Tensor],
) -> None:
    for full, value in moments.items():
        key, _, name = full.rpartition("/")
        parameter = parameters[key]
        device = "cpu" if name == "step" else parameter.device
        optimizer.state[parameter][name] = value.to(device, copy=True)
