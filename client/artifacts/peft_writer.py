"""The files of an export: PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``, or a merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...common.atomic_io import write_atomically
from ...common.dataset import TASKS
from ...common.models.base_model import stock_class
from ...common.models.hf_logging import quiet_transformers
from ...common.models.precision import DTYPES
from ...common.models.sources import source_folder, stock_name
from .exported_adapter import ExportedAdapter
from .model_card import render_model_card

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(exported: ExportedAdapter, out: Path) -> None:
    """Write an adapter that ``PeftModel.from_pretrained`` loads; equal models give identical files."""
    from peft import LoraConfig
    from safetensors.torch import save

    plan = exported.saved.plan
    config = LoraConfig(
        task_type=TASKS[exported.saved.metadata.task].peft_task_type if exported.complete else None,
        base_model_name_or_path=stock_name(plan.model),
        revision=plan.model.revision,
        r=exported.rank,
        lora_alpha=exported.rank,
        target_modules=list(exported.layers),
        modules_to_save=list(exported.modules) or None,
        inference_mode=True,
    ).to_dict()
    arrays = dict(exported.tensors)
    for layer, (b, a) in exported.layers.items():
        arrays |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    named = {f"base_model.model.{key}": value.contiguous() for key, value in sorted(arrays.items())}
    write_atomically(out / WEIGHTS, save(named, metadata={"format": "pt"}))
    write_atomically(out / CONFIG, json.dumps(_plain(config), indent=2, sort_keys=True).encode())
    _tokenizer(exported).save_pretrained(str(out))
    write_atomically(out / "README.md", render_model_card(exported, merged=False).encode())


def write_merged(exported: ExportedAdapter, out: Path) -> None:
    """Write the full model in the base model's precision; B A is added in double precision and rounded once."""
    saved, plan = exported.saved, exported.saved.plan
    tokenizer, labels = _tokenizer(exported), saved.metadata.labels
    config: dict[str, Any] = {}
    task = TASKS[saved.metadata.task]
    if task.problem_type:
        config["problem_type"] = task.problem_type
    if task.has_labels:
        config |= {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    dtype = DTYPES[plan.model.precision]
    with quiet_transformers(), torch.no_grad():
        model = stock_class(saved.metadata.task).from_pretrained(source_folder(plan.model), dtype=dtype, **config)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        for key, value in exported.tensors.items():
            model.get_parameter(key).copy_(value)
        for layer, (b, a) in exported.layers.items():
            module = model.get_submodule(layer)
            delta = b.double() @ a.double()
            delta = delta.T if _is_transposed(module) else delta
            module.weight.copy_((module.weight.double() + delta).to(dtype))
        model.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    write_atomically(out / "README.md", render_model_card(exported, merged=True).encode())


def _tokenizer(exported: ExportedAdapter) -> Any:
    """Load the base model's tokenizer, with the padding token and the maximum length of training."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source_folder(exported.saved.plan.model))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = exported.saved.plan.model.max_length
    return tokenizer


def _plain(value: Any) -> Any:
    """Convert a configuration to JSON types; sets become sorted lists."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, set):
        return sorted(value)
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else getattr(value, "value", value)


def _is_transposed(module: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)  # GPT-2's layers store (d_in, d_out)
