"""The base model with the shared adapter and the private adapters that its sites use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from ...common.adapters.initialization import initial_values
from ...common.adapters.inject import ADAPTER, Layout, activate, attach, inject, layout_of, private_spec
from ...common.config.schema import Plan, PrivateSettings
from ...common.dataset import TASKS
from ...common.models.base_model import BaseModel
from ...common.models.precision import checkpoint_activations
from ...common.protocol.types import Arrays
from ...transfer.preparation import load_generator
from .smaller_rank import SmallerRank, plan_at_rank


@dataclass(frozen=True)
class AdaptedModel:
    """A base model with the plan's adapter attached. The sites of a process that have one rank use it in turn.

    With ``smaller`` the adapter, and the plan's rank, are smaller than the federation's.
    """

    base: BaseModel
    plan: Plan
    adapter: Mapping[str, nn.Parameter]
    smaller: SmallerRank | None = None
    private_adapters: dict[PrivateSettings, PrivateAdapter] = field(default_factory=dict)
    generators: list[BaseModel] = field(default_factory=list)  # the generator beside an encoder, once it is loaded

    @cached_property
    def initial(self) -> Mapping[str, torch.Tensor]:
        """The initial values of the shared adapter. All sites of the process share these tensors and only read them."""
        return initial_values(layout_of(self.adapter), self.plan.adapter, self.plan.seed)

    def private_adapter(self, settings: PrivateSettings) -> PrivateAdapter:
        """The private adapter with these settings, attached at the first call. Sites with equal settings share it."""
        if not settings.present:
            return PrivateAdapter("", {})
        if settings not in self.private_adapters:
            name = f"private{len(self.private_adapters)}"
            parameters = inject(self.base.backbone, private_spec(settings, self.plan.adapter), name)
            self.private_adapters[settings] = PrivateAdapter(name, parameters)
        return self.private_adapters[settings]

    def generator(self, task: str) -> BaseModel:
        """The causal model that generates texts: the base model, or a separate generator, loaded at the first call."""
        if TASKS[task].needs_causal_lm:
            return self.base
        if not self.generators:
            self.generators.append(load_generator(self.plan, task))
        return self.generators[0]

    def at_own_rank(self, shared: Arrays) -> Arrays:
        """Return shared arrays that arrived in the rank of this adapter."""
        return self.smaller.received(shared) if self.smaller and shared else shared

    def at_shared_rank(self, trained: Arrays, received: Arrays) -> Arrays:
        """Return trained shared arrays in the federation's rank, in which ``received`` arrived."""
        return self.smaller.sent(trained, received) if self.smaller else trained

    def layout_of_messages(self, layout: Layout) -> Layout:
        """Return the layout of the shared arrays in messages, in the federation's rank."""
        return self.smaller.layout(layout) if self.smaller else layout

    def select(self, private: PrivateAdapter) -> None:
        """Activate the shared adapter and this private adapter, and no other."""
        if self.private_adapters:
            activate(self.base.backbone, [name for name in (ADAPTER, private.name) if name])


@dataclass(frozen=True)
class PrivateAdapter:
    """A private adapter attached to a model: its name in PEFT (empty for none) and its parameters."""

    name: str
    parameters: Mapping[str, nn.Parameter]


def attach_adapters(base: BaseModel, plan: Plan, max_rank: int | None = None) -> AdaptedModel:
    """Attach the plan's shared adapter to the base model, with all its parameters frozen.

    Its rank is at most ``max_rank`` where the plan can have a smaller one.
    """
    rank, plan = plan.adapter.rank, plan_at_rank(plan, max_rank)
    checkpoint_activations(base.backbone, plan.train.gradient_checkpointing)
    adapter = attach(base.backbone, plan.adapter, plan.method.row())
    for parameter in adapter.values():
        parameter.requires_grad_(False)
    return AdaptedModel(base, plan, adapter, SmallerRank(rank, plan.adapter.rank) if plan.adapter.rank < rank else None)
