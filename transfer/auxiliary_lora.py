"""A LoRA of a site's own on the causal model that writes: put on, trained alone, kept as values, taken off again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, Self

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ..common.adapters.initialization import initial_values
from ..common.adapters.inject import AdapterSpec, activate, inject, layout_of
from ..common.config.schema import AdapterSettings, ModelSettings, Plan, TrainSettings, TransferSettings
from ..common.errors import StateError
from ..common.models.base_model import BaseModel
from ..common.seeds import seed_from
from ..common.tasks.base import Task
from ..common.training.loop import StepCallback, TrainCursor, TrainPhase, train

SCALING = 2.0


class AuxiliaryLora(ABC):
    """One LoRA, named and formed by its class, on a model that may carry others."""

    name: ClassVar[str]
    parameters: Mapping[str, nn.Parameter]  # while it is on

    def __init__(self, base: BaseModel, model: ModelSettings, settings: TransferSettings, seed: int) -> None:
        self.base, self.settings, self.seed = base, settings, seed
        self.plan = Plan(self.name, 1, model)

    @classmethod
    @abstractmethod
    def targets_of(cls, settings: TransferSettings) -> tuple[str, ...] | str:
        """The modules it is on, in PEFT's words."""

    @classmethod
    def spec_of(cls, settings: TransferSettings) -> AdapterSpec:
        """Its form, on whichever model."""
        return AdapterSpec(
            "transfer.discriminator", settings.discriminator.rank, SCALING, 0.0, cls.targets_of(settings)
        )

    @contextmanager
    def attached(self, values: Mapping[str, torch.Tensor] | None = None) -> Iterator[Self]:
        """Active and alone in this block, from these values or its initial ones; then off the model.

        Raises StateError for values of another form.
        """
        try:
            self.parameters = inject(self.base.backbone, self.spec_of(self.settings), self.name)
            layout = layout_of(self.parameters)
            self._load(values or initial_values(layout, AdapterSettings(), seed_from(self.seed, self.name)))
            activate(self.base.backbone, [self.name])
            yield self
        finally:
            self._take_off()

    def _take_off(self) -> None:
        activate(self.base.backbone, [])
        for layer in list(self.base.backbone.modules()):
            if isinstance(layer, LoraLayer) and self.name in layer.r:
                layer.delete_adapter(self.name)

    def _load(self, values: Mapping[str, torch.Tensor]) -> None:
        wanted, found = layout_of(self.parameters), layout_of(values)
        for key in sorted(wanted.keys() | found.keys()):
            if wanted.get(key) != found.get(key):
                expected, there = (f"{key} of shape {shapes.get(key)}" for shapes in (wanted, found))
                raise StateError(f"transfer, the {self.name} that was kept", expected, there)
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(values[key])

    def values(self) -> dict[str, torch.Tensor]:
        """The LoRA's values, on the CPU."""
        return {key: p.detach().to("cpu", copy=True) for key, p in self.parameters.items()}

    def learn(self, task: Task, steps: int, batch_size: int, lr: float, watch: StepCallback | None) -> float:
        """Trains the LoRA alone on a task; returns the mean loss. ``watch`` may end it."""
        settings = TrainSettings(steps=steps, batch_size=batch_size, lr=lr, lr_schedule="linear")
        stretch = TrainCursor(0, steps, 0, seed_from(self.seed, "order"), seed_from(self.seed, "noise"))
        return train(
            task, self.parameters, [TrainPhase(steps, frozenset(self.parameters))], settings, stretch, watch
        ).loss
