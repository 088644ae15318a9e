"""The training loop: functions of (task, parameters, settings) that a notebook can call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..config.schema import TrainSettings
from ..methods import group_of
from ..seeds import seed_from
from ..tasks.base import Task
from .micro_batch import MicroBatcher, StepResult, make_scaler

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
OptimizerState = dict[str, torch.Tensor]  # "<parameter>/<entry of the optimizer>" → value
StepCallback = Callable[[int, int], None]  # (steps done, steps of the round); an exception from it ends the training


@dataclass(frozen=True)
class TrainPhase:
    """``steps`` optimizer steps on the parameters in ``keys``. All others are frozen."""

    steps: int
    keys: frozenset[str]


@dataclass(frozen=True)
class TrainOutcome:
    """Result of training: mean loss per loss term, and counts of loss terms (tokens or labelled texts) and examples.

    ``loss`` and ``terms`` are those of the applied steps. ``steps`` were asked for and ``applied`` of them were taken;
    with fp16, ``overflows`` attempts were left out since their gradients overflowed.
    """

    loss: float
    terms: int
    examples: int
    optimizer_state: OptimizerState = field(default_factory=dict)
    steps: int = 0
    applied: int = 0
    overflows: int = 0


@dataclass(frozen=True)
class TrainCursor:
    """Position of a site in its training: ``step`` of ``total`` optimizer steps, after ``position`` examples.

    ``moments`` is the optimizer state of the previous round, if it is kept.
    """

    step: int
    total: int
    position: int
    seed: int  # seed of the site, for the order of its examples
    noise: int  # seed of the site and round, for dropout
    moments: Mapping[str, torch.Tensor] | None = None


def train(
    task: Task,
    parameters: Mapping[str, nn.Parameter],
    phases: Sequence[TrainPhase],
    settings: TrainSettings,
    cursor: TrainCursor,
    callback: StepCallback | None = None,
) -> TrainOutcome:
    """Train ``parameters`` in place, one phase after the other, from the position of ``cursor``.

    Epoch e is a permutation of the examples, seeded by (site, e). ``position`` continues from round to round, so that a
    round does not repeat the examples of the previous one. The learning rate follows the global step. ``callback`` is
    called before the first step and after each step.
    """
    optimizer = make_optimizer(parameters, settings, cursor.moments)
    batches = batch_indices(len(task.train.examples), settings.batch_size, cursor)
    precision, device = task.plan.model.precision, task.base.device
    micro_batcher = MicroBatcher(settings.micro_batch, make_scaler(precision, device))
    results, examples = [], 0
    with torch.random.fork_rng():
        torch.manual_seed(cursor.noise)
        task.module.train()
        for _ in scheduled_steps(optimizer, parameters, phases, settings, cursor, callback):
            batch = [task.train.examples[i] for i in next(batches)]
            results.append(micro_batcher.step(task, optimizer, batch, settings.max_grad_norm))
            examples += len(batch)
    state = save_optimizer_state(optimizer, parameters) if settings.persist_optimizer_state else {}
    return outcome(results, examples, state)


def scheduled_steps(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    phases: Sequence[TrainPhase],
    settings: TrainSettings,
    cursor: TrainCursor,
    callback: StepCallback | None,
) -> Iterator[tuple[TrainPhase, int]]:
    """Yield (phase, global step) for each optimizer step that the caller takes.

    The learning rates are those of the step, and only the parameters of the phase are trainable. ``callback`` is called
    before the first step and after each step.
    """
    factor, rates = lr_factor(settings, cursor.total), [group["lr"] for group in optimizer.param_groups]
    step, total = cursor.step, sum(phase.steps for phase in phases)
    callback = callback or (lambda done, total: None)
    callback(0, total)
    for phase in phases:
        train_only(parameters, phase.keys)
        for _ in range(phase.steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor(step)
            yield phase, step
            step += 1
            callback(step - cursor.step, total)
    train_only(parameters, frozenset())


def outcome(results: Sequence[StepResult], examples: int, state: OptimizerState) -> TrainOutcome:
    """Return the result of these steps."""
    applied = [result for result in results if result.applied]
    loss_sum, terms = sum(result.loss * result.terms for result in applied), sum(result.terms for result in applied)
    overflows = sum(result.overflows for result in results)
    loss = loss_sum / terms if terms else float("nan")
    return TrainOutcome(loss, terms, examples, state, len(results), len(applied), overflows)


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], settings: TrainSettings, moments: Mapping[str, torch.Tensor] | None = None
) -> torch.optim.Optimizer:
    """Return an optimizer with a learning rate per parameter group: A and B, core, private, head.

    Weight decay does not apply to MultiLoRA's scales. The optimizer's tensors are copies of ``moments``, if there are
    any.
    """
    rates = {"core": settings.core_lr, "head": settings.head_lr, "private": settings.private_lr}
    kinds = {key: (group_of(key), key.endswith("lora_scale")) for key in parameters}
    groups = []
    for kind in dict.fromkeys(kinds.values()):
        rate, decay = rates.get(kind[0]), 0.0 if kind[1] else settings.weight_decay
        members = [parameters[key] for key in parameters if kinds[key] == kind]
        groups.append({"params": members, "lr": settings.lr if rate is None else rate, "weight_decay": decay})
    optimizer = OPTIMIZERS[settings.optimizer](groups, weight_decay=settings.weight_decay)  # type: ignore[call-arg]
    _load_state(optimizer, parameters, moments or {})
    return optimizer


def lr_factor(settings: TrainSettings, total: int) -> Any:
    """Return a function from the global step to the factor on the learning rate, from Transformers' schedules."""
    from transformers import get_scheduler

    carrier = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * total)
    scheduler: Any = get_scheduler(settings.lr_schedule, carrier, warmup, total)
    return scheduler.lr_lambdas[0]


def batch_indices(examples: int, batch_size: int, cursor: TrainCursor) -> Iterator[list[int]]:
    """Yield batches of example indices without end, from ``cursor.position`` on. A batch can span two epochs."""
    position, batch_size = cursor.position, min(batch_size, examples)
    orders: dict[int, list[int]] = {}

    def index(at: int) -> int:
        epoch, offset = divmod(at, examples)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed_from(cursor.seed, "epoch", epoch))
            orders[epoch] = torch.randperm(examples, generator=generator).tolist()
            orders.pop(epoch - 2, None)
        return orders[epoch][offset]

    while True:
        yield [index(at) for at in range(position, position + batch_size)]
        position += batch_size


def train_only(parameters: Mapping[str, nn.Parameter], keys: frozenset[str]) -> None:
    """Freeze all parameters but those in ``keys``, and drop all gradients."""
    for key, parameter in parameters.items():
        parameter.requires_grad_(key in keys)
        parameter.grad = None


def save_optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> OptimizerState:
    """Return copies of the optimizer's tensors, on the CPU."""
    return {
        f"{key}/{name}": value.detach().to("cpu", copy=True)
        for key, parameter in parameters.items()
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def _load_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    moments: Mapping[str, torch.Tensor],
) -> None:
    for full, value in moments.items():
        key, _, name = full.rpartition("/")
        parameter = parameters[key]
        device = "cpu" if name == "step" else parameter.device
        optimizer.state[parameter][name] = value.to(device, copy=True)
