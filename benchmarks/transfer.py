"""Trans-LoRA on real models: MiniLM-L6 ↔ MiniLM-L3 on R8 or 20 Newsgroups, with SmolLM2 as the generator.

python benchmarks/transfer.py [SEEDS] [CALLS] [r8|newsgroups] [source|tuned] [FOLDER]     (0,1,2, 8, r8, source)

Artifacts and generated texts are stored in FOLDER/SEED, if named, and reused from there.

For each direction and seed it prints accuracy on the site's real test texts: of the source with its adapter; of the
target without an adapter (a head fitted to the same generated texts); of the arms; and of the target trained on the
real data. The arms are the 5 seeds only, as many random texts as were accepted, as many unfiltered generated texts,
the accepted texts, and all texts of CALLS calls. For L6 and seed 0 the accepted arm is also transferred back. A tuned
generator may repeat the site's texts, so it prints how many generated texts share ``SHARED_CHARACTERS`` characters
with a training text, and how many unseen real texts do.
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from colora.client.artifacts.predict import Predictor
from colora.client.artifacts.pseudo_labels import pseudo_label
from colora.client.artifacts.synthetic_data import ROWS, synthetic_rows
from colora.client.artifacts.transfer import claim_output, transfer, transfer_plan
from colora.client.data.selection import load_site_rows
from colora.client.training.adapted_model import attach_adapters
from colora.client.training.state_store import StateStore
from colora.client.training.trainer import Trainer
from colora.common.adapters.initialization import initial_shared_state
from colora.common.config.schema import (
    AdapterSettings,
    DataSettings,
    DiscriminatorSettings,
    DistillationSettings,
    EvaluationSettings,
    MethodSettings,
    ModelSettings,
    Plan,
    TrainSettings,
    TransferGeneratorSettings,
    TransferSettings,
    to_json,
)
from colora.common.config.site_schema import SiteSettings
from colora.common.dataset import Row, SiteDataset
from colora.common.models.base_model import load_base_model
from colora.common.models.saved import SavedModel, read_saved_model
from colora.common.protocol.types import TrainRequest
from colora.transfer.preparation import input_of
from colora.transfer.sampling import one_line
from colora.transfer.synthesis import SampleLog

L6, L3, GENERATOR = "asset:minilm-l6", "asset:paraphrase-minilm-l3", "asset:smollm2-135m-instruct"
TRAIN, TEST, STEPS, LENGTH = 64, 200, 100, 32
DIRECTIONS = {"l6-l3": (L6, L3), "l3-l6": (L3, L6)}
DATA = {
    "r8": DataSettings(
        "asset:orange-texts/reuters-r8-train",
        "asset:orange-texts/reuters-r8-test",
        text="Text",
        label="Category",
        labels=("acq", "crude", "earn", "trade"),
        train=TRAIN,
        test=TEST,
    ),
    "newsgroups": DataSettings(
        "asset:20newsgroups/train",
        "asset:20newsgroups/test",
        labels=("rec.autos", "rec.sport.hockey", "sci.med", "sci.space"),
        train=TRAIN,
        test=TEST,
    ),
}
SAMPLES = 250  # requested, as in the paper; a small generator uses up its calls before
BACK = 3  # generator calls of the second transfer
SHARED_CHARACTERS, WORDS = 20, 24  # in common with a training text, within a text's first words
ARMS = ("5 seeds only", "random text", "unfiltered", "filtered", "all generated")


def plan_of(name: str, source: str, seed: int, calls: int, mode: str) -> Plan:
    """A plan for one site that trains a LoRA alone and prepares a transfer."""
    return Plan(
        "bench",
        1,
        ModelSettings(source, max_length=LENGTH),
        seed=seed,
        adapter=AdapterSettings(8, 16.0),
        method=MethodSettings("local"),
        train=TrainSettings(steps=STEPS, batch_size=8, lr=2e-3, head_lr=1e-2, lr_schedule="linear"),
        evaluation=EvaluationSettings(every=0),
        transfer=TransferSettings(
            prepare=True,
            dataset_name=name,
            samples=SAMPLES,
            generator=TransferGeneratorSettings(
                model=GENERATOR,
                mode=mode,  # type: ignore[arg-type]
                batch_size=20,
                max_calls=calls,
                temperature=0.7,
                top_p=0.9,
                max_new_tokens=200,
            ),
            discriminator=DiscriminatorSettings(steps=40, lr=5e-4),
            distillation=DistillationSettings(epochs=15, lr=2e-3),
        ),
    )


def trained(plan: Plan, rows: SiteDataset, folder: Path) -> SavedModel:
    """Train a site for one round and the final personalization, or read its stored state."""
    if (folder / "round-000002.safetensors").exists():
        return read_saved_model(folder)
    trainer = Trainer(
        attach_adapters(load_base_model(plan.model, generates=rows.task == "generation"), plan),
        rows,
        StateStore(folder, plan.name),
    )
    text, first = to_json(plan), initial_shared_state(plan, len(rows.labels))
    reply = trainer.handle(TrainRequest(plan.name, 1, "train", 0, text, first, evaluate=False))
    trainer.handle(TrainRequest(plan.name, 2, "finalize", 1, text, reply.shared, evaluate=False))
    return read_saved_model(folder)


def accuracy(saved: SavedModel, rows: Sequence[Row]) -> float:
    predictions = Predictor(saved).predict([{"text": row["text"]} for row in rows])
    return statistics.mean(p["label"] == row["label"] for p, row in zip(predictions, rows, strict=True))


def probe_accuracy(plan: Plan, rows: list[Row], real: SiteDataset) -> float:
    """Accuracy of the bare target with a logistic regression on the generated texts."""
    site = dataclasses.replace(real, train=rows)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            attach_adapters(load_base_model(plan.model, generates=False), plan), site, StateStore(Path(folder), "bench")
        )
        trainer.load({}, {})
        metrics = trainer.task.probe()
    return (metrics or {})["accuracy"]


def random_texts(seed: int, count: int) -> list[str]:
    """Draw texts of other newsgroups."""
    others = ("talk.politics.misc", "comp.graphics", "misc.forsale", "soc.religion.christian")
    data = DataSettings("asset:20newsgroups/train", labels=others, train=count, test=8)
    rows = load_site_rows(SiteSettings("other", data), seed).train
    return [" ".join(row["text"].split()[:LENGTH]) for row in random.Random(seed).sample(list(rows), count)]


def arms(source: SavedModel, plan: Plan, folder: Path) -> dict[str, list[str]]:
    """Return the training texts of each arm; ``folder`` stores the generated texts of this seed."""
    assert source.transfer_metadata is not None
    filtered = [input_of(row) for row in synthetic_rows(source, plan, folder)]
    generated = list(SampleLog(folder / "written.json").verdicts)
    count = len(filtered)
    texts = (
        source.transfer_metadata["seeds"],
        random_texts(plan.seed, count),
        random.Random(plan.seed).sample(generated, count),
        filtered,
        generated,
    )
    return dict(zip(ARMS, texts, strict=True))


def count_copies(source: SavedModel, texts: Sequence[str], real: Sequence[Row]) -> int:
    """Count the texts that share ``SHARED_CHARACTERS`` characters with a real text that is not a seed."""
    assert source.transfer_metadata is not None
    real_windows = set().union(*(windows(one_line(row["text"])) for row in real))
    real_windows -= set().union(*map(windows, source.transfer_metadata["seeds"]))
    return sum(not real_windows.isdisjoint(windows(text)) for text in texts)


def windows(text: str) -> set[str]:
    return {text[i : i + SHARED_CHARACTERS] for i in range(len(text) - SHARED_CHARACTERS + 1)}


def run_seed(name: str, seed: int, calls: int, mode: str, folder: Path) -> dict[str, dict[str, float]]:
    """Return the accuracy of every contender, by direction.

    Both directions use the same seeds, discriminator and generated texts, which are therefore made once.
    """
    rows, started = load_site_rows(SiteSettings("bench", DATA[name]), seed), time.monotonic()
    old = trained(plan_of(name, L6, seed, calls, mode), rows, folder / "l6")
    print(f"  seed {seed}: prepared after {time.monotonic() - started:.0f} s", flush=True)
    plan = plan_of(name, L3, seed, calls, mode)
    alone = trained(dataclasses.replace(plan, transfer=TransferSettings()), rows, folder / "l3")
    prepared = dataclasses.replace(
        alone,
        plan=plan,
        transfer_metadata=old.transfer_metadata,
        discriminator=old.discriminator,
        tuned_generator=old.tuned_generator,
    )
    sources = {L6: old, L3: prepared}
    ceilings = {model: accuracy(saved, rows.test) for model, saved in sources.items()}
    return {
        word: run_direction(sources[source], target, rows, ceilings, folder / word)
        for word, (source, target) in DIRECTIONS.items()
    }


def run_direction(
    old: SavedModel, target: str, rows: SiteDataset, ceilings: dict[str, float], folder: Path
) -> dict[str, float]:
    """Return the accuracies of one direction; ``ceilings`` are those of both models trained on the real data."""
    source, started = old.plan.model.source, time.monotonic()
    new = transfer_plan(old, target)
    accuracies = {"source with adapter": ceilings[source]}
    chosen = arms(old, new, folder.parent)
    for kind, texts in (("generated", chosen[ARMS[4]]), ("real, unseen", [row["text"] for row in rows.test])):
        copies = count_copies(old, [" ".join(text.split()[:WORDS]) for text in texts], rows.train)
        print(
            f"  {copies} of {len(texts)} texts ({kind}) share {SHARED_CHARACTERS} characters with a training text",
            flush=True,
        )
    for name, inputs in chosen.items():
        labelled = pseudo_label(old, inputs)
        accuracies[name] = accuracy(distil(old, new, labelled, folder / name.replace(" ", "-")), rows.test)
        if name == ARMS[3]:
            accuracies["target without adapter"] = probe_accuracy(new, labelled, rows)
        kinds = " ".join(f"{kind} {n}" for kind, n in Counter(row["label"] for row in labelled).most_common())
        print(
            f"  {name}: {accuracies[name]:.3f} of {len(labelled)} ({kinds}), {time.monotonic() - started:.0f} s",
            flush=True,
        )
    if source == L6 and old.plan.seed == 0:
        first = read_saved_model(folder / ARMS[3])
        back = transfer(first, transfer_plan(first, source, (f"transfer.generator.max_calls={BACK}",)), folder / "back")
        accuracies["two hops, back to the source's base"] = accuracy(read_saved_model(folder / "back"), rows.test)
        print(f"  back: {back.examples} texts, {back.seconds:.0f} s", flush=True)
    accuracies["target on the real data"] = ceilings[target]
    return accuracies


def distil(old: SavedModel, plan: Plan, rows: list[Row], out: Path) -> SavedModel:
    """Transfer with given synthetic rows."""
    claim_output(old, plan, out)
    (out / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    transfer(old, plan, out)
    return read_saved_model(out)


def main() -> None:
    torch.set_num_threads(1)
    given = sys.argv[1:]
    seeds, calls, name, mode, stored = given + ["0,1,2", "8", "r8", "source", ""][len(given) :]
    tables: dict[str, list[dict[str, float]]] = {word: [] for word in DIRECTIONS}
    for seed in map(int, seeds.split(",")):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(stored, str(seed)) if stored else Path(temporary)
            for word, table in run_seed(name, seed, int(calls), mode, folder).items():
                tables[word].append(table)
                print(f"{word}, seed {seed}: {table}", flush=True)
    for word, accuracies in tables.items():
        print(word)
        for contender in max(accuracies, key=len):
            values = [table[contender] for table in accuracies if contender in table]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            each = " ".join(f"{value:.3f}" for value in values)
            print(f"  {contender:36} {statistics.mean(values):.3f} ± {spread:.3f}   {each}", flush=True)


if __name__ == "__main__":
    main()
