"""Trans-LoRA of a model that writes: SmolLM2 with a LoRA to the same base model with another kind of adapter.

python benchmarks/transfer_writing.py FILE [SAMPLES] [source|tuned] [SEED] [FOLDER]     (64, source, 0)

FILE has JSON lines with ``prompt`` and ``completion`` (bigbench.py makes them). Exact match of greedy answers on test
rows that nothing was trained on: the source with its adapter, the base model without one, a CoLoRA that learnt the
source's answers to each arm of texts (as transfer.py), a MultiLoRA that learnt them to the filtered ones, and a CoLoRA
trained on the real rows. What is prepared and written stays in FOLDER, where one is named, and is taken from there.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

from colora.client.artifacts.predict import Predictor
from colora.client.artifacts.pseudo_labels import pseudo_label
from colora.client.artifacts.transfer import transfer_plan
from colora.client.training.adapted_model import attach_adapters
from colora.client.training.state_store import StateStore
from colora.client.training.trainer import Trainer
from colora.common.config.schema import (
    AdapterSettings,
    DiscriminatorSettings,
    DistillationSettings,
    EvaluationSettings,
    MethodSettings,
    ModelSettings,
    Plan,
    TrainSettings,
    TransferGeneratorSettings,
    TransferSettings,
)
from colora.common.dataset import Row, SiteDataset
from colora.common.models.base_model import load_base_model
from colora.common.models.saved import SavedModel
from transfer import ARMS, arms, taught, trained

WRITER = "asset:smollm2-135m-instruct"
TRAIN, TEST = 64, 120
CONTENDERS = (*(("colora", name) for name in ARMS), ("multilora", ARMS[3]))
RATES = {"colora": 2e-3, "multilora": 4e-3}  # a MultiLoRA's scales start at zero


def plan_of(name: str, samples: int, writer: str, seed: int) -> Plan:
    """One site that trains a LoRA alone and prepares."""
    return Plan(
        name,
        1,
        ModelSettings(WRITER, max_length=48),
        seed=seed,
        adapter=AdapterSettings(8, 16.0, target_modules=("q_proj", "v_proj")),
        method=MethodSettings("local"),
        train=TrainSettings(steps=50, batch_size=8, lr=2e-3, lr_schedule="linear"),
        evaluation=EvaluationSettings(every=0, max_new_tokens=6),
        transfer=TransferSettings(
            prepare=True,
            samples=samples,
            generator=TransferGeneratorSettings(
                mode=writer,  # type: ignore[arg-type]
                batch_size=12,
                max_calls=4,
                temperature=0.9,
                top_p=0.95,
                max_new_tokens=160,
            ),
            discriminator=DiscriminatorSettings(steps=20, lr=5e-4),
            distillation=DistillationSettings(epochs=6),
        ),
    )


def rows_of(path: Path, seed: int) -> SiteDataset:
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = random.Random(seed).sample([json.loads(line) for line in lines], TRAIN + TEST)
    return SiteDataset("bench", "generation", rows[:TRAIN], rows[TRAIN:], ())


def matched(answers: list[str], rows: list[Row]) -> float:
    """The share of answers that are the wanted ones, whatever their case and the dots at their ends."""
    pairs = zip(answers, (str(row["completion"]) for row in rows), strict=True)
    return sum(a.strip(" .\n").casefold() == b.strip(" .\n").casefold() for a, b in pairs) / len(rows)


def exact(saved: SavedModel, rows: list[Row]) -> float:
    found = Predictor(saved).predict([{"prompt": row["prompt"]} for row in rows])
    return matched([str(p["completion"]) for p in found], rows)


def bare(plan: Plan, rows: SiteDataset) -> float:
    """The base model without any adapter."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            attach_adapters(load_base_model(plan.model, generates=True), plan),
            rows,
            StateStore(Path(folder), plan.name),
        )
        trainer.load({}, {})
        found = trainer.task.predict([{"prompt": row["prompt"]} for row in rows.test])
        return matched([str(p["completion"]) for p in found], list(rows.test))


def main() -> None:
    torch.set_num_threads(1)
    file, *given = sys.argv[1:]
    samples, writer, seed, kept = given + ["64", "source", "0", ""][len(given) :]
    path, name = Path(file), Path(file).stem
    rows, plan = rows_of(path, int(seed)), plan_of(name, int(samples), writer, int(seed))
    test, quiet = list(rows.test), TransferSettings()
    began = time.monotonic()

    def tell(what: str, value: float) -> None:
        print(f"{name}: {what:32} {value:.3f}   {time.monotonic() - began:.0f} s", flush=True)

    common = max(map(str, (row["completion"] for row in test)), key=[str(row["completion"]) for row in test].count)
    tell(f"always {common!r}", matched([common] * len(test), test))
    with tempfile.TemporaryDirectory() as passing:
        folder = Path(kept or passing)
        old = trained(plan, rows, folder / "source")
        tell("source with adapter (LoRA)", exact(old, test))
        tell("target without adapter", bare(dataclasses.replace(plan, transfer=quiet), rows))
        chosen = arms(old, plan, folder / "written")
        for method, which in CONTENDERS:
            new = transfer_plan(old, WRITER, (f"method.name={method}", f"transfer.distillation.lr={RATES[method]}"))
            texts = pseudo_label(old, chosen[which])
            saved = taught(old, new, texts, folder / f"{method}-{which.replace(' ', '-')}")
            tell(f"{method}, {which} ({len(texts)} texts)", exact(saved, test))
        real = dataclasses.replace(plan, method=MethodSettings("colora"), transfer=quiet)
        tell("colora on the real rows", exact(trained(real, rows, folder / "real"), test))


if __name__ == "__main__":
    main()
