"""``colora export``: a personalised model as a plain PEFT LoRA, or merged into its base model.

Shared adapter, core and private adapter become one LoRA: the product is exact, every scale stands in B, alpha = rank
and all layers have one rank, so that nothing depends on a convention. Stock transformers and PEFT load it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch

from ...common.adapters.factors import difference, factors_of, padded
from ...common.adapters.initialization import initial_values
from ...common.adapters.inject import attach, inject, layout_of, private_spec
from ...common.config.schema import Plan
from ...common.errors import ConfigError, StateError
from ...common.methods import SHARED, group_of
from ...common.models.base_model import load_base_model, skeleton, stock_class
from ...common.models.hf_logging import quiet_transformers
from ...common.models.precision import DTYPES
from ...common.models.saved import SavedModel
from ...common.models.sources import check_fingerprint, source_folder
from .exported_adapter import ExportedAdapter, FullModel, Part

TASKS = ("classification", "generation")


def export(saved: SavedModel, out: Path, part: Part = "all", *, merge: bool = False) -> ExportedAdapter:
    """Writes a PEFT adapter, or with ``merge`` a full model, to the new or empty folder ``out``, whole or not at all.

    ``shared`` is what all sites have in common (the core as the identity, no personal head); ``personal`` is what this
    site adds to that. Raises StateError or ConfigError for what cannot be exported.
    """
    from .peft_writer import write_adapter, write_merged

    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise StateError(f"--out {out}", "a new or empty folder", "other files")
    if merge and part != "all":
        raise ConfigError("--merge", "the whole model, without --only", f"--only {part}")
    if merge and saved.plan.model.precision not in DTYPES:
        found = f"model.precision = {saved.plan.model.precision}"
        raise ConfigError("--merge", "a base model in fp32, bf16 or fp16: adapters are not merged into others", found)
    exported = compose(saved, part)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as beside:
        place = Path(beside) / "out"
        place.mkdir()
        (write_merged if merge else write_adapter)(exported, place)
        if out.exists():
            out.rmdir()
        place.rename(out)
    return exported


def compose(saved: SavedModel, part: Part = "all") -> ExportedAdapter:
    """The adapter of a saved model, and the tensors beside it. Raises StateError for what there is no adapter of."""
    _check(saved, part)
    plan, task = saved.plan, saved.metadata.task
    start, now = _values(saved)
    shared = factors_of({k: v for k, v in start.items() if group_of(k) != "private"}, plan)
    layers = shared if part == "shared" else factors_of(now, plan)
    if part == "personal":
        layers = {layer: f for layer, f in difference(layers, shared).items() if f[0].any()}
    if part != "all" and not any(b.any() for b, _ in layers.values()):
        found = f"{plan.method.name} with private = {plan.private.kind}"
        raise StateError(f"--only {part}", f"a method with {part} adapter values", found)
    full = full_model(plan, task, len(saved.metadata.labels))
    heads, missing = _heads(saved, part), _missing(plan, task, full)
    named = {f"{full.prefix}.{layer}": f for layer, f in padded(layers).items()}
    for name in [name for name in named if f"{name}.weight" in missing]:  # saved whole, so the product goes into it
        b, a = named.pop(name)
        missing[f"{name}.weight"] = missing[f"{name}.weight"] + b @ a
    modules = [*full.heads] if heads else []
    modules += sorted({key.rpartition(".")[0] for key in missing})
    return ExportedAdapter(saved, part, named, heads | missing, tuple(modules))


def _check(saved: SavedModel, part: Part) -> None:
    card, source = saved.metadata, saved.plan.model.source
    if source.startswith("synthetic:") or card.task not in TASKS:
        found = f"one of {card.task or 'sites with different tasks: export a site'}"
        raise StateError(str(saved.path), "a model of texts", found)
    if part != "shared" and not saved.is_personal:
        raise StateError(str(saved.path), "a site's state (or --only shared)", "a coordinator's checkpoint")
    if part == "shared" and saved.is_personal and not saved.closed:
        wanted = "the adapter that all sites share: a run's checkpoint, or a site's state after the last round"
        raise StateError(str(saved.path), wanted, f"what the site made of it in round {card.round}")
    check_fingerprint(saved.plan.model, card.fingerprint)


def full_model(plan: Plan, task: str, labels: int) -> FullModel:
    """The full model of a task, from its configuration; ``labels`` is the number of classes of its head."""
    from transformers import AutoConfig

    with quiet_transformers(), torch.device("meta"):
        config = AutoConfig.from_pretrained(source_folder(plan.model))
        if task == "classification":
            config.num_labels = max(labels, 1)
        model: Any = stock_class(task).from_config(config)
    prefix = model.base_model_prefix
    heads = [n for n, m in model.named_children() if n != prefix and list(m.parameters())]
    return FullModel(prefix, tuple(heads) if task == "classification" else (), frozenset(model.state_dict()))


def _values(saved: SavedModel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Adapter values by name: with the shared groups alone, and with the site's own as well."""
    plan, row = saved.plan, saved.plan.row()
    backbone = skeleton(plan.model)
    parameters = attach(backbone, plan.adapter, plan.method.row())
    if plan.private.present:
        parameters |= inject(backbone, private_spec(plan.private, plan.adapter), "private")
    start = initial_values(layout_of(parameters), plan.adapter, plan.seed)
    missing = [k for k in row.having(start, SHARED) if k not in saved.shared]
    if missing:
        raise StateError(str(saved.path), f"the shared adapter with {missing[0]}", "a file without it")
    start |= {k: torch.as_tensor(v) for k, v in saved.shared.items() if k in start}
    own = {k: torch.as_tensor(v) for k, v in saved.personal.items() if k in start}
    return start, start | own


def _heads(saved: SavedModel, part: Part) -> dict[str, torch.Tensor]:
    """The head's tensors by their names in the full model: the site's own, unless only the shared part is wanted."""
    shared = saved.plan.row().head is SHARED
    if (part == "personal" and shared) or (part == "shared" and not shared):
        return {}
    found = saved.shared if shared else saved.personal
    return {k.removeprefix("head."): torch.as_tensor(v) for k, v in found.items() if group_of(k) == "head"}


def _missing(plan: Plan, task: str, full: FullModel) -> dict[str, torch.Tensor]:
    """Weights that the base model's source lacks: elsewhere they would be drawn anew, so they go with the adapter."""
    if task != "classification":
        return {}
    base = load_base_model(dataclasses.replace(plan.model, precision="fp32", device="cpu"), generates=False)
    state = base.backbone.state_dict()
    names = {f"{full.prefix}.{key}": key for key in base.missing if key in state}
    return {name: state[key] for name, key in names.items() if name in full.tensors}
