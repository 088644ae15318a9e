"""Base models in 16 bits on a processor that cannot compute in them: kept in 16 bits, computed in 32.

Without such arithmetic a product of bf16 matrices takes 10 times as long as in fp32, and its gradient 50 times (AVX2).
The results are those of an fp32 model whose weights were rounded to 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

NATIVE = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def has_native_arithmetic(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies matrices of this kind of number at full speed (on a CPU: by oneDNN)."""
    if device.type != "cpu" or dtype not in NATIVE:
        return True
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, NATIVE[dtype])())


def widen(model: nn.Module) -> None:
    """Changes a frozen model in place: linear layers and embeddings keep 16 bits, all that flows between them is fp32.

    Matrices of other kinds (GPT-2's ``Conv1D``, experts as bare parameters) become fp32: right, but not smaller.
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
    """A frozen linear layer whose weights (d_out, d_in) are widened for each product and not kept wide."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, d_in) → (…, d_out) in fp32. T5 casts what it gives to its weights' type."""
        return _Product.apply(input.float(), self.weight, self.bias)  # type: ignore[return-value]


class WideEmbedding(nn.Embedding):
    """An embedding that gives fp32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Ids (…) → (…, d) in fp32."""
        return super().forward(input).float()


class _Product(torch.autograd.Function):
    """x Wᵀ + b. What is kept for the backward pass is W in 16 bits, which autograd by itself would keep in 32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight.to(gradients[0].dtype), None, None
