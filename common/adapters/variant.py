"""What the forms of an adapter have in common on PEFT's LoRA layers: one factor B' with ΔW = B' A.

This package's variants are the only code that touches PEFT's private ``LoraVariant`` seam.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import nn


class Variant(LoraVariant):
    """A LoRA form with one more parameter a layer, called ``leaf``."""

    leaf: str

    def install(self, layer: LoraLayer, adapter: str) -> nn.Parameter:
        """Adds the parameter at its initial value and routes forward and merge through this form."""
        module: Any = layer
        parameter = nn.Parameter(self.initial(module, adapter).to(module.lora_A[adapter].weight.device))
        if not hasattr(module, self.leaf):
            setattr(module, self.leaf, nn.ParameterDict())
        getattr(module, self.leaf)[adapter] = parameter
        layer.lora_variant[adapter] = self
        return parameter

    def initial(self, module: Any, adapter: str) -> torch.Tensor:
        """The parameter's value at step 0."""
        raise NotImplementedError

    def factor(self, module: Any, adapter: str) -> torch.Tensor:
        """B' with ΔW = B' A and every scale in it, shape (d_out, r)."""
        raise NotImplementedError

    def delta(self, module: Any, adapter: str) -> torch.Tensor:
        """ΔW, shape (d_out, d_in)."""
        return self.factor(module, adapter) @ module.lora_A[adapter].weight

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """A new tensor with ΔW added."""
        return orig_weight + self.delta(module, active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:  # type: ignore[override]
        """Adds ΔW in place."""
        orig_weight.data += self.delta(module, active_adapter).to(orig_weight.dtype)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """A tensor with ΔW taken off again."""
        return orig_weight - self.delta(module, active_adapter).to(orig_weight.dtype)
