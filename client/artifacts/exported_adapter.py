"""The content of an export, by parameter names of the full model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ...common.adapters.factors import Factors
from ...common.dataset import TASKS
from ...common.models.saved import SavedModel

Part = Literal["all", "shared", "personal"]


@dataclass(frozen=True)
class ExportedAdapter:
    """An adapter to write, by parameter names of the task's full model.

    ``layers`` has the factors (B, A) of every adapted layer. ``tensors`` are saved unchanged: the head, and weights
    that the base model's source lacks. ``modules`` are their modules, PEFT's ``modules_to_save``.
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
        """Whether the export has everything its task needs: a classifier needs its head."""
        return not TASKS[self.saved.metadata.task].has_labels or bool(self.heads)

    @property
    def heads(self) -> tuple[str, ...]:
        """The exported modules of the head."""
        return tuple(name for name in self.modules if "." not in name)

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes in the order of the logits, where the export has the site's head."""
        return self.saved.metadata.labels if self.heads and self.part != "shared" else ()

    @property
    def classes(self) -> int:
        """The number of classes of the exported head; 0 without a head."""
        heads = [v for k, v in self.tensors.items() if k.partition(".")[0] in self.heads and k.endswith("weight")]
        return heads[-1].shape[0] if heads and TASKS[self.saved.metadata.task].has_labels else 0

    def about(self, out: Path, *, merged: bool) -> str:
        """Describe what was written, in one line."""
        kind = "a full model" if merged else f"a PEFT LoRA of rank {self.rank} on {len(self.layers)} layers"
        heads = f", with {', '.join(self.modules)}" if self.modules else ""
        return f"{out}: {kind}{heads}. Its README.md shows how to load it."


@dataclass(frozen=True)
class FullModel:
    """A task's full model without weights: the backbone's prefix, the head's modules and all tensor names."""

    prefix: str
    heads: tuple[str, ...]
    tensors: frozenset[str]
