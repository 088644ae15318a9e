"""``colora export``: a personalised model as a plain PEFT LoRA, or merged into its base model.

Shared adapter, core and private adapter become one LoRA: the product is exact, every scale stands in B, alpha = rank
and all layers have one rank, so that nothing depends on a convention. Stock transformers and PEFT load it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..common.adapters.attach import attach, initial_values, inject, layout_of, private_form
from ..common.adapters.compose import Factors, difference, factors, padded
from ..common.errors import RecipeError, StateError
from ..common.files import write_atomically
from ..common.methods import SHARED, Method, group_of
from ..common.model import DTYPES, load, skeleton, source_folder, stock_class
from ..common.quiet import quiet_transformers
from ..common.saved import Saved
from ..common.settings import Plan
from . import card

Part = Literal["all", "shared", "personal"]
PEFT_TASKS = {"classification": "SEQ_CLS", "generation": "CAUSAL_LM"}
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Exported:
    """What goes into a folder: the factors of every layer, and whole tensors (head) by their name in the full model."""

    saved: Saved
    part: Part
    task: str
    layers: Factors
    whole: Mapping[str, torch.Tensor]

    @property
    def rank(self) -> int:
        """The rank of every layer."""
        return next(iter(self.layers.values()))[1].shape[0] if self.layers else 0

    def about(self, out: Path, *, merged: bool) -> str:
        """What was written, and how it is loaded, in a line or two."""
        what = "a full model" if merged else f"a PEFT LoRA of rank {self.rank} on {len(self.layers)} layers"
        heads = sorted({key.rpartition(".")[0] for key in self.whole})
        return f"{out}: {what}" + (f", with {', '.join(heads)}" if heads else "") + "; README.md says how to load it"


def export(saved: Saved, out: Path, part: Part = "all", *, merge: bool = False) -> Exported:
    """Writes a PEFT adapter, or with ``merge`` a full model, to the new or empty folder ``out``.

    ``shared`` is what all sites have in common (the core as the identity, no personal head); ``personal`` is what this
    site adds to that. Raises StateError or RecipeError for what cannot be exported.
    """
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise StateError(f"--out {out}", "a new or empty folder", "other files")
    if merge and part != "all":
        raise RecipeError("--merge", "the whole model, without --only", f"--only {part}")
    if merge and saved.plan.model.precision not in DTYPES:
        found = f"model.precision = {saved.plan.model.precision}"
        raise RecipeError("--merge", "a base model in fp32, bf16 or fp16: adapters are not merged into others", found)
    exported = compose(saved, part)
    if merge:
        _write_merged(exported, out)
    else:
        _write_adapter(exported, out)
    return exported


def compose(saved: Saved, part: Part = "all") -> Exported:
    """The adapter of a saved model by full module names, and the tensors that PEFT saves whole."""
    plan, task = saved.plan, saved.card.task or "classification"
    if task not in PEFT_TASKS or plan.model.source.startswith("synthetic:"):
        raise StateError(str(saved.path), "a model of texts", f"one of {task}")
    if part != "shared" and not saved.is_of_a_site:
        raise StateError(str(saved.path), "a site's state (or --only shared)", "a coordinator's checkpoint")
    row, values = plan.row(), _values(saved)
    shared = {k: v for k, v in values["start"].items() if group_of(k) != "private"}
    layers = factors(values["now"], plan)
    if part == "shared":
        layers = factors(shared, plan)
    elif part == "personal":
        layers = {k: f for k, f in difference(layers, factors(shared, plan)).items() if f[0].any()}
    if not any(b.any() for b, _ in layers.values()) and part != "all":
        raise StateError(f"--only {part}", f"a method with {part} adapter values", _about(plan, row))
    prefix, modules = full_names(plan, task, len(saved.card.labels))
    whole = _heads(saved, row, part) | (_missing(plan, task, prefix) if modules else {})
    return Exported(saved, part, task, {f"{prefix}.{k}": f for k, f in padded(layers).items()}, whole)


def full_names(plan: Plan, task: str, labels: int) -> tuple[str, list[str]]:
    """Where the backbone stands in the full model of a task, and the names of the head's modules."""
    from transformers import AutoConfig

    with quiet_transformers(), torch.device("meta"):
        config = AutoConfig.from_pretrained(source_folder(plan.model))
        if task == "classification":
            config.num_labels = max(labels, 1)
        model = stock_class(task).from_config(config)
    prefix = model.base_model_prefix
    heads = [n for n, m in model.named_children() if n != prefix and list(m.parameters())]
    return prefix, heads if task == "classification" else []


def _values(saved: Saved) -> dict[str, dict[str, torch.Tensor]]:
    """Adapter values by name: ``start`` with the shared groups alone, ``now`` with the site's own as well."""
    plan, row = saved.plan, saved.plan.row()
    backbone = skeleton(plan.model)
    parameters = attach(backbone, plan.adapter, plan.method.row())
    if plan.private.kind != "none":
        parameters |= inject(backbone, private_form(plan.private, plan.adapter), "private")
    start = initial_values(layout_of(parameters), plan.adapter, plan.seed)
    start |= {k: torch.as_tensor(v) for k, v in saved.shared.items() if k in start}
    own = {k: torch.as_tensor(v) for k, v in saved.personal.items() if k in start}
    missing = [k for k in row.having(start, SHARED) if k not in saved.shared]
    if missing:
        raise StateError(str(saved.path), f"the shared adapter with {missing[0]}", "a file without it")
    return {"start": start, "now": start | own}


def _heads(saved: Saved, row: Method, part: Part) -> dict[str, torch.Tensor]:
    """The head's tensors by their names in the full model: the site's own, unless only the shared part is wanted."""
    shared = row.head is SHARED
    if (part == "personal" and shared) or (part == "shared" and not shared):
        return {}
    found = saved.shared if shared else saved.personal
    return {k.removeprefix("head."): torch.as_tensor(v) for k, v in found.items() if group_of(k) == "head"}


def _missing(plan: Plan, task: str, prefix: str) -> dict[str, torch.Tensor]:
    """Weights that the base model's source lacks: elsewhere they would be drawn anew, so they go with the adapter."""
    model = dataclasses.replace(plan.model, precision="fp32", device="cpu")
    base = load(model, generates=task == "generation")
    state = base.backbone.state_dict()
    return {f"{prefix}.{key}": state[key] for key in base.missing if key in state}


def _write_adapter(exported: Exported, out: Path) -> None:
    from peft import LoraConfig
    from safetensors.torch import save
    from transformers import AutoTokenizer

    plan = exported.saved.plan
    names = list(exported.layers)
    config = LoraConfig(
        task_type=PEFT_TASKS[exported.task],
        base_model_name_or_path=base_name(plan),
        revision=plan.model.revision,
        r=exported.rank,
        lora_alpha=exported.rank,
        target_modules=names,
        modules_to_save=sorted({key.rpartition(".")[0] for key in exported.whole}) or None,
        inference_mode=True,
    )
    arrays: dict[str, torch.Tensor] = {}
    for layer, (b, a) in exported.layers.items():
        arrays |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    arrays |= exported.whole
    named = {f"base_model.model.{key}": value.contiguous() for key, value in sorted(arrays.items())}
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / WEIGHTS, save(named, metadata={"format": "pt"}))
    config.save_pretrained(str(out))
    with quiet_transformers():
        AutoTokenizer.from_pretrained(source_folder(plan.model)).save_pretrained(str(out))
    write_atomically(out / "README.md", card.text_of(exported, merged=False).encode())


def _write_merged(exported: Exported, out: Path) -> None:
    """The full model in the base model's own precision; the product is added in fp32 and rounded once."""
    from transformers import AutoTokenizer

    saved, plan = exported.saved, exported.saved.plan
    folder, dtype, labels = source_folder(plan.model), DTYPES[plan.model.precision], saved.card.labels
    more: dict[str, Any] = {}
    if exported.task == "classification":
        more = {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
        more["label2id"] = {label: i for i, label in enumerate(labels)}
    with quiet_transformers(), torch.no_grad():
        model = stock_class(exported.task).from_pretrained(folder, dtype=dtype, **more)
        for layer, (b, a) in exported.layers.items():
            weight = model.get_submodule(layer).weight
            delta = b.double() @ a.double()
            turned = delta.shape != weight.shape or _is_turned(model.get_submodule(layer))
            weight.copy_((weight.double() + (delta.T if turned else delta)).to(weight.dtype))
        for key, value in exported.whole.items():
            model.get_parameter(key).copy_(value)
        model.save_pretrained(str(out))
        AutoTokenizer.from_pretrained(folder).save_pretrained(str(out))
    write_atomically(out / "README.md", card.text_of(exported, merged=True).encode())


def _is_turned(module: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)  # GPT-2's layers keep their weights transposed


def base_name(plan: Plan) -> str:
    """What a stock loader is to load: the hub's id, or the local folder."""
    folder = source_folder(plan.model)
    local = plan.model.source.startswith("asset:") or Path(plan.model.source).is_dir()
    return str(folder.resolve()) if local else plan.model.source


def _about(plan: Plan, row: Method) -> str:
    return f"{plan.method.name} with private = {plan.private.kind}"
