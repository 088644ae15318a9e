"""``colora transfer``: a site's model on a new base model, from what it kept: seeds, discriminator, tuned writer.

The source model with the site's adapter answers synthetic inputs; the new base model's adapter learns those answers
(Trans-LoRA, arXiv 2405.17258). The data that the source was trained on are not read, and need not be there any more.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ...common.adapters.initialization import initial_shared_state
from ...common.atomic_io import write_atomically
from ...common.config.loader import with_overrides
from ...common.config.schema import ModelSettings, Plan, digest, parse, to_dict, to_json
from ...common.dataset import Row, SiteDataset
from ...common.errors import ConfigError, DataError, StateError
from ...common.models.assets import file_sha256
from ...common.models.base_model import BaseModel, check_generates, load_base_model
from ...common.models.saved import SavedModel, read_saved_model
from ...common.protocol.types import TrainReply, TrainRequest
from ...common.seeds import seed_from
from ...common.training.loop import StepCallback as StepWatch
from ...transfer.discriminator import Discriminator
from ...transfer.preparation import (
    TASKS,
    TransferArtifacts,
    check_preparation,
    generator_settings,
    prepare,
    with_generator,
)
from ...transfer.synthesis import ProgressCallback, SynthesisModels, synthesise
from ...transfer.tuned_generator import TunedGenerator
from ..training.adapted_model import attach_adapters
from ..training.state_store import StateStore
from ..training.trainer import Trainer
from .pseudo_labels import best_by_titok, pseudo_label

HELD_OUT = 0.2  # of the written examples, to measure on in a federation
KEPT = "seeds that the site kept (transfer.prepare = true in a run that has ended)"
JOB, ROWS = "transfer.json", "synthetic.jsonl"
TITOK_OVER = 2  # texts labelled for each one that TiTok's score keeps


@dataclass(frozen=True)
class TransferResult:
    """A model on the new base: its state file, and how many synthetic examples it learnt from, of those wanted.

    ``agreement`` is the share of them that it gives the old model's label; None where answers are free text.
    """

    state: Path
    examples: int
    wanted: int
    agreement: float | None
    seconds: float


def transfer_plan(saved: SavedModel, to: str, overrides: tuple[str, ...] = ()) -> Plan:
    """The source's plan on another base model, with ``key.path=value`` overrides. Raises ConfigError."""
    raw = to_dict(saved.plan)
    raw["model"] = {key: value for key, value in raw["model"].items() if key != "revision"} | {"source": to}
    return parse(Plan, with_overrides(raw, overrides))


def check_changes(saved: SavedModel, plan: Plan) -> None:
    """Raises ConfigError when nothing would change, StateError for a model that is not one of texts."""
    old = saved.plan
    if (plan.model.source, plan.adapter, plan.method, plan.private) == (
        old.model.source,
        old.adapter,
        old.method,
        old.private,
    ):
        wanted = "another base model than the source's, or another adapter"
        raise ConfigError("--to", wanted, f"{plan.model.source!r}, as the source")
    if not saved.is_personal:
        raise StateError(str(saved.path), "one site's model (of a run: sites/NAME)", "what all sites share")
    if saved.metadata.task not in TASKS:
        raise StateError(str(saved.path), "a model of texts", f"one of {saved.metadata.task or 'no task'}")


def transfer(
    saved: SavedModel, plan: Plan, out: Path, *, watch: ProgressCallback | None = None, steps: StepWatch | None = None
) -> TransferResult:
    """Moves a site's model to ``plan.model``; the same call goes on after an interruption.

    Raises StateError where the site prepared nothing or ``out`` is another transfer's, ModelError where nobody can
    write texts, DataError where none passed the filter.
    """
    began = time.monotonic()
    check_changes(saved, plan)
    check_transfer(saved, plan)
    wanted = plan.transfer.samples or artifacts_of(saved).examples
    shared = initial_shared_state(plan, len(saved.metadata.labels))
    claim_output(saved, plan, out)
    rows = synthetic_rows(saved, plan, out, watch)
    batches = math.ceil(len(rows) / plan.train.batch_size)
    train = dataclasses.replace(
        plan.train,
        schedule="joint",
        phase=(),
        steps=batches * plan.transfer.distillation.epochs,
        final_steps=0,
        head_init=plan.train.head_init or "random",  # it learns for as long as it takes: a fitted head gains nothing
        lr=plan.transfer.distillation.lr,
        lr_schedule="linear",
        warmup_steps=0,
        weight_decay=0.0,
    )
    of = dataclasses.replace(plan.transfer, source_federation=saved.plan.name)
    plan = dataclasses.replace(plan, rounds=1, train=train, transfer=of)
    card, kept = saved.metadata, artifacts_for_next_transfer(saved, plan, rows)
    base = load_base_model(plan.model, generates=card.task == "generation")
    site = SiteDataset(card.site, card.task, rows, (), card.labels)  # type: ignore[arg-type]
    trainer = Trainer(attach_adapters(base, plan), site, StateStore(out, plan.name), artifacts=kept)
    reply = trainer.handle(TrainRequest(plan.name, 1, "train", 0, to_json(plan), shared, evaluate=False), steps)
    agreement = _agreement(trainer, reply) if card.task == "classification" else None
    return TransferResult(trainer.store.path(1), len(rows), wanted, agreement, time.monotonic() - began)


def _agreement(trainer: Trainer, reply: TrainReply) -> float:
    """The share of a classifier's written texts that the state after round 1 labels as they are."""
    state, rows = trainer.store.state(1), trainer.task.rows.train
    assert state
    trainer.load(reply.shared, state.tensors)
    said = trainer.task.predict([{"text": row["text"]} for row in rows])
    return statistics.mean(p["label"] == row["label"] for p, row in zip(said, rows, strict=True))


def check_transfer(saved: SavedModel, plan: Plan) -> None:
    """Raises, before anything is written, what would end a transfer later on.

    StateError where the site did not keep what is needed, ModelError where a model that has to cannot write,
    ConfigError for a filter that the task has not; and what :func:`check_preparation` raises, for the next transfer.
    """
    kept, task, kind = artifacts_of(saved), saved.metadata.task, plan.transfer.filter
    if kind == "titok" and task != "generation":
        raise ConfigError("transfer.filter", "discriminator or none for classification", kind)
    if kind == "discriminator" and not kept.discriminator:
        raise StateError(str(saved.path), "a discriminator (transfer.filter as it was prepared)", "none")
    if plan.transfer.generator.mode == "tuned" and not kept.tuned_generator:
        raise StateError(str(saved.path), "a tuned writer (transfer.generator.mode as it was prepared)", "none")
    if task == "generation":
        check_generates(plan.model)
    if plan.transfer.prepare:
        check_preparation(plan, SiteDataset(saved.metadata.site, task, (), ()), kept)  # type: ignore[arg-type]


def artifacts_for_next_transfer(saved: SavedModel, plan: Plan, rows: Sequence[Row]) -> TransferArtifacts | None:
    """What a model on the new base keeps for another transfer, from the texts that were accepted for this one."""
    kept, task = carried_artifacts(saved, plan), saved.metadata.task
    if kept is None or kept.satisfies(plan.transfer):
        return kept
    site = SiteDataset(saved.metadata.site, task, rows, ())  # type: ignore[arg-type]
    with _in_memory(generator_settings(plan, task)) as base:
        return prepare(base, plan, site, seed_from(plan.seed, plan.name, site.site), kept)


def carried_artifacts(saved: SavedModel, plan: Plan) -> TransferArtifacts | None:
    """What a site keeps of what it kept: nothing unless ``plan.transfer.prepare``.

    The seeds stay. So do discriminator and writer while the model that writes does, and their form (else they have to
    be trained anew), and the writer while it is asked for.
    """
    if not plan.transfer.prepare:
        return None
    kept, old, task = artifacts_of(saved), saved.plan, saved.metadata.task
    new_speaker, old_speaker = generator_settings(plan, task), generator_settings(old, task)
    same = (new_speaker.source, new_speaker.revision) == (old_speaker.source, old_speaker.revision)
    judge, writer = (
        same and form.spec_of(plan.transfer) == form.spec_of(old.transfer) for form in (Discriminator, TunedGenerator)
    )
    return dataclasses.replace(
        kept,
        discriminator=kept.discriminator if judge else {},
        tuned_generator=kept.tuned_generator if writer and plan.transfer.generator.mode == "tuned" else {},
    )


def synthetic_rows(saved: SavedModel, plan: Plan, folder: Path, watch: ProgressCallback | None = None) -> list[Row]:
    """Written inputs with the source model's answers, as training rows; those of an earlier call are read again."""
    path = folder / ROWS
    if not path.exists():
        prepared = artifacts_of(saved)
        texts = _texts(saved, plan, prepared, folder, watch)
        rows = pseudo_label(saved, texts)
        if plan.transfer.filter == "titok":
            rows = best_by_titok(saved, rows, plan.transfer.samples or prepared.examples)
        if not rows:
            raise DataError("transfer", "answers of the source model to learn from", "none but empty ones")
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        _free()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_on_new_base(plan: Plan, states: Path, folder: Path) -> tuple[SiteDataset, TransferArtifacts | None]:
    """What a site trains and measures on in a federation that moved: written inputs with its old model's answers.

    Beside it what it keeps for the next move. ``states`` has its state in the federation ``plan.transfer.source_federation``;
    ``folder`` is where the work is kept. Raises StateError where it prepared nothing.
    """
    if not is_prepared(states):
        raise StateError(str(states), KEPT, "none")
    saved = read_saved_model(states)
    check_transfer(saved, plan)
    rows = synthetic_rows(saved, plan, folder)
    held_out = max(1, round(HELD_OUT * len(rows)))
    card = saved.metadata
    site = SiteDataset(card.site, card.task, rows[held_out:], rows[:held_out], card.labels)  # type: ignore[arg-type]
    return site, carried_artifacts(saved, plan)


def is_prepared(states: Path) -> bool:
    """Whether there is a state with seeds in this folder."""
    return bool(list(states.glob("round-*.safetensors"))) and read_saved_model(states).transfer_metadata is not None


def artifacts_of(saved: SavedModel) -> TransferArtifacts:
    """What the site kept. Raises StateError where it prepared nothing."""
    if not saved.transfer_metadata:
        raise StateError(str(saved.path), KEPT, "none")
    discriminator, writer = (
        {key: torch.as_tensor(value) for key, value in values.items()}
        for values in (saved.discriminator, saved.tuned_generator)
    )
    kept = saved.transfer_metadata
    return TransferArtifacts(tuple(kept["seeds"]), kept["about"], kept["examples"], discriminator, writer)


def _texts(
    saved: SavedModel, plan: Plan, prepared: TransferArtifacts, folder: Path, watch: ProgressCallback | None
) -> list[str]:
    """Written texts that the discriminator takes for real."""
    card, settings = saved.metadata, plan.transfer
    source = generator_settings(saved.plan, card.task)
    if settings.filter == "titok":
        settings = dataclasses.replace(settings, samples=TITOK_OVER * (settings.samples or prepared.examples))
    of_target = card.task == "generation" and settings.generator.mode == "target"
    model = dataclasses.replace(plan.model, revision=None) if of_target else source

    of_source = dataclasses.replace(
        saved.plan.transfer,
        generator=dataclasses.replace(saved.plan.transfer.generator, mode=settings.generator.mode),
    )  # its form is the source's

    @contextmanager
    def writer() -> Iterator[BaseModel]:
        with _in_memory(model) as base, with_generator(base, model, of_source, prepared.tuned_generator):
            yield base

    def judge(texts: list[str]) -> list[bool]:
        with _in_memory(source) as base:
            found = Discriminator(base, source, of_source, prepared.dataset_name, 0)
            with found.attached(prepared.discriminator):
                return found.accepts(texts)

    seed = seed_from(plan.seed, plan.name, card.site, "transfer", card.fingerprint["model"])
    needed = judge if settings.filter == "discriminator" else None
    return synthesise(prepared, settings, seed, SynthesisModels(writer, needed), folder, watch)


def claim_output(saved: SavedModel, plan: Plan, out: Path) -> None:
    """Marks a new folder as this transfer's. Raises StateError for another's."""
    job = {"source": file_sha256(saved.path), "plan": digest(to_json(plan))}
    path = out / JOB
    if path.exists():
        if json.loads(path.read_text()) != job:
            wanted = "a new folder, or this transfer begun before (same STATE, --to and --set)"
            raise StateError(f"--out {out}", wanted, "another transfer's")
    elif out.exists() and any(out.iterdir()):
        raise StateError(f"--out {out}", "a new or empty folder", "other files")
    else:
        write_atomically(path, json.dumps(job).encode())


@contextmanager
def _in_memory(model: ModelSettings) -> Iterator[BaseModel]:
    base = load_base_model(model, generates=True)
    try:
        yield base
    finally:
        del base
        _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
