"""Base class of adapter forms on PEFT's LoRA layers: forms whose update is ΔW = B' A with one factor B'.

It is the only code that uses PEFT's private class ``LoraVariant``.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import nn


class Variant(LoraVariant):
    """A LoRA form with one additional parameter per layer, called ``leaf``."""

    leaf: str

    def install(self, layer: LoraLayer, adapter: str) -> nn.Parameter:
        """Add the parameter at its initial value, and make forward and merge of the layer use this form."""
        module: Any = layer
        parameter = nn.Parameter(self.initial(module, adapter).to(module.lora_A[adapter].weight.device))
        if not hasattr(module, self.leaf):
            setattr(module, self.leaf, nn.ParameterDict())
        getattr(module, self.leaf)[adapter] = parameter
        layer.lora_variant[adapter] = self
        return parameter

    def initial(self, module: Any, adapter: str) -> torch.Tensor:
        """Return the parameter's value at step 0."""
        raise NotImplementedError

    def factor(self, module: Any, adapter: str) -> torch.Tensor:
        """Return B' with ΔW = B' A, including every scale, shape (d_out, r)."""
        raise NotImplementedError

    def delta(self, module: Any, adapter: str) -> torch.Tensor:
        """Return ΔW in the orientation of the layer's weight: (d_out, d_in), or (d_in, d_out) for ``Conv1D``."""
        delta = self.factor(module, adapter) @ module.lora_A[adapter].weight
        return delta.T if module.fan_in_fan_out else delta

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Return a new tensor with ΔW added."""
        return orig_weight + self.delta(module, active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:  # type: ignore[override]
        """Add ΔW in place."""
        orig_weight.data += self.delta(module, active_adapter).to(orig_weight.dtype)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Return a tensor with ΔW subtracted."""
        return orig_weight - self.delta(module, active_adapter).to(orig_weight.dtype)
