"""``colora export``: a personalized model as a plain PEFT LoRA, or merged into its base model.

Shared adapter, core and private adapter become one LoRA with the exact product. B contains every scale, alpha equals
the rank, and all layers have the same rank, so the result does not depend on a scaling convention. Transformers and
PEFT load it without colora.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch

from ...common.adapters.factors import difference, factors_of, padded
from ...common.adapters.initialization import initial_values
from ...common.adapters.inject import attach, inject, layout_of, private_spec
from ...common.config.schema import Plan
from ...common.dataset import TASKS
from ...common.errors import ConfigError, StateError
from ...common.methods import SHARED, group_of
from ...common.models.architecture import skeleton, stock_model
from ...common.models.base_model import load_base_model
from ...common.models.precision import DTYPES
from ...common.models.saved import SavedModel
from ...common.models.sources import check_fingerprint
from .exported_adapter import ExportedAdapter, FullModel, Part

EXPORTABLE_TASKS = tuple(name for name, task in TASKS.items() if task.auto_class)


def export(saved: SavedModel, out: Path, part: Part = "all", *, merge: bool = False) -> ExportedAdapter:
    """Write a PEFT adapter, or with ``merge`` a full model, to the new or empty folder ``out``, atomically.

    Part ``shared`` is what all sites have in common (the core is the identity, without a personal head); ``personal``
    is what this site adds to it. Raises StateError or ConfigError where that cannot be exported.
    """
    from .peft_writer import write_adapter, write_merged

    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise StateError(
            f"--out {out}",
            "a new or empty folder",
            "other files",
            message=f"--out {out} is not empty.",
            hint="Choose another --out.",
        )
    if merge and part != "all":
        raise ConfigError(
            "--merge",
            "the whole model, without --only",
            f"--only {part}",
            message=f"--merge exports the whole model and cannot be combined with --only {part}.",
        )
    precision = saved.plan.model.precision
    if merge and precision not in DTYPES:
        raise ConfigError(
            "--merge",
            f"a base model in {', '.join(DTYPES)}",
            f"model.precision = {precision}",
            message=f"--merge needs a base model in {', '.join(DTYPES)}, not {precision}.",
            hint="Export the adapter without --merge.",
        )
    exported = compose(saved, part)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / "out"
        folder.mkdir()
        (write_merged if merge else write_adapter)(exported, folder)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    return exported


def compose(saved: SavedModel, part: Part = "all") -> ExportedAdapter:
    """Compose a saved model's adapters into one LoRA, with the tensors that go beside it.

    Raises StateError where this part has no adapter values.
    """
    _check(saved, part)
    plan, task = saved.plan, saved.metadata.task
    shared_values, all_values = _values(saved)
    shared = factors_of({k: v for k, v in shared_values.items() if group_of(k) != "private"}, plan)
    layers = shared if part == "shared" else factors_of(all_values, plan)
    if part == "personal":
        layers = {layer: f for layer, f in difference(layers, shared).items() if f[0].any()}
    if part != "all" and not any(b.any() for b, _ in layers.values()):
        found = f"{plan.method.name} with private = {plan.private.kind}"
        raise StateError(
            f"--only {part}",
            f"a method with {part} adapter values",
            found,
            message=f"--only {part}: the model's adapter has no {part} values (method {found}).",
        )
    full = full_model(plan, task, len(saved.metadata.labels))
    heads, missing = _heads(saved, part), _missing(plan, task, full)
    named = {f"{full.prefix}.{layer}": f for layer, f in padded(layers).items()}
    for name in [
        name for name in named if f"{name}.weight" in missing
    ]:  # saved as a full weight with the product added
        b, a = named.pop(name)
        missing[f"{name}.weight"] = missing[f"{name}.weight"] + b @ a
    modules = [*full.heads] if heads else []
    modules += sorted({key.rpartition(".")[0] for key in missing})
    return ExportedAdapter(saved, part, named, heads | missing, tuple(modules))


def _check(saved: SavedModel, part: Part) -> None:
    metadata, source, path = saved.metadata, saved.plan.model.source, str(saved.path)
    tasks = " or ".join(EXPORTABLE_TASKS)
    if not metadata.task:
        raise StateError(
            path,
            f"a model for {tasks}",
            "a checkpoint of sites with different tasks",
            message=f"{path} is a checkpoint of sites with different tasks.",
            hint="Export a site's model instead.",
        )
    if source.startswith("synthetic:") or metadata.task not in EXPORTABLE_TASKS:
        raise StateError(
            path,
            f"a model for {tasks}",
            metadata.task,
            message=f"{path}: only models for {tasks} can be exported, not {metadata.task} on {source}.",
        )
    if part != "shared" and not saved.is_personal:
        raise StateError(
            path,
            "a site's state (or --only shared)",
            "a coordinator's checkpoint",
            message=f"{path} is a checkpoint and has no site's personal values.",
            hint="Name a site's folder, or use --only shared.",
        )
    if part == "shared" and saved.is_personal and not saved.closed:
        raise StateError(
            path,
            "a checkpoint, or a site's state after the last round",
            f"a site's state of round {metadata.round}",
            message=f"{path} has the site's own version of the shared adapter, from round {metadata.round}.",
            hint="Use the run folder or a checkpoint, or the site's state after the last round.",
        )
    check_fingerprint(saved.plan.model, metadata.fingerprint)


def full_model(plan: Plan, task: str, labels: int) -> FullModel:
    """Describe the full model of a task from its configuration; ``labels`` is the number of classes of its head."""
    model = stock_model(plan.model, task, labels)
    prefix = model.base_model_prefix
    heads = [n for n, m in model.named_children() if n != prefix and list(m.parameters())]
    return FullModel(prefix, tuple(heads) if TASKS[task].has_labels else (), frozenset(model.state_dict()))


def _values(saved: SavedModel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the adapter values by name: with the shared groups only, and with the site's own values as well."""
    plan, row = saved.plan, saved.plan.row()
    backbone = skeleton(plan.model)
    parameters = attach(backbone, plan.adapter, plan.method.row())
    if plan.private.present:
        parameters |= inject(backbone, private_spec(plan.private, plan.adapter), "private")
    shared = initial_values(layout_of(parameters), plan.adapter, plan.seed)
    missing = [k for k in row.having(shared, SHARED) if k not in saved.shared]
    if missing:
        raise StateError(
            str(saved.path),
            f"the shared adapter with {missing[0]}",
            "a file without it",
            message=f"{saved.path} is incomplete: the shared adapter's {missing[0]} is missing.",
        )
    shared |= {k: torch.as_tensor(v) for k, v in saved.shared.items() if k in shared}
    own = {k: torch.as_tensor(v) for k, v in saved.personal.items() if k in shared}
    return shared, shared | own


def _heads(saved: SavedModel, part: Part) -> dict[str, torch.Tensor]:
    """Return the head's tensors by their names in the full model; none where the head is not in this part."""
    shared = saved.plan.row().head is SHARED
    if (part == "personal" and shared) or (part == "shared" and not shared):
        return {}
    values = saved.shared if shared else saved.personal
    return {k.removeprefix("head."): torch.as_tensor(v) for k, v in values.items() if group_of(k) == "head"}


def _missing(plan: Plan, task: str, full: FullModel) -> dict[str, torch.Tensor]:
    """Return the weights that the base model's source lacks, which Transformers would initialize at random."""
    if not TASKS[task].has_labels:
        return {}
    base = load_base_model(dataclasses.replace(plan.model, precision="fp32", device="cpu"), generates=False)
    state = base.backbone.state_dict()
    names = {f"{full.prefix}.{key}": key for key in base.missing if key in state}
    return {name: state[key] for name, key in names.items() if name in full.tensors}
