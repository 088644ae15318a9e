"""Weight precision, devices and gradient checkpointing of the base model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ModelError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def loading_options(precision: str, device: torch.device) -> dict[str, Any]:
    """What ``from_pretrained`` needs to know to load weights in this precision. Raises ModelError without bitsandbytes.

    8 bits are LLM.int8() (arXiv 2208.07339), 4 bits are QLoRA's NF4 with double quantisation (arXiv 2305.14314); what
    they are computed in is bf16 on a GPU and fp32 on a CPU.
    """
    if precision in DTYPES:
        return {"dtype": DTYPES[precision]}
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise ModelError("model.precision", f"bitsandbytes for {precision}: pip install 'colora[quantised]'", "no such")
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
    """Gradient checkpointing: activations are computed again for the backward pass instead of kept.

    Raises ModelError where the architecture has no such thing.
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
        wanted = "false for an architecture without gradient checkpointing"
        raise ModelError("train.gradient_checkpointing", wanted, type(backbone).__name__) from None


def resolve_device(name: str) -> torch.device:
    """The device that a name means here, ``auto`` among them. Raises ModelError where there is none of it."""
    if "," in name:
        wanted = "one device (a site per GPU is a way to use more)"
        raise ModelError("device", wanted, repr(name))
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):  # unknown to torch, not there, or not what torch was built for
        raise ModelError("device", "a device of this machine", repr(name)) from None
