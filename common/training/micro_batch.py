"""Gradient accumulation over micro-batches, which are halved until they fit on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..tasks.base import Task

# Factor on the loss per precision of the base model, so that small fp16 gradients do not become zero. Powers of two are
# exact.
LOSS_SCALE = {"fp16": 1024.0}


def gradients(
    task: Task, optimizer: torch.optim.Optimizer, batches: Sequence[dict[str, torch.Tensor]]
) -> tuple[float, int]:
    """Accumulate the gradients of a batch over its micro-batches; return its mean loss and number of loss terms.

    The gradients equal those of the whole batch up to rounding, times ``LOSS_SCALE`` until they are applied.
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
    """Clip the gradients and take the optimizer step. A step whose fp16 gradients overflowed is skipped."""
    trained, scale = _with_gradients(optimizer), LOSS_SCALE.get(task.plan.model.precision, 1.0)
    if scale != 1:
        for parameter in trained:
            parameter.grad /= scale  # type: ignore[operator]
        if not all(bool(p.grad.isfinite().all()) for p in trained if p.grad is not None):
            return
    if max_grad_norm:
        nn.utils.clip_grad_norm_(trained, max_grad_norm)
    optimizer.step()


def _with_gradients(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


class MicroBatcher:
    """Takes optimizer steps in micro-batches of ``size`` examples, and halves the size when memory runs out."""

    def __init__(self, size: int | None) -> None:
        self.size = size

    def step(
        self, task: Task, optimizer: torch.optim.Optimizer, batch: Sequence[Any], max_grad_norm: float
    ) -> tuple[float, int]:
        """Take one optimizer step on a batch of examples; return its mean loss and number of loss terms.

        Raises ModelError if not even one example fits.
        """
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        while True:
            size, rng_state = self.size or len(batch), _rng_state()
            try:
                parts = [task.collate(batch[at : at + size]) for at in range(0, len(batch), size)]
                result = gradients(task, optimizer, parts)
                break
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
        apply_gradients(task, optimizer, max_grad_norm)
        return result


def _rng_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_rng_state(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
