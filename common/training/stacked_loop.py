"""The training loop for several sites at once: one forward and backward pass for the batches of all of them.

Each site keeps its own loss, gradient norm, optimizer state and order of examples, so the result is that of
``loop.train`` for one site after the other, up to rounding and dropout masks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from ..adapters.stacked import NotStackable, stacked
from ..config.schema import TrainSettings
from ..seeds import seed_from
from ..tasks.base import Batch, Task
from .loop import (
    StepCallback,
    TrainCursor,
    TrainOutcome,
    TrainPhase,
    batch_indices,
    make_optimizer,
    outcome,
    save_optimizer_state,
    scheduled_steps,
)
from .micro_batch import StepResult

TRIAL_NOISE, AGREEMENT = (
    0.1,
    {"fp32": 1e-3, "bf16": 5e-2},
)  # of the comparison: scale of values, and relative difference


@dataclass
class SiteTraining:
    """One site's training: the arguments of ``loop.train``, and all parameters of its model with their values.

    ``values`` are those before the training, and afterwards those after it.
    """

    task: Task
    trainable: Mapping[str, nn.Parameter]
    phases: Sequence[TrainPhase]
    settings: TrainSettings
    cursor: TrainCursor
    callback: StepCallback | None
    parameters: Mapping[str, nn.Parameter]
    values: dict[str, torch.Tensor]

    @property
    def rows(self) -> int:
        """Number of rows in a batch."""
        return min(self.settings.batch_size, len(self.task.train.examples))

    @property
    def model_kind(self) -> object:
        """Whether a model can be stacked depends on this."""
        layout = tuple((key, tuple(value.shape)) for key, value in self.values.items())
        adapters = tuple(id(p) for key, p in self.parameters.items() if key not in self.task.head)
        return type(self.task), layout, adapters, tuple(self.trainable), self.rows

    @property
    def kind(self) -> object:
        """Sites whose kinds are equal can train together."""
        moments, cursor = self.cursor.moments or {}, self.cursor
        steps = tuple((key, float(value)) for key, value in sorted(moments.items()) if key.endswith("/step"))
        plan = (tuple(self.phases), self.settings, cursor.step, cursor.total)
        return self.model_kind, plan, len(moments), steps

    def load(self) -> None:
        """Copy the values into the model."""
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(self.values[key])


def check_stackable(site: SiteTraining) -> None:
    """Raise NotStackable for settings that need each site's training for itself."""
    size = site.settings.micro_batch
    if site.task.plan.model.precision == "fp16":
        raise NotStackable("with fp16, the loss of each site has a scale of its own")
    if size is not None and size < site.rows:
        raise NotStackable("train.micro_batch is below a site's batch size")


def train_together(sites: Sequence[SiteTraining]) -> list[TrainOutcome]:
    """Train sites of one kind and write the results into their ``values``.

    If anything is raised, all values are as before. Raises NotStackable for a model that cannot be stacked.
    """
    first = sites[0]
    stacks = _stack(sites)
    trainable = {key: stacks[key] for key in first.trainable}
    with stacked(first.task.module, first.parameters, stacks), torch.random.fork_rng():
        torch.manual_seed(seed_from("together", *(site.cursor.noise for site in sites)))
        first.task.module.train()
        optimizer = make_optimizer(trainable, first.settings, _moments(sites))
        results = _steps(sites, trainable, optimizer)
        state = save_optimizer_state(optimizer, trainable) if first.settings.persist_optimizer_state else {}
    taken = len(results[0]) * first.rows
    for i, site in enumerate(sites):
        site.values = {key: stack[i].detach().clone() for key, stack in stacks.items()}
    states = [{key: _of_site(key, value, i) for key, value in state.items()} for i in range(len(sites))]
    return [outcome(results[i], taken, states[i]) for i in range(len(sites))]


def _steps(
    sites: Sequence[SiteTraining], trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[list[StepResult]]:
    """Take the optimizer steps of all phases. Returns the results of each site's steps."""
    first, results = sites[0], [[] for _ in sites]
    order = [batch_indices(len(s.task.train.examples), s.settings.batch_size, s.cursor) for s in sites]

    def callback(done: int, total: int) -> None:
        for site in sites:
            if site.callback:
                site.callback(done, total)

    for _ in scheduled_steps(optimizer, trainable, first.phases, first.settings, first.cursor, callback):
        batches = [
            [site.task.train.examples[i] for i in next(indices)] for site, indices in zip(sites, order, strict=True)
        ]
        optimizer.zero_grad(set_to_none=True)
        losses, terms = _losses(sites, batches)
        losses.sum().backward()
        _clip(trainable, first.settings.max_grad_norm, len(sites))
        optimizer.step()
        for of_site, loss, n in zip(results, losses.tolist(), terms, strict=True):
            of_site.append(StepResult(loss, n))
    return results


def _losses(sites: Sequence[SiteTraining], batches: Sequence[list[Any]]) -> tuple[torch.Tensor, list[int]]:
    """The mean loss (sites,) of each site's batch, and its number of loss terms."""
    batch = sites[0].task.collate([example for rows in batches for example in rows])
    outputs, n = sites[0].task.outputs(batch), len(batches[0])
    if len(outputs) != n * len(sites):
        raise NotStackable("the model returns another number of rows than it receives")
    found = [site.task.loss_of(outputs[i * n : (i + 1) * n], rows_of(batch, i * n, n)) for i, site in enumerate(sites)]
    return torch.stack([loss for loss, _ in found]), [terms for _, terms in found]


def rows_of(batch: Batch, start: int, n: int) -> Batch:
    """``n`` rows of a batch."""
    return {key: value[start : start + n] for key, value in batch.items()}


def _clip(trainable: Mapping[str, nn.Parameter], max_norm: float, sites: int) -> None:
    """Clip the gradient norm of each site, over all of its parameters together."""
    gradients = [p.grad for p in trainable.values() if p.grad is not None]
    if not max_norm or not gradients:
        return
    norms = torch.stack([gradient.reshape(sites, -1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)  # as in torch.nn.utils.clip_grad_norm_
    for gradient in gradients:
        gradient.mul_(factors.reshape(sites, *[1] * (gradient.dim() - 1)))


def _stack(sites: Sequence[SiteTraining]) -> dict[str, nn.Parameter]:
    """The values of all sites, frozen, on the device of the model."""
    stacks = {}
    for key, parameter in sites[0].parameters.items():
        values = torch.stack([site.values[key] for site in sites])
        stacks[key] = nn.Parameter(values.to(parameter.device), requires_grad=False)
    return stacks


def _moments(sites: Sequence[SiteTraining]) -> dict[str, torch.Tensor]:
    """The optimizer states of all sites; the numbers of steps are equal."""
    moments = [site.cursor.moments or {} for site in sites]
    return {
        key: moments[0][key] if key.endswith("/step") else torch.stack([m[key] for m in moments]) for key in moments[0]
    }


def _of_site(key: str, value: torch.Tensor, i: int) -> torch.Tensor:
    """A site's part of an entry of the optimizer state; all have the same number of steps."""
    return value.clone() if key.endswith("/step") else value[i].clone()


@torch.no_grad()
def compare_outputs(sites: Sequence[SiteTraining], batches: Sequence[Sequence[Any]]) -> None:
    """Compare the model's outputs for each site's batch alone and beside the others, for random parameters.

    A layer that takes its rows in another order would otherwise mix the sites silently. Raises NotStackable at a
    relative difference above rounding.
    """
    trial = [_with_noise(site, i) for i, site in enumerate(sites)]
    alone = []
    try:
        for site, examples in zip(trial, batches, strict=True):
            site.task.module.eval()
            site.load()
            batch = site.task.collate(examples)
            alone.append(_of_tokens(site.task.outputs(batch), batch))
        with stacked(trial[0].task.module, trial[0].parameters, _stack(trial)):
            trial[0].task.module.eval()
            batch = trial[0].task.collate([example for examples in batches for example in examples])
            together = _of_tokens(trial[0].task.outputs(batch), batch)
    except RuntimeError as error:
        if should_reduce_batch_size(error):
            raise
        raise NotStackable(f"the model fails with {type(error).__name__}") from error
    limit = AGREEMENT.get(sites[0].task.plan.model.precision, AGREEMENT["bf16"])
    expected = torch.cat(alone)
    if expected.shape != together.shape or not (expected - together).abs().max() <= limit * expected.abs().max():
        raise NotStackable("the outputs for a row depend on the other rows of the batch")


@torch.no_grad()
def compare_loss(site: SiteTraining) -> None:
    """Compare the loss as the model computes it with that of its outputs. Raises NotStackable if they differ."""
    site.task.module.eval()
    batch = site.task.collate(site.task.train.examples[: site.rows])
    own, of_outputs = (float(loss) for loss in (site.task.loss(batch)[0], _loss_of_outputs(site, batch)))
    if not abs(own - of_outputs) <= AGREEMENT["fp32"] * max(1.0, abs(own)):
        raise NotStackable("the model adds terms of its own to the loss")


def _loss_of_outputs(site: SiteTraining, batch: Batch) -> torch.Tensor:
    return site.task.loss_of(site.task.outputs(batch), batch)[0]


def _of_tokens(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The outputs without those for padding."""
    return outputs[batch["attention_mask"].bool()] if outputs.dim() == 3 else outputs


def _with_noise(site: SiteTraining, number: int) -> SiteTraining:
    """The site with random values added: at the initial values an adapter does nothing."""
    generator = torch.Generator().manual_seed(number)
    values = {
        key: value + TRIAL_NOISE * torch.randn(value.shape, generator=generator).to(value)
        for key, value in site.values.items()
    }
    return dataclasses.replace(site, values=values)
