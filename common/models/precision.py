"""Weight precision, devices and gradient checkpointing of the base model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ModelError

# Precisions whose weights are plain tensors; int8 and int4 need bitsandbytes
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def loading_options(precision: str, device: torch.device) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that load weights in this precision.

    ``int8`` is LLM.int8() (arXiv 2208.07339), ``int4`` is NF4 with double quantization as in QLoRA (arXiv 2305.14314).
    Both compute in bf16 on a GPU and in fp32 on a CPU. Raises ModelError without bitsandbytes.
    """
    if precision in DTYPES:
        return {"dtype": DTYPES[precision]}
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise ModelError(
            "model.precision",
            f"bitsandbytes for {precision}",
            "nothing",
            message=f"model.precision = {precision!r} needs the package bitsandbytes.",
            hint="Run pip install 'colora[quantized]'.",
        )
    from transformers import BitsAndBytesConfig

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    four: dict[str, Any] = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }
    bits: dict[str, Any] = {"load_in_4bit": True, **four} if precision == "int4" else {"load_in_8bit": True}
    return {"dtype": dtype, "device_map": {"": device}, "quantization_config": BitsAndBytesConfig(**bits)}


def checkpoint_activations(backbone: nn.Module, on: bool) -> None:
    """Turn gradient checkpointing on or off: activations are recomputed in the backward pass instead of stored.

    Raises ModelError if the architecture does not support it.
    """
    if not on and not any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules()):
        return
    model: Any = backbone
    # Transformers 5.23 renames gradient_checkpointing_* to activation_checkpointing_* and warns of the old names.
    kind = "activation" if hasattr(backbone, "activation_checkpointing_enable") else "gradient"
    try:
        if on:
            options = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
            getattr(model, f"{kind}_checkpointing_enable")(**options)
        else:
            getattr(model, f"{kind}_checkpointing_disable")()
    except (AttributeError, ValueError):
        architecture = type(backbone).__name__
        message = f"The architecture {architecture} does not support gradient checkpointing."
        hint = "Set train.gradient_checkpointing = false."
        raise ModelError(
            "train.gradient_checkpointing", "false for this architecture", architecture, message=message, hint=hint
        ) from None


def resolve_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is the GPU if there is one. Raises ModelError if it is not available."""
    if "," in name:
        message = f"device must be one device, not {name!r}."
        hint = "Run one site per GPU to use several."
        raise ModelError("device", "one device", repr(name), message=message, hint=hint)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):  # unknown to torch, absent, or not supported by this build of torch
        message = f"This machine has no device {name!r} that torch can use."
        raise ModelError("device", "a device of this machine", repr(name), message=message) from None
