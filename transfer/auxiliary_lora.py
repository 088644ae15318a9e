"""A personal LoRA on the generator, beside the federation's adapters: attached, trained alone, saved and removed."""

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
from ..common.adapters.targets import Targets
from ..common.config.schema import AdapterSettings, ModelSettings, Plan, TrainSettings, TransferSettings
from ..common.errors import StateError
from ..common.models.base_model import BaseModel
from ..common.seeds import seed_from
from ..common.tasks.base import Task
from ..common.training.loop import StepCallback, TrainCursor, TrainPhase, train

SCALING = 2.0  # s in ΔW = s · B A


class AuxiliaryLora(ABC):
    """A LoRA on a model that may carry other adapters; subclasses define its name and target modules."""

    name: ClassVar[str]  # of the PEFT adapter; the seed of the initial values derives from it
    title: ClassVar[str]  # in error messages
    parameters: Mapping[str, nn.Parameter]  # set while the LoRA is attached

    def __init__(self, base: BaseModel, model: ModelSettings, settings: TransferSettings, seed: int) -> None:
        self.base, self.settings, self.seed = base, settings, seed
        self.plan = Plan(self.name, 1, model)

    @classmethod
    @abstractmethod
    def targets_of(cls, settings: TransferSettings) -> tuple[str, ...] | str:
        """The target modules, as in PEFT's ``LoraConfig``."""

    @classmethod
    def form_of(cls, settings: TransferSettings) -> tuple[int, object]:
        """Rank and target modules. Parameters fit settings with the same form."""
        return settings.discriminator.rank, cls.targets_of(settings)

    @classmethod
    def spec_of(cls, settings: TransferSettings) -> AdapterSpec:
        """The adapter's rank, scaling and target modules."""
        rank, targets = settings.discriminator.rank, cls.targets_of(settings)
        field = "transfer.discriminator"
        return AdapterSpec(
            field, lambda layer: rank, lambda layer: SCALING, 0.0, Targets(f"{field}.target_modules", targets)
        )

    @contextmanager
    def attached(self, values: Mapping[str, torch.Tensor] | None = None) -> Iterator[Self]:
        """Attach the LoRA as the only active adapter for this block, then remove it from the model.

        Without ``values`` it starts from its initial values. Raises StateError for values of other shapes.
        """
        try:
            self.parameters = inject(self.base.backbone, self.spec_of(self.settings), self.name)
            layout = layout_of(self.parameters)
            self._load(values or initial_values(layout, AdapterSettings(), seed_from(self.seed, self.name)))
            activate(self.base.backbone, [self.name])
            yield self
        finally:
            self._remove()

    def _remove(self) -> None:
        activate(self.base.backbone, [])
        for layer in list(self.base.backbone.modules()):
            if isinstance(layer, LoraLayer) and self.name in layer.r:
                layer.delete_adapter(self.name)

    def _load(self, values: Mapping[str, torch.Tensor]) -> None:
        model_layout, saved_layout = layout_of(self.parameters), layout_of(values)
        for key in sorted(model_layout.keys() | saved_layout.keys()):
            if model_layout.get(key) != saved_layout.get(key):
                expected, found = (f"{key} of shape {layout.get(key)}" for layout in (model_layout, saved_layout))
                raise StateError(
                    f"transfer, the saved {self.title}",
                    expected,
                    found,
                    message=f"The saved {self.title} does not fit these settings: expected {expected}, found {found}.",
                    hint="Use the [transfer] settings of the run that prepared it.",
                )
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(values[key])

    def values(self) -> dict[str, torch.Tensor]:
        """Copy the LoRA's parameters to the CPU."""
        return {key: p.detach().to("cpu", copy=True) for key, p in self.parameters.items()}

    def train_on(self, task: Task, steps: int, batch_size: int, lr: float, on_step: StepCallback | None) -> float:
        """Train only the LoRA and return the mean loss. An exception from ``on_step`` ends the training."""
        settings = TrainSettings(steps=steps, batch_size=batch_size, lr=lr, lr_schedule="linear")
        cursor = TrainCursor(0, steps, 0, seed_from(self.seed, "order"), seed_from(self.seed, "noise"))
        phases = [TrainPhase(steps, frozenset(self.parameters))]
        return train(task, self.parameters, phases, settings, cursor, on_step).loss
