"""Synthetic training rows for a transfer, and the artifacts that a site keeps for the next one."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...common.atomic_io import write_atomically
from ...common.config.schema import ModelSettings, Plan
from ...common.dataset import TASKS, Row, SiteDataset
from ...common.errors import DamagedError, DataError, StateError
from ...common.json_files import parse_json
from ...common.models.base_model import BaseModel, load_base_model
from ...common.models.saved import SavedModel
from ...common.seeds import seed_from
from ...transfer.discriminator import Discriminator
from ...transfer.preparation import TransferArtifacts, generator_settings, prepare, with_generator
from ...transfer.synthesis import ProgressCallback, SynthesisModels, synthesise
from ...transfer.tuned_generator import TunedGenerator
from .pseudo_labels import best_by_titok, pseudo_label

ROWS = "synthetic.jsonl"  # the rows that the new adapter is trained on
TITOK_OVERSAMPLING = 2  # texts labelled per row that TiTok's score keeps


def artifacts_of(saved: SavedModel) -> TransferArtifacts:
    """Return what the site kept for a transfer. Raises StateError where it prepared none."""
    metadata = saved.transfer_metadata
    if not metadata:
        raise not_prepared(saved.path)
    discriminator, tuned_generator = (
        {key: torch.as_tensor(value) for key, value in values.items()}
        for values in (saved.discriminator, saved.tuned_generator)
    )
    return TransferArtifacts(
        tuple(metadata["seeds"]), metadata["about"], metadata["examples"], discriminator, tuned_generator
    )


def not_prepared(path: Path) -> StateError:
    """The error for a state without transfer artifacts."""
    return StateError(
        str(path),
        "seeds that the site kept (transfer.prepare = true in a finished run)",
        "none",
        message=f"{path}: the site kept no seeds for a transfer.",
        hint="Set transfer.prepare = true in the recipe, and finish the run before the transfer.",
    )


def carried_artifacts(saved: SavedModel, plan: Plan) -> TransferArtifacts | None:
    """Return the artifacts that stay valid on the new base model; None unless ``plan.transfer.prepare``.

    The seeds stay. Discriminator and tuned generator stay while the generator and their LoRA's form are the same; the
    tuned generator also needs ``plan.transfer.generator.mode = "tuned"``.
    """
    if not plan.transfer.prepare:
        return None
    artifacts, task = artifacts_of(saved), saved.metadata.task
    new, old = generator_settings(plan, task), generator_settings(saved.plan, task)
    same_generator = (new.source, new.revision) == (old.source, old.revision)
    keep_discriminator, keep_tuned = (
        same_generator and lora.form_of(plan.transfer) == lora.form_of(saved.plan.transfer)
        for lora in (Discriminator, TunedGenerator)
    )
    return dataclasses.replace(
        artifacts,
        discriminator=artifacts.discriminator if keep_discriminator else {},
        tuned_generator=artifacts.tuned_generator if keep_tuned and plan.transfer.generator.mode == "tuned" else {},
    )


def artifacts_for_next_transfer(saved: SavedModel, plan: Plan, rows: Sequence[Row]) -> TransferArtifacts | None:
    """Return the carried artifacts, with missing ones trained on the texts that were accepted for this transfer."""
    artifacts, task = carried_artifacts(saved, plan), saved.metadata.task
    if artifacts is None or artifacts.satisfies(plan.transfer):
        return artifacts
    site = SiteDataset(saved.metadata.site, task, rows, ())  # type: ignore[arg-type]
    with _in_memory(generator_settings(plan, task)) as base:
        return prepare(base, plan, site, seed_from(plan.seed, plan.name, site.site), artifacts)


def synthetic_rows(
    saved: SavedModel, plan: Plan, folder: Path, on_progress: ProgressCallback | None = None
) -> list[Row]:
    """Return synthetic inputs with the source model's answers, as training rows; an earlier call's rows are reused.

    Raises DataError where no text passes the filter or every answer is empty, and DamagedError for a file of an earlier
    call that holds anything else.
    """
    path = folder / ROWS
    if not path.exists():
        artifacts = artifacts_of(saved)
        rows = pseudo_label(saved, _synthetic_texts(saved, plan, artifacts, folder, on_progress))
        if plan.transfer.filter == "titok":
            rows = best_by_titok(saved, rows, plan.transfer.samples or artifacts.examples)
        if not rows:
            raise DataError(
                "transfer",
                "answers of the source model to learn from",
                "only empty ones",
                message=f"The source model {saved.plan.model.source} gave only empty answers to the synthetic texts.",
            )
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        _free_memory()
    return _read_rows(path, saved)


def _read_rows(path: Path, saved: SavedModel) -> list[Row]:
    """Read the rows. Lines end with a newline only, since a text may hold other line breaks."""
    labels = saved.metadata.labels if TASKS[saved.metadata.task].has_labels else None
    *lines, cut = path.read_bytes().split(b"\n")
    try:
        if cut or not lines:
            raise ValueError("a file that was cut")
        return [parse_json(line, lambda row: _is_row(row, labels)) for line in lines]
    except ValueError as error:
        message = f"{path} is damaged: expected one synthetic row on each line, found {error}."
        hint = "Delete it, and repeat the command: the answers are written again."
        raise DamagedError(str(path), "one synthetic row on each line", error, message=message, hint=hint) from None


def _is_row(row: Any, labels: Sequence[str] | None) -> bool:
    """Whether parsed JSON is a row of ``pseudo_label``: with a label and probabilities where there are ``labels``."""
    if not isinstance(row, dict):
        return False
    if labels is not None:
        shares = row.get("probabilities")
        is_whole = row.keys() == {"text", "label", "probabilities"} and isinstance(row["text"], str)
        return is_whole and row["label"] in labels and isinstance(shares, list) and _are_shares(shares, len(labels))
    if row.keys() != {"messages"}:
        return row.keys() == {"prompt", "completion"} and all(isinstance(text, str) for text in row.values())
    turns = row["messages"]
    return isinstance(turns, list) and [_role(turn) for turn in turns] == ["user", "assistant"]


def _are_shares(shares: list[Any], count: int) -> bool:
    return len(shares) == count and all(isinstance(share, float) and 0 <= share <= 1 for share in shares)


def _role(turn: Any) -> str | None:
    is_turn = isinstance(turn, dict) and turn.keys() == {"role", "content"} and isinstance(turn["content"], str)
    return turn["role"] if is_turn else None


def _synthetic_texts(
    saved: SavedModel, plan: Plan, artifacts: TransferArtifacts, folder: Path, on_progress: ProgressCallback | None
) -> list[str]:
    """Generate texts and keep those that pass the filter."""
    metadata, settings = saved.metadata, plan.transfer
    source = generator_settings(saved.plan, metadata.task)
    if settings.filter == "titok":
        samples = TITOK_OVERSAMPLING * (settings.samples or artifacts.examples)
        settings = dataclasses.replace(settings, samples=samples)
    by_target = TASKS[metadata.task].needs_causal_lm and settings.generator.mode == "target"
    model = dataclasses.replace(plan.model, revision=None) if by_target else source
    # Both LoRAs have the form that the source's plan gave them.
    source_generator = dataclasses.replace(saved.plan.transfer.generator, mode=settings.generator.mode)
    source_settings = dataclasses.replace(saved.plan.transfer, generator=source_generator)

    @contextmanager
    def generator() -> Iterator[BaseModel]:
        with _in_memory(model) as base, with_generator(base, model, source_settings, artifacts.tuned_generator):
            yield base

    def accept(texts: list[str]) -> list[bool]:
        with _in_memory(source) as base:
            discriminator = Discriminator(base, source, source_settings, artifacts.dataset_name, 0)
            with discriminator.attached(artifacts.discriminator):
                return discriminator.accepts(texts)

    seed = seed_from(plan.seed, plan.name, metadata.site, "transfer", metadata.fingerprint["model"])
    models = SynthesisModels(generator, accept if settings.filter == "discriminator" else None)
    return synthesise(artifacts, settings, seed, models, folder, on_progress)


@contextmanager
def _in_memory(model: ModelSettings) -> Iterator[BaseModel]:
    base = load_base_model(model, generates=True)
    try:
        yield base
    finally:
        del base
        _free_memory()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
