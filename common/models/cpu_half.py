"""16-bit base models on a CPU without 16-bit arithmetic: weights stay in 16 bits, computation is in fp32.

On such a CPU (AVX2) a product of bf16 matrices takes 10 times as long as in fp32, and its gradient 50 times. The
results equal those of an fp32 model whose weights were rounded to 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

# torch.ops.mkldnn function that tells whether oneDNN multiplies matrices of a type natively
NATIVE = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def has_native_arithmetic(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the device multiplies matrices of this type at full speed (on a CPU: with oneDNN)."""
    if device.type != "cpu" or dtype not in NATIVE:
        return True
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, NATIVE[dtype])())


def widen(model: nn.Module) -> None:
    """Change a frozen model in place to compute in fp32. Linear layers and embeddings keep their 16-bit weights.

    Other matrices (GPT-2's ``Conv1D``, experts as bare parameters) become fp32, which is correct but saves no memory.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = WideLinear
        elif type(module) is nn.Embedding:
            module.__class__ = WideEmbedding
        else:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()


class WideLinear(nn.Linear):
    """A frozen linear layer that casts its weights (d_out, d_in) to fp32 for each product only."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, d_in) → (…, d_out) in fp32. The input is cast, since T5 casts activations to the type of its weights."""
        return _Product.apply(input.float(), self.weight, self.bias)  # type: ignore[return-value]


class WideEmbedding(nn.Embedding):
    """An embedding with fp32 output."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Ids (…) → (…, d) in fp32."""
        return super().forward(input).float()


class _Product(torch.autograd.Function):
    """x Wᵀ + b. It saves W in 16 bits for the backward pass, where autograd would save the fp32 copy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight.to(gradients[0].dtype), None, None
