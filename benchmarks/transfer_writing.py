"""Trans-LoRA of a generation model: from SmolLM2 with a LoRA to the same base model with another adapter.

python benchmarks/transfer_writing.py FILE [SAMPLES] [source|tuned] [SEED] [FOLDER]     (64, source, 0)

FILE has JSON lines with ``prompt`` and ``completion`` (bigbench.py makes them). It prints the exact match of greedy
answers on test rows: of the source with its adapter, of the base model without one, of a CoLoRA trained on the source's
answers to each arm of texts (see transfer.py), of a MultiLoRA trained on its answers to the accepted texts, and of a
CoLoRA trained on the real rows. Artifacts and generated texts are stored in FOLDER, if named, and reused from there.
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
from transfer import ARMS, arms, distil, trained

MODEL = "asset:smollm2-135m-instruct"
TRAIN, TEST = 64, 120
CONTENDERS = (*(("colora", name) for name in ARMS), ("multilora", ARMS[3]))
RATES = {"colora": 2e-3, "multilora": 4e-3}  # distillation; a MultiLoRA's scales start at zero


def plan_of(name: str, samples: int, mode: str, seed: int) -> Plan:
    """A plan for one site that trains a LoRA alone and prepares a transfer."""
    return Plan(
        name,
        1,
        ModelSettings(MODEL, max_length=48),
        seed=seed,
        adapter=AdapterSettings(8, 16.0, target_modules=("q_proj", "v_proj")),
        method=MethodSettings("local"),
        train=TrainSettings(steps=50, batch_size=8, lr=2e-3, lr_schedule="linear"),
        evaluation=EvaluationSettings(every=0, max_new_tokens=6),
        transfer=TransferSettings(
            prepare=True,
            samples=samples,
            generator=TransferGeneratorSettings(
                mode=mode,  # type: ignore[arg-type]
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


def match_rate(answers: list[str], rows: list[Row]) -> float:
    """Return the share of correct answers, ignoring case and final dots."""
    pairs = zip(answers, (str(row["completion"]) for row in rows), strict=True)
    return sum(a.strip(" .\n").casefold() == b.strip(" .\n").casefold() for a, b in pairs) / len(rows)


def exact_match(saved: SavedModel, rows: list[Row]) -> float:
    predictions = Predictor(saved).predict([{"prompt": row["prompt"]} for row in rows])
    return match_rate([str(p["completion"]) for p in predictions], rows)


def bare_match(plan: Plan, rows: SiteDataset) -> float:
    """Return the exact match of the base model without an adapter."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            attach_adapters(load_base_model(plan.model, generates=True), plan),
            rows,
            StateStore(Path(folder), plan.name),
        )
        trainer.load({}, {})
        predictions = trainer.task.predict([{"prompt": row["prompt"]} for row in rows.test])
        return match_rate([str(p["completion"]) for p in predictions], list(rows.test))


def main() -> None:
    torch.set_num_threads(1)
    file, *given = sys.argv[1:]
    samples, mode, seed, stored = given + ["64", "source", "0", ""][len(given) :]
    path, name = Path(file), Path(file).stem
    rows, plan = rows_of(path, int(seed)), plan_of(name, int(samples), mode, int(seed))
    test, no_transfer = list(rows.test), TransferSettings()
    started = time.monotonic()

    def report(what: str, value: float) -> None:
        print(f"{name}: {what:32} {value:.3f}   {time.monotonic() - started:.0f} s", flush=True)

    common = max(map(str, (row["completion"] for row in test)), key=[str(row["completion"]) for row in test].count)
    report(f"always {common!r}", match_rate([common] * len(test), test))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(stored or temporary)
        old = trained(plan, rows, folder / "source")
        report("source with adapter (LoRA)", exact_match(old, test))
        report("target without adapter", bare_match(dataclasses.replace(plan, transfer=no_transfer), rows))
        chosen = arms(old, plan, folder / "generated")
        for method, which in CONTENDERS:
            new = transfer_plan(old, MODEL, (f"method.name={method}", f"transfer.distillation.lr={RATES[method]}"))
            texts = pseudo_label(old, chosen[which])
            saved = distil(old, new, texts, folder / f"{method}-{which.replace(' ', '-')}")
            report(f"{method}, {which} ({len(texts)} texts)", exact_match(saved, test))
        real = dataclasses.replace(plan, method=MethodSettings("colora"), transfer=no_transfer)
        report("colora on the real rows", exact_match(trained(real, rows, folder / "real"), test))


if __name__ == "__main__":
    main()
