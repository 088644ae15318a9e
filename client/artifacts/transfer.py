"""``colora transfer``: a site's model on a new base model, from the artifacts that the site kept.

The source model, with the site's adapter, answers synthetic inputs; an adapter on the new base model is trained on
these answers (Trans-LoRA, arXiv 2405.17258). The original training data are not read and may be deleted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.adapters.initialization import initial_shared_state
from ...common.atomic_io import write_atomically
from ...common.config.loader import with_overrides
from ...common.config.schema import Plan, PrivacySettings, parse, to_dict, to_json
from ...common.dataset import TASKS, SiteDataset
from ...common.digest import digest
from ...common.errors import ConfigError, StateError
from ...common.json_files import read_json
from ...common.models.architecture import check_generates
from ...common.models.assets import file_sha256
from ...common.models.base_model import load_base_model
from ...common.models.saved import FILES, SavedModel, read_saved_model
from ...common.protocol.types import TrainReply, TrainRequest
from ...common.training.loop import StepCallback
from ...transfer.preparation import TEXT_TASKS, TransferArtifacts, check_preparation
from ...transfer.synthesis import ProgressCallback
from ..training.adapted_model import attach_adapters
from ..training.state_store import StateStore
from ..training.trainer import Trainer
from .synthetic_data import (
    artifacts_for_next_transfer,
    artifacts_of,
    carried_artifacts,
    not_prepared,
    synthetic_rows,
)

HELD_OUT = 0.2  # share of the synthetic rows that a federation evaluates on
JOB = "transfer.json"  # identifies the transfer that an output folder belongs to


@dataclass(frozen=True)
class TransferResult:
    """The state file of the transferred model, and the numbers of synthetic examples used and requested.

    ``agreement`` is the share of the examples that the new model labels as the old one does; None for free text.
    """

    state: Path
    examples: int
    requested: int
    agreement: float | None
    seconds: float


def transfer_plan(saved: SavedModel, to: str, overrides: tuple[str, ...] = ()) -> Plan:
    """Return the source's plan on base model ``to``, with ``key.path=value`` overrides. Raises ConfigError."""
    raw = to_dict(saved.plan)
    raw["model"] = {key: value for key, value in raw["model"].items() if key != "revision"} | {"source": to}
    return parse(Plan, with_overrides(raw, overrides))


def check_changes(saved: SavedModel, plan: Plan) -> None:
    """Raise ConfigError where the plan changes nothing, StateError for a state that is not a site's model of texts."""
    new, old = ((p.model.source, p.adapter, p.method, p.private) for p in (plan, saved.plan))
    if new == old:
        raise ConfigError(
            "--to",
            "another base model than the source's, or another adapter",
            f"{plan.model.source!r}, as the source",
            message=f"--to {plan.model.source}: the model is already on this base model with this adapter.",
            hint="Choose another base model, or change the adapter with --set.",
        )
    if not saved.is_personal:
        raise StateError(
            str(saved.path),
            "a site's model",
            "a checkpoint",
            message=f"{saved.path} is a checkpoint, which all sites share.",
            hint="Name a site's folder: sites/NAME in the run folder.",
        )
    if saved.metadata.task not in TEXT_TASKS:
        task = saved.metadata.task or "no task"
        raise StateError(
            str(saved.path),
            f"a model for {' or '.join(TEXT_TASKS)}",
            task,
            message=f"{saved.path}: only models for {' or '.join(TEXT_TASKS)} can be transferred, not {task}.",
        )


def transfer(
    saved: SavedModel,
    plan: Plan,
    out: Path,
    *,
    on_progress: ProgressCallback | None = None,
    on_step: StepCallback | None = None,
) -> TransferResult:
    """Transfer a site's model to ``plan.model``; the same call continues an interrupted transfer.

    Raises StateError where the site prepared nothing or ``out`` belongs to another transfer, ModelError where no model
    can generate texts, DataError where no text passes the filter.
    """
    started = time.monotonic()
    check_changes(saved, plan)
    check_transfer(saved, plan)
    requested = plan.transfer.samples or artifacts_of(saved).examples
    shared = initial_shared_state(plan, len(saved.metadata.labels))
    claim_output(saved, plan, out)
    rows = synthetic_rows(saved, plan, out, on_progress)
    plan = _distillation_plan(saved, plan, len(rows))
    metadata, artifacts = saved.metadata, artifacts_for_next_transfer(saved, plan, rows)
    base = load_base_model(plan.model, generates=TASKS[metadata.task].needs_causal_lm)
    site = SiteDataset(metadata.site, metadata.task, rows, (), metadata.labels)  # type: ignore[arg-type]
    trainer = Trainer(attach_adapters(base, plan), site, StateStore(out, plan.name), artifacts=artifacts)
    reply = trainer.handle(TrainRequest(plan.name, 1, "train", 0, to_json(plan), shared, evaluate=False), on_step)
    agreement = _agreement(trainer, reply) if TASKS[metadata.task].has_labels else None
    return TransferResult(trainer.store.path(1), len(rows), requested, agreement, time.monotonic() - started)


def _distillation_plan(saved: SavedModel, plan: Plan, examples: int) -> Plan:
    """One round of joint training for ``transfer.distillation.epochs`` epochs over the synthetic rows."""
    batches = math.ceil(examples / plan.train.batch_size)
    train = dataclasses.replace(
        plan.train,
        schedule="joint",
        phase=(),
        steps=batches * plan.transfer.distillation.epochs,
        epochs=None,
        final_steps=0,
        head_init=plan.train.head_init or "random",  # a fitted head gains nothing in training this long
        lr=plan.transfer.distillation.lr,
        lr_schedule="linear",
        warmup_steps=0,
        warmup_ratio=0.0,
        weight_decay=0.0,
    )
    settings = dataclasses.replace(plan.transfer, source_federation=saved.plan.name)
    return dataclasses.replace(plan, rounds=1, train=train, transfer=settings, privacy=PrivacySettings())


def _agreement(trainer: Trainer, reply: TrainReply) -> float:
    """The share of a classifier's synthetic texts that the state of round 1 labels as the source model does."""
    state, rows = trainer.store.state(1), trainer.task.rows.train
    assert state
    trainer.load(reply.shared, state.tensors)
    predictions = trainer.task.predict([{"text": row["text"]} for row in rows])
    return statistics.mean(p["label"] == row["label"] for p, row in zip(predictions, rows, strict=True))


def check_transfer(saved: SavedModel, plan: Plan) -> None:
    """Raise, before anything is written, what would end the transfer later.

    StateError where the site did not keep what is needed, ModelError where a model that must generate cannot,
    ConfigError for a filter that the task does not have, and what ``check_preparation`` raises for the next
    transfer.
    """
    artifacts, task, kind = artifacts_of(saved), saved.metadata.task, plan.transfer.filter
    if kind == "titok" and not TASKS[task].needs_causal_lm:
        raise ConfigError(
            "transfer.filter",
            "discriminator or none for classification",
            kind,
            message="transfer.filter = titok needs a generation task.",
            hint="For classification use discriminator or none.",
        )
    if kind == "discriminator" and not artifacts.discriminator:
        raise StateError(
            str(saved.path),
            "a discriminator",
            "none",
            message=f"{saved.path} has no discriminator: the run prepared with another transfer.filter.",
            hint="Set transfer.filter to the value that the run prepared with.",
        )
    if plan.transfer.generator.mode == "tuned" and not artifacts.tuned_generator:
        raise StateError(
            str(saved.path),
            "a tuned generator",
            "none",
            message=f"{saved.path} has no tuned generator: the run prepared with another transfer.generator.mode.",
            hint="Set transfer.generator.mode to the value that the run prepared with.",
        )
    if TASKS[task].needs_causal_lm:
        check_generates(plan.model)
    if plan.transfer.prepare:
        check_preparation(plan, SiteDataset(saved.metadata.site, task, (), ()), artifacts)  # type: ignore[arg-type]


def rows_on_new_base(plan: Plan, states: Path, folder: Path) -> tuple[SiteDataset, TransferArtifacts | None]:
    """Return a site's data in a federation that transferred, and the artifacts it keeps for the next transfer.

    The data are synthetic inputs with the old model's answers, split into training and test rows. ``states`` is the
    site's state folder in the federation ``plan.transfer.source_federation``; ``folder`` stores the synthetic texts.
    Raises StateError where the site prepared nothing.
    """
    if not is_prepared(states):
        raise not_prepared(states)
    saved = read_saved_model(states)
    check_transfer(saved, plan)
    rows, metadata = synthetic_rows(saved, plan, folder), saved.metadata
    held_out = max(1, round(HELD_OUT * len(rows)))
    train, test = rows[held_out:], rows[:held_out]
    site = SiteDataset(metadata.site, metadata.task, train, test, metadata.labels)  # type: ignore[arg-type]
    return site, carried_artifacts(saved, plan)


def is_prepared(states: Path) -> bool:
    """Whether this folder has a state with transfer artifacts."""
    return bool(list(states.glob(FILES))) and read_saved_model(states).transfer_metadata is not None


def claim_output(saved: SavedModel, plan: Plan, out: Path) -> None:
    """Mark a new folder as this transfer's. Raises StateError where it belongs to another one or is damaged."""
    job = {"source": file_sha256(saved.path), "plan": digest(to_json(plan))}
    path = out / JOB
    if path.exists():
        if read_json(path, _is_job, "two hashes", "Choose another --out.") != job:
            raise StateError(
                f"--out {out}",
                "a new folder, or this transfer's (same STATE, --to and --set)",
                "another transfer's",
                message=f"--out {out} belongs to another transfer.",
                hint="Choose another --out, or repeat the command with the same STATE, --to and --set.",
            )
    elif out.exists() and any(out.iterdir()):
        raise StateError(
            f"--out {out}",
            "a new or empty folder",
            "other files",
            message=f"--out {out} is not empty.",
            hint="Choose another --out.",
        )
    else:
        write_atomically(path, json.dumps(job).encode())


def _is_job(job: Any) -> bool:
    return isinstance(job, dict) and job.keys() == {"source", "plan"} and all(isinstance(v, str) for v in job.values())
