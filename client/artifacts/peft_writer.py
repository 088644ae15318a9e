"""The files of an export: PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``, or a merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...common.atomic_io import write_atomically
from ...common.dataset import TASKS
from ...common.models.architecture import load_config, stock_class
from ...common.models.hf_logging import quiet_transformers
from ...common.models.precision import DTYPES
from ...common.models.sources import source_folder, stock_name
from ...common.models.tokenizer import (
    declared_ends,
    end_ids,
    load_tokenizer,
    padding_side,
    set_generation,
    set_padding,
    set_token_ids,
)
from .exported_adapter import ExportedAdapter
from .model_card import render_model_card

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_CONFIG = "config"  # folder of the full model's configuration


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
    tokenizer = _tokenizer(exported)
    tokenizer.save_pretrained(str(out))
    _write_configs(exported, tokenizer, out / MODEL_CONFIG)
    write_atomically(out / "README.md", render_model_card(exported, merged=False).encode())


def write_merged(exported: ExportedAdapter, out: Path) -> None:
    """Write the full model in the base model's precision; B A is added in double precision and rounded once."""
    saved, plan = exported.saved, exported.saved.plan
    tokenizer, dtype = _tokenizer(exported), DTYPES[plan.model.precision]
    # A base model that is a classifier already has a head for other labels, which the site's head replaces.
    options: dict[str, Any] = {"dtype": dtype, "ignore_mismatched_sizes": True, "trust_remote_code": False}
    config = _config(exported, tokenizer)
    with quiet_transformers(), torch.no_grad():
        kind = stock_class(saved.metadata.task)
        model = kind.from_pretrained(source_folder(plan.model), config=config, **options)
        set_token_ids(model, tokenizer, _ends(exported, tokenizer))
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
    """Load the base model's tokenizer, with the special tokens and the maximum length of training.

    It pads on the side on which predictions were padded: answers follow the prompt without a gap.
    """
    tokenizer = load_tokenizer(exported.saved.plan.model)
    tokenizer.model_max_length = exported.saved.plan.model.max_length
    generates = TASKS[exported.saved.metadata.task].needs_causal_lm
    tokenizer.padding_side = padding_side(load_config(exported.saved.plan.model), generates=generates)
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # which save_pretrained writes
    return tokenizer


def _config(exported: ExportedAdapter, tokenizer: Any) -> Any:
    """Return the configuration of the full model: the names of its outputs, and its padding token."""
    task, labels, config = TASKS[exported.saved.metadata.task], exported.labels, load_config(exported.saved.plan.model)
    if exported.classes:
        config.num_labels = exported.classes
        config.problem_type = task.problem_type or "single_label_classification"
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    set_padding(config, tokenizer.pad_token_id)
    return config


def _ends(exported: ExportedAdapter, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens at which an answer ends, as in training."""
    model = exported.saved.plan.model
    return end_ids(tokenizer, declared_ends(load_config(model), source_folder(model)))


def _write_configs(exported: ExportedAdapter, tokenizer: Any, out: Path) -> None:
    """Write the full model's configuration beside an adapter.

    It has a folder of its own, since Transformers takes an adapter's folder with a config.json for a full model.
    """
    from transformers import GenerationConfig

    config = _config(exported, tokenizer)
    config.save_pretrained(str(out))
    if not TASKS[exported.saved.metadata.task].needs_causal_lm:
        return
    source, ends = source_folder(exported.saved.plan.model), _ends(exported, tokenizer)
    known = (source / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(source) if known else GenerationConfig.from_model_config(config)
    set_generation(generation, tokenizer, ends)
    generation.save_pretrained(str(out))


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
