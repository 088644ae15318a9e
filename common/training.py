"""The training loop: plain functions of (task, parameters, settings) that a notebook can call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .errors import ModelError
from .methods import group_of
from .seeds import seed_from
from .settings import TrainSettings
from .tasks.task import Task

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
OptimizerState = dict[str, torch.Tensor]  # "<parameter>/<name of the moment>" → value
LOSS_SCALE = {"fp16": 1024.0}  # keeps small gradients of a half-precision base above zero; a power of two is exact
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
    draws, fit = batch_indices(len(task.train.examples), settings.batch_size, stretch), MicroBatcher(settings.micro_batch)
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


def gradients(
    task: Task, optimizer: torch.optim.Optimizer, batches: Sequence[dict[str, torch.Tensor]]
) -> tuple[float, int]:
    """The gradients of a batch, of whose micro-batches they add up but for rounding; its mean loss and its terms.

    In half precision they are ``LOSS_SCALE`` times as large until they are applied.
    """
    optimizer.zero_grad(set_to_none=True)
    scale, total, terms, first = LOSS_SCALE.get(task.plan.model.precision, 1.0), 0.0, 0, 1
    for number, batch in enumerate(batches):
        loss, n = task.loss(batch)
        first = first if number else n
        factor = scale * n / first
        (loss if factor == 1 else loss * factor).backward()
        total, terms = total + float(loss.detach()) * n, terms + n
    if terms != first:
        for parameter in _with_gradients(optimizer):
            parameter.grad *= first / terms  # type: ignore[operator]
    return total / terms, terms


def apply_gradients(task: Task, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
    """Clips and takes the step; one whose gradients overflowed in half precision is left out."""
    live, scale = _with_gradients(optimizer), LOSS_SCALE.get(task.plan.model.precision, 1.0)
    if scale != 1:
        for parameter in live:
            parameter.grad /= scale  # type: ignore[operator]
        if not all(bool(p.grad.isfinite().all()) for p in live if p.grad is not None):
            return
    if max_grad_norm:
        nn.utils.clip_grad_norm_(live, max_grad_norm)
    optimizer.step()


def _with_gradients(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


class MicroBatcher:
    """Finds how many examples the device takes at once: halves them when its memory is not enough."""

    def __init__(self, size: int | None) -> None:
        self.size = size

    def step(
        self, task: Task, optimizer: torch.optim.Optimizer, chosen: Sequence[Any], max_grad_norm: float
    ) -> tuple[float, int]:
        """One optimiser step on these examples. Raises ModelError where not even one of them fits."""
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        while True:
            size, noise = self.size or len(chosen), _rng_state()
            try:
                parts = [task.collate(chosen[at : at + size]) for at in range(0, len(chosen), size)]
                done = gradients(task, optimizer, parts)
                break
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            optimizer.zero_grad(set_to_none=True)
            if min(size, len(chosen)) == 1:
                less = "model.max_length, model.precision or adapter.rank, or turn on train.gradient_checkpointing"
                raise ModelError("train.batch_size", "a device with room for one example", f"too little: lower {less}")
            self.size = (min(size, len(chosen)) + 1) // 2
            clear_device_cache(garbage_collection=True)
            _set_rng_state(noise)  # the same dropout again
        apply_gradients(task, optimizer, max_grad_norm)
        return done


def _rng_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_rng_state(noise: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(noise[0])
    if noise[1]:
        torch.cuda.set_rng_state_all(noise[1])


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
