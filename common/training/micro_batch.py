"""Gradient accumulation over micro-batches, which are halved until they fit on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..tasks.base import Task

LOSS_SCALE = 1024.0  # first factor on the loss with fp16, so that small gradients do not become zero; a power of two
MIN_LOSS_SCALE = 2.0**-10  # a step whose gradients overflow at this scale is given up


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Return a dynamic loss scale for fp16, which is halved when gradients overflow; it does nothing otherwise."""
    return torch.amp.GradScaler(device.type, init_scale=LOSS_SCALE, enabled=precision == "fp16")


def gradients(
    task: Task,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[dict[str, torch.Tensor]],
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[float, int]:
    """Accumulate the gradients of a batch over its micro-batches; return its mean loss and number of loss terms.

    The gradients equal those of the whole batch up to rounding, times the loss scale until they are applied.
    """
    optimizer.zero_grad(set_to_none=True)
    total, terms, first = 0.0, 0, 1
    for number, batch in enumerate(batches):
        loss, n = task.loss(batch)
        first = first if number else n
        weighted = loss if n == first else loss * (n / first)
        (scaler.scale(weighted) if scaler else weighted).backward()
        total, terms = total + float(loss.detach()) * n, terms + n
    if terms != first:
        for parameter in _with_gradients(optimizer):
            parameter.grad *= first / terms  # type: ignore[operator]
    return total / terms, terms


def apply_gradients(
    optimizer: torch.optim.Optimizer, max_grad_norm: float, scaler: torch.amp.GradScaler | None = None
) -> bool:
    """Clip the gradients and take the optimizer step. Returns False for a step whose fp16 gradients overflowed.

    Such a step changes nothing but the loss scale.
    """
    if scaler is None or not scaler.is_enabled():
        _clip(optimizer, max_grad_norm)
        optimizer.step()
        return True
    before = scaler.get_scale()
    scaler.unscale_(optimizer)
    _clip(optimizer, max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= before


def _clip(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
    if max_grad_norm:
        nn.utils.clip_grad_norm_(_with_gradients(optimizer), max_grad_norm)


def _with_gradients(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: mean loss, number of loss terms, attempts whose fp16 gradients overflowed, and success."""

    loss: float
    terms: int
    overflows: int = 0
    applied: bool = True


class MicroBatcher:
    """Takes optimizer steps in micro-batches of ``size`` examples, and halves the size when memory runs out.

    With fp16 a step whose gradients overflow is repeated at half the loss scale, with the same dropout masks.
    """

    def __init__(self, size: int | None, scaler: torch.amp.GradScaler | None = None) -> None:
        self.size, self.scaler = size, scaler

    def step(
        self, task: Task, optimizer: torch.optim.Optimizer, batch: Sequence[Any], max_grad_norm: float
    ) -> StepResult:
        """Take one optimizer step on a batch of examples.

        The step is given up when the loss is not finite or the loss scale reaches ``MIN_LOSS_SCALE``. Raises ModelError
        if not even one example fits.
        """
        overflows, start = 0, _rng_state()
        while True:
            loss, terms = self._gradients(task, optimizer, batch)
            if apply_gradients(optimizer, max_grad_norm, self.scaler):
                return StepResult(loss, terms, overflows)
            overflows += 1
            if not math.isfinite(loss) or self.scaler is None or self.scaler.get_scale() < MIN_LOSS_SCALE:
                optimizer.zero_grad(set_to_none=True)
                return StepResult(loss, terms, overflows, applied=False)
            _set_rng_state(start)

    def _gradients(self, task: Task, optimizer: torch.optim.Optimizer, batch: Sequence[Any]) -> tuple[float, int]:
        """Accumulate the gradients of a batch in micro-batches that fit into memory."""
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        while True:
            size, rng_state = self.size or len(batch), _rng_state()
            try:
                parts = [task.collate(batch[at : at + size]) for at in range(0, len(batch), size)]
                return gradients(task, optimizer, parts, self.scaler)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            optimizer.zero_grad(set_to_none=True)
            if min(size, len(batch)) == 1:
                raise ModelError(
                    "train.batch_size",
                    "memory for one example",
                    "too little memory",
                    message="The device has too little memory to train on one example.",
                    hint="Lower model.max_length, model.precision or adapter.rank, or set gradient_checkpointing.",
                )
            self.size = (min(size, len(batch)) + 1) // 2
            clear_device_cache(garbage_collection=True)
            _set_rng_state(rng_state)  # for the same dropout masks


def _rng_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_rng_state(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
