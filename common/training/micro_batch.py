"""Gradient accumulation over micro-batches that shrink until they fit on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..tasks.base import Task

LOSS_SCALE = {"fp16": 1024.0}  # keeps small gradients of a half-precision base above zero; a power of two is exact


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
