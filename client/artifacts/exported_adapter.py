"""What an export contains, by the names of the full model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ...common.adapters.factors import Factors
from ...common.models.saved import SavedModel

Part = Literal["all", "shared", "personal"]


@dataclass(frozen=True)
class ExportedAdapter:
    """What goes into a folder, by names in the full model of the task.

    ``layers``: the factors of every adapted layer. ``tensors``: what is saved as it is (the head, and weights that the
    base model's source lacks), with ``modules`` as the modules that PEFT saves whole.
    """

    saved: SavedModel
    part: Part
    layers: Factors
    tensors: Mapping[str, torch.Tensor]
    modules: tuple[str, ...]

    @property
    def rank(self) -> int:
        """The rank of every layer."""
        return next(iter(self.layers.values()))[1].shape[0] if self.layers else 0

    @property
    def complete(self) -> bool:
        """Whether it has all that its task needs, as PEFT expects where a task is named: a classifier's head."""
        return self.saved.metadata.task != "classification" or bool(self.heads)

    @property
    def heads(self) -> tuple[str, ...]:
        """The modules of the head that are part of this."""
        return tuple(name for name in self.modules if "." not in name)

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes in the order of the logits, where the head is part of this."""
        return self.saved.metadata.labels if self.heads and self.part != "shared" else ()

    def about(self, out: Path, *, merged: bool) -> str:
        """What was written, in a line."""
        what = "a full model" if merged else f"a PEFT LoRA of rank {self.rank} on {len(self.layers)} layers"
        heads = f", with {', '.join(self.modules)}" if self.modules else ""
        return f"{out}: {what}{heads}; README.md says how to load it"


@dataclass(frozen=True)
class FullModel:
    """The full model of a task without its weights: where the backbone stands, its head's modules, its tensors."""

    prefix: str
    heads: tuple[str, ...]
    tensors: frozenset[str]
