"""DP-SGD (Abadi et al. 2016, arXiv 1607.00133): training with clipped and noised gradients of single examples.

An example is a "site" of ``adapters/stacked.py``: with one copy of the parameters for each example, the gradient of the
copies is the gradient of each example, for every method and every form of adapter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from ..adapters.stacked import NotStackable, stacked
from ..config.schema import TrainSettings
from ..errors import ModelError
from ..tasks.base import Task
from .loop import (
    StepCallback,
    TrainCursor,
    TrainOutcome,
    TrainPhase,
    make_optimizer,
    save_optimizer_state,
    scheduled_steps,
)
from .noise import NoiseSource
from .stacked_loop import SiteTraining, compare_outputs, rows_of

Gradients = dict[str, torch.Tensor]


@dataclass
class PrivateLoop:
    """A training loop with the arguments of ``loop.train``.

    A step draws each example with the probability batch size / examples, clips each one's gradient to
    ``max_grad_norm`` over all trained parameters, sums them, adds noise of standard deviation ``noise_multiplier`` ·
    ``max_grad_norm``, and divides by the batch size.
    """

    noise_multiplier: float
    max_grad_norm: float
    source: NoiseSource

    def train(
        self,
        task: Task,
        parameters: Mapping[str, nn.Parameter],
        phases: Sequence[TrainPhase],
        settings: TrainSettings,
        cursor: TrainCursor,
        callback: StepCallback | None = None,
    ) -> TrainOutcome:
        """Train ``parameters`` in place. The result counts the expected number of examples, not those drawn."""
        examples, losses, total = task.train.examples, [], sum(phase.steps for phase in phases)
        batch_size = min(settings.batch_size, len(examples))
        optimizer = make_optimizer(parameters, settings, cursor.moments)
        with torch.random.fork_rng():
            torch.manual_seed(cursor.noise)
            task.module.train()
            for phase, step in scheduled_steps(optimizer, parameters, phases, settings, cursor, callback):
                trained = {key: parameters[key] for key in sorted(phase.keys)}
                drawn = self.source.sample(len(examples), batch_size / len(examples), step)
                gradients, of_examples = self._sum(task, trained, [examples[i] for i in drawn], settings)
                losses += of_examples
                self._set_noised(trained, gradients, batch_size, step)
                optimizer.step()
        state = save_optimizer_state(optimizer, parameters) if settings.persist_optimizer_state else {}
        losses = [loss for loss in losses if math.isfinite(loss)]  # an infinite one must not refuse the round
        loss = sum(losses) / len(losses) if losses else 0.0
        expected = total * batch_size
        return TrainOutcome(loss, expected, expected, state, total, total)

    def _sum(
        self, task: Task, trained: Mapping[str, nn.Parameter], examples: Sequence[Any], settings: TrainSettings
    ) -> tuple[Gradients, list[float]]:
        """The sum of the examples' clipped gradients, and the losses.

        At most ``micro_batch`` examples are computed at once, and fewer if they do not fit into memory.
        """
        total: Gradients = {key: torch.zeros_like(parameter) for key, parameter in trained.items()}
        losses: list[float] = []
        size, start = settings.micro_batch or 2 * settings.batch_size, 0
        while start < len(examples):
            try:
                gradients, of_chunk = example_gradients(task, trained, examples[start : start + size])
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or size == 1:
                    raise
                clear_device_cache(garbage_collection=True)
                size = (size + 1) // 2
                continue
            start += size
            factors = _clip_factors(gradients, self.max_grad_norm)
            for key, gradient in gradients.items():
                # an infinite gradient has the factor 0, and 0 · ∞ is not 0
                total[key] += torch.tensordot(factors, gradient.nan_to_num(0.0, 0.0, 0.0), dims=1)
            losses += of_chunk
        return total, losses

    def _set_noised(self, trained: Mapping[str, nn.Parameter], total: Gradients, batch_size: int, step: int) -> None:
        """Set the gradients of a step: the sum and noise, divided by the expected number of examples."""
        counts = [parameter.numel() for parameter in trained.values()]
        noise = torch.from_numpy(self.source.normal(sum(counts), step) * self.noise_multiplier * self.max_grad_norm)
        for (key, parameter), part in zip(trained.items(), noise.split(counts), strict=True):
            parameter.grad = (total[key] + part.reshape(parameter.shape).to(total[key])) / batch_size


def example_gradients(
    task: Task, trained: Mapping[str, nn.Parameter], examples: Sequence[Any]
) -> tuple[Gradients, list[float]]:
    """The gradient of each example's loss, shape (examples, …) for each parameter, and the losses."""
    copies = {key: nn.Parameter(p.detach().expand(len(examples), *p.shape)) for key, p in trained.items()}
    with stacked(task.module, trained, copies):
        batch = task.collate(examples)
        outputs = task.outputs(batch)
        losses = torch.stack([task.loss_of(outputs[i : i + 1], rows_of(batch, i, 1))[0] for i in range(len(examples))])
        losses.sum().backward()
    gradients = {key: torch.zeros_like(c) if c.grad is None else c.grad for key, c in copies.items()}
    return gradients, losses.tolist()


def _clip_factors(gradients: Gradients, max_norm: float) -> torch.Tensor:
    """The factor (examples,) that limits the norm of each example's gradient; 0 for one that is not finite."""
    norms = torch.stack([g.flatten(1).double().norm(dim=1) for g in gradients.values()]).norm(dim=0)
    factors = (max_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
    return torch.where(norms.isfinite(), factors, 0.0).to(next(iter(gradients.values())).dtype)


def check_separable(task: Task, parameters: Mapping[str, nn.Parameter], settings: TrainSettings) -> None:
    """Check that an example's outputs do not depend on the others in its batch, nor on padding.

    The examples are made up and the values random: whether the check fails tells nothing of the site's rows. The
    parameters stay as they are. Raises ModelError, since the norm of one example's gradient would otherwise not bound
    its influence.
    """
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    zero = {key: torch.zeros_like(value) for key, value in before.items()}
    cursor = TrainCursor(0, 1, 0, 0, 0)
    copy = SiteTraining(task, parameters, (), settings, cursor, None, parameters=parameters, values=zero)
    try:
        compare_outputs([copy, copy], [[example] for example in task.made_up()])
    except NotStackable as error:
        raise ModelError(
            "privacy",
            "a model that computes each example by itself",
            str(error),
            message=f"Differential privacy is not possible with this model: {error}.",
            hint="Use another base model, or remove [privacy].",
        ) from None
    finally:
        dataclasses.replace(copy, values=before).load()
