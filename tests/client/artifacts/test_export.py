"""An exported adapter is the personalized model: stock transformers and PEFT, in a process without colora, agree."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from colora.client.artifacts.export import compose, export
from colora.client.artifacts.predict import Predictor, predict_file
from colora.client.data.selection import load_site_rows
from colora.client.training.adapted_model import attach_adapters
from colora.client.training.state_store import StateStore
from colora.client.training.trainer import Trainer
from colora.common.adapters.initialization import initial_shared_state
from colora.common.config.loader import recipe_from
from colora.common.config.schema import to_json
from colora.common.config.site_schema import SiteSettings
from colora.common.errors import ColoraError
from colora.common.methods import METHODS
from colora.common.models.assets import asset_folder
from colora.common.models.base_model import load_base_model
from colora.common.models.saved import SavedModel, read_saved_model
from colora.common.protocol.types import TrainRequest

SIZES = {"vocab_size": 44, "pad_token_id": 0}
WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ARCHITECTURES = {
    "roberta": ("Roberta", {**SIZES, **WIDE, "max_position_embeddings": 66}, ["query", "value"]),
    "distilbert": (
        "DistilBert",
        {**SIZES, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
        ["q_lin", "v_lin"],
    ),
    "gpt2": (
        "GPT2",
        {"vocab_size": 44, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
        ["c_attn", "c_proj"],
    ),
}
PRIVATES = ("none", "lora", "multilora")
CLOSE = 1e-5
STOCK = Path(__file__).with_name("stock.py")
TEXTS = ["red a b", "blue cat dog c d e f", "x"]


@dataclass
class Trained:
    """A site after one round and the final personalization, with its trainer in memory."""

    name: str
    saved: SavedModel
    trainer: Trainer

    def answers(self) -> list:
        """Return what ``colora predict`` returns: label indices, or completions."""
        labels = self.saved.metadata.labels
        if labels:
            return [labels.index(p["label"]) for p in Predictor(self.saved).predict([{"text": t} for t in TEXTS])]
        return [p["completion"] for p in Predictor(self.saved).predict([{"prompt": t} for t in TEXTS])]

    def job(self, name: str, folder: Path, base: str | None) -> dict:
        """Describe this model, exported to ``folder``, as a job for the stock process."""
        tokens = self.saved.plan.evaluation.max_new_tokens
        labels = len(self.saved.metadata.labels)
        return {"name": name, "folder": str(folder), "base": base, "labels": labels, "tokens": tokens}

    def logits(self) -> np.ndarray:
        """Return the personalized model's logits, computed one text at a time."""
        task, tokenizer = self.trainer.task, self.trainer.model.base.tokenizer
        self.trainer.load(dict(self.saved.shared), {k: torch.as_tensor(v) for k, v in self.saved.personal.items()})
        task.module.eval()
        rows = []
        with torch.no_grad():
            for text in TEXTS:
                out = task.module(**tokenizer([text], return_tensors="pt", return_token_type_ids=False)).logits
                rows.append(out.numpy().reshape(-1, out.shape[-1])[-1])
        return np.concatenate(rows)


def train(raw: dict, folder: Path, name: str, max_rank: int | None = None) -> Trained:
    """Train the first site of a recipe for one round and the final personalization, without Flower."""
    recipe = recipe_from(raw)
    plan, site = recipe.plan, recipe.site[0]
    generates = site.data.task == "generation"
    model = attach_adapters(load_base_model(plan.model, generates=generates), plan, max_rank)
    rows = load_site_rows(SiteSettings(site.name, site.data), recipe.seed)
    trainer = Trainer(model, rows, StateStore(folder, plan.name))
    shared = initial_shared_state(plan, len(rows.labels))
    reply = trainer.handle(TrainRequest(plan.name, 1, "train", 0, to_json(plan), shared, False))
    final = TrainRequest(plan.name, 2, "finalize", 1, to_json(plan), dict(reply.shared), True)
    trainer.handle(final)
    return Trained(name, read_saved_model(folder), trainer)


def varied(raw: dict, method: str, private: str) -> dict:
    """Return the recipe with this method and private adapter."""
    steps = {**raw["train"], "steps": 8, "final_steps": 8, "lr": 0.05, "private_lr": 0.05}
    targets = ["value"] if "value" in raw["adapter"]["target_modules"] else ["v_proj", "o_proj"]
    table = {"kind": private, "rank": 2, "modules": 3, "alpha": 5.0, "target_modules": targets}
    return {**raw, "method": {"name": method}, "private": table, "train": steps}


@dataclass(frozen=True)
class Answered:
    """Logits, and label indices or greedy completions, by job name."""

    logits: dict[str, np.ndarray]
    answers: dict[str, list]


@dataclass
class Stock:
    """A process that cannot import colora and runs the model of every job."""

    folder: Path
    process: subprocess.Popen[str]

    def __call__(self, jobs: list[dict]) -> Answered:
        assert self.process.stdin
        assert self.process.stdout
        work, out = self.folder / "jobs.json", self.folder / "logits.npz"
        work.write_text(json.dumps({"jobs": jobs, "texts": TEXTS, "out": str(out)}))
        print(work, file=self.process.stdin, flush=True)
        assert "done\n" in self.process.stdout, (self.folder / "errors").read_text()[-3000:]
        return Answered(dict(np.load(out)), json.loads(out.with_suffix(".json").read_text()))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    """One process for all tests; its packages are all installed ones except colora."""
    folder = tmp_path_factory.mktemp("stock")
    packages = folder / "packages"
    packages.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            if "colora" not in entry.name.lower() and entry.suffix != ".pth":
                (packages / entry.name).symlink_to(entry)
    with (folder / "errors").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-S", str(STOCK)],
            env={**os.environ, "PYTHONPATH": str(packages)},
            cwd=packages,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    yield Stock(folder, process)
    process.communicate()


KINDS = ("classification", "generation")
SOME = list(zip(cycle(KINDS), METHODS, cycle(PRIVATES), strict=False))  # every kind with every private adapter


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(SOME, id="some"),
        *(pytest.param(list(product(KINDS, METHODS, [p])), id=p, marks=pytest.mark.slow) for p in PRIVATES),
    ],
)
def test_each_method_with_each_private_adapter_is_what_stock_peft_loads(
    cases: list[tuple[str, str, str]], tiny_recipe: dict, generation_recipe: dict, tmp_path: Path, stock: Stock
) -> None:
    raws = {"classification": tiny_recipe, "generation": generation_recipe}
    jobs, ours, answers = [], {}, {}
    for kind, method, private in cases:
        name = f"{kind}-{method}-{private}"
        case = train(varied(raws[kind], method, private), tmp_path / "states" / name, name)
        ours[case.name], predictions = case.logits(), case.answers()
        for merge in (False, True):
            out = tmp_path / "out" / f"{case.name}{'-merged' if merge else ''}"
            export(case.saved, out, merge=merge)
            base = None if merge else case.saved.plan.model.source
            jobs.append(case.job(out.name, out, base))
            ours[out.name], answers[out.name] = ours[case.name], predictions
    result = stock(jobs)
    assert result.answers == answers
    assert len({str(predictions) for predictions in answers.values()}) > len(cases) // 7, (
        "the answers differ between methods"
    )
    logits = result.logits
    assert len(logits) == len(cases) * 2
    worst = {name: float(np.abs(logits[name] - ours[name]).max()) for name in logits}
    assert max(worst.values()) < CLOSE, sorted(worst.items(), key=lambda item: -item[1])[:5]
    bare = stock([{**job, "bare": True} for job in jobs if job["base"]]).logits
    effect = [float(np.abs(bare[name] - ours[name]).max()) for name in bare if not name.startswith("classification")]
    assert min(effect) > 100 * CLOSE, "the adapters have an effect"


def test_a_site_of_a_smaller_rank_exports_an_adapter_of_that_rank(
    tiny_recipe: dict, tmp_path: Path, stock: Stock
) -> None:
    case = train(varied(tiny_recipe, "colora", "none"), tmp_path / "state", "small", max_rank=2)
    export(case.saved, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
    result = stock([case.job("small", tmp_path / "out", case.saved.plan.model.source)])
    assert float(np.abs(result.logits["small"] - case.logits()).max()) < CLOSE
    assert result.answers["small"] == case.answers()


@pytest.mark.slow
def test_architectures_with_other_heads(tiny_recipe: dict, tmp_path: Path, stock: Stock) -> None:
    """RoBERTa's head has submodules, DistilBERT has two heads, GPT-2 has transposed weights and no padding token."""
    tokenizer, jobs, ours = Path(tiny_recipe["model"]["source"]), [], {}
    for name, (kind, sizes, targets) in ARCHITECTURES.items():
        place = tmp_path / name
        shutil.copytree(tokenizer, place)
        for weights in place.glob("*.safetensors"):
            weights.unlink()
        torch.manual_seed(1)
        getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes)).save_pretrained(place)
        raw = varied({**tiny_recipe, "model": {"source": str(place), "max_length": 16}}, "colora", "lora")
        raw["adapter"] = {**raw["adapter"], "target_modules": targets}
        raw["private"] |= {"target_modules": targets[:1]}
        case = train(raw, tmp_path / f"{name}-state", name)
        ours |= dict.fromkeys((f"{name}-out", f"{name}-merged"), case.logits())
        for out, base in ((f"{name}-out", str(place)), (f"{name}-merged", None)):
            export(case.saved, tmp_path / out, merge=base is None)
            jobs.append(case.job(out, tmp_path / out, base))
    for name, logits in stock(jobs).logits.items():
        assert np.abs(logits - ours[name]).max() < CLOSE, name


def test_weights_that_the_source_lacks_are_exported(tiny_recipe: dict, tmp_path: Path, stock: Stock) -> None:
    """A BERT without a pooler, with a LoRA on the pooler: Transformers would initialize the pooler at random."""
    source, place = Path(tiny_recipe["model"]["source"]), tmp_path / "model"
    shutil.copytree(source, place)
    weights = {k: v for k, v in load_file(place / "model.safetensors").items() if "pooler" not in k}
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    raw = varied({**tiny_recipe, "model": {"source": str(place), "max_length": 16}}, "colora", "none")
    raw["adapter"] = {**raw["adapter"], "target_modules": ["query", "dense"]}
    case = train(raw, tmp_path / "state", "a")
    jobs = []
    for out, base in (("out", str(place)), ("merged", None)):
        export(case.saved, tmp_path / out, merge=base is None)
        jobs.append(case.job(out, tmp_path / out, base))
    for name, logits in stock(jobs).logits.items():
        assert np.abs(logits - case.logits()).max() < CLOSE, name


@pytest.mark.filterwarnings("ignore::FutureWarning")  # from PEFT, about Transformers
def test_the_model_cards_code_loads_it_and_equal_models_give_equal_files(tiny_recipe: dict, tmp_path: Path) -> None:
    case = train(varied(tiny_recipe, "colora", "lora"), tmp_path / "state", "a")
    export(case.saved, tmp_path / "out")
    export(case.saved, tmp_path / "again")
    for path in (tmp_path / "out").glob("**/*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "out")).read_bytes(), path.name
    text = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        "round 2 of 2",
        "site**: ada",
        "private adapter: lora",
        "accuracy",
        case.saved.metadata.fingerprint["model"],
    ):
        assert fact in text, fact
    lines = text.partition("```python\n")[2].partition("```")[0].replace("HERE", str(tmp_path / "out"))
    names: dict = {}
    exec(lines, names)
    batch = names["tokenizer"](TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        assert np.abs(names["model"](**batch).logits.numpy().ravel() - case.logits()).max() < CLOSE


def card_of(folder: Path) -> dict[str, Any]:
    """Execute the code of an export's README.md, and return its names."""
    names: dict[str, Any] = {}
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(code.replace("HERE", str(folder)), names)
    return names


@pytest.mark.filterwarnings("ignore::FutureWarning")  # from PEFT, about Transformers
@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_a_base_model_that_is_a_classifier_of_other_labels_gets_the_sites_head(
    merge: bool, tiny_recipe: dict, tmp_path: Path
) -> None:
    place = tmp_path / "model"
    shutil.copytree(tiny_recipe["model"]["source"], place)
    config = transformers.AutoConfig.from_pretrained(place, num_labels=5, problem_type="multi_label_classification")
    transformers.BertForSequenceClassification(config).save_pretrained(place)
    raw = varied({**tiny_recipe, "model": {"source": str(place), "max_length": 16}}, "colora", "none")
    case = train(raw, tmp_path / "state", "a")
    export(case.saved, tmp_path / "out", merge=merge)
    names = card_of(tmp_path / "out")
    model, tokenizer = names["model"].eval(), names["tokenizer"]
    assert [model.config.id2label[i] for i in range(2)] == list(case.saved.metadata.labels)
    assert (model.config.problem_type, model.config.pad_token_id) == ("single_label_classification", 0)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        assert np.abs(model(**batch).logits.numpy().ravel() - case.logits()).max() < CLOSE


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_an_export_carries_the_ids_of_the_training(merge: bool, generation_recipe: dict, tmp_path: Path) -> None:
    """The files of the base model name other ids than its tokenizer: [SEP] as end and [MASK] as padding."""
    place = tmp_path / "model"
    shutil.copytree(generation_recipe["model"]["source"], place)
    for file in ("config.json", "generation_config.json"):
        raw = json.loads((place / file).read_text())
        (place / file).write_text(json.dumps({**raw, "eos_token_id": 3, "pad_token_id": 4}))
    recipe = varied({**generation_recipe, "model": {"source": str(place), "max_length": 32}}, "fedit", "none")
    case = train(recipe, tmp_path / "state", "a")
    export(case.saved, tmp_path / "out", merge=merge)
    names = card_of(tmp_path / "out")
    model, tokenizer = names["model"].eval(), names["tokenizer"]
    ends, padding = [8, 3], 0
    assert (list(case.trainer.model.base.ends), model.generation_config.eos_token_id) == (ends, ends)
    assert (model.generation_config.pad_token_id, model.config.pad_token_id) == (padding, padding)
    assert (tokenizer.padding_side, tokenizer.eos_token, tokenizer.pad_token) == ("left", "<end>", "[PAD]")
    prompts = ["red a cat", "sun b c d e f moon"]
    batch = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**batch, do_sample=False, max_new_tokens=4)[:, batch["input_ids"].shape[1] :]
    said = [tokenizer.decode([i for i in ids if i not in ends], skip_special_tokens=True) for ids in out.tolist()]
    assert said == [p["completion"] for p in Predictor(case.saved).predict([{"prompt": p} for p in prompts])]


def test_an_adapter_names_its_base_model_as_the_recipe_does(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--some--bert" / "snapshots" / "0a1b"
    shutil.copytree(tiny_recipe["model"]["source"], snapshot)
    shutil.copytree(snapshot, tmp_path / "local" / "bert")
    monkeypatch.chdir(tmp_path)
    for source, name in (("local/bert", "local/bert"), (str(snapshot), "some/bert")):
        raw = {**tiny_recipe, "model": {"source": source, "max_length": 16}}
        case = train(raw, tmp_path / f"state-{len(name)}", "a")
        export(case.saved, tmp_path / f"out-{len(name)}")
        config = json.loads((tmp_path / f"out-{len(name)}" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("part", ["shared", "personal"])
def test_the_model_cards_code_loads_a_part(tiny_recipe: dict, tmp_path: Path, part: Any) -> None:
    case = train(varied(tiny_recipe, "colora", "lora"), tmp_path / "state", "a")
    export(case.saved, tmp_path / "out", part)
    text = (tmp_path / "out" / "README.md").read_text()
    assert ("without a head" in text) is (part == "shared")
    names: dict = {}
    exec(text.partition("```python\n")[2].partition("```")[0].replace("HERE", str(tmp_path / "out")), names)
    state, layers = names["model"].state_dict(), compose(case.saved, part).layers
    for layer, (b, a) in layers.items():
        found = [state[f"base_model.model.{layer}.lora_{x}.default.weight"] for x in "BA"]
        assert torch.equal(found[0] @ found[1], b @ a), layer


def test_an_export_of_the_shared_part_names_no_site(tiny_recipe: dict, tmp_path: Path) -> None:
    case = train(varied(tiny_recipe, "colora", "lora"), tmp_path / "state", "a")
    export(case.saved, tmp_path / "out", "shared")
    text = (tmp_path / "out" / "README.md").read_text()
    for secret in ("ada", *case.saved.metadata.labels, "accuracy"):
        assert not re.search(rf"\b{secret}\b", text), secret
    with pytest.raises(ColoraError, match="the site's own version of the shared adapter, from round 1"):
        export(read_saved_model(case.trainer.store.path(1)), tmp_path / "no", "shared")


@pytest.mark.slow
@pytest.mark.parametrize(("source", "kind"), [("minilm-l6", "classification"), ("smollm2-135m-instruct", "generation")])
def test_real_models_as_well(
    source: str, kind: str, tiny_recipe: dict, generation_recipe: dict, tmp_path: Path, stock: Stock
) -> None:
    raw = tiny_recipe if kind == "classification" else generation_recipe
    raw = {**varied(raw, "colora", "multilora"), "model": {"source": f"asset:{source}", "max_length": 16}}
    raw["train"] = {**raw["train"], "steps": 2, "final_steps": 2, "lr": 0.01, "private_lr": 0.01}
    raw["evaluation"] = {"max_new_tokens": 8}
    case = train(raw, tmp_path / "state", kind)
    jobs = []
    for name, merge in (("adapter", False), ("merged", True)):
        export(case.saved, tmp_path / name, merge=merge)
        base = None if merge else str(asset_folder(source))
        jobs.append(case.job(name, tmp_path / name, base))
    ours, found = case.logits(), stock(jobs)
    assert found.answers == dict.fromkeys(("adapter", "merged"), case.answers())
    for name, logits in found.logits.items():
        assert np.abs(logits - ours).max() < CLOSE * max(1.0, np.abs(ours).max()), name


@pytest.mark.slow
def test_the_shared_and_the_personal_part_sum_to_the_whole(tiny_recipe: dict, tmp_path: Path) -> None:
    for method in METHODS:
        saved = train(varied(tiny_recipe, method, "multilora"), tmp_path / method, method).saved
        whole, personal = compose(saved), compose(saved, "personal")
        parts = [personal]
        if saved.plan.method.row().averages_products or method == "ffa":
            parts.append(compose(saved, "shared"))
        for layer, (b, a) in whole.layers.items():
            total = sum((p.layers[layer][0] @ p.layers[layer][1] for p in parts if layer in p.layers), torch.zeros(1))
            if len(parts) > 1 or method in ("local", "fedsa"):
                assert torch.allclose(total, b @ a, atol=1e-6), (method, layer)


def test_predictions_are_those_of_the_stock_model(tiny_recipe: dict, generation_recipe: dict, tmp_path: Path) -> None:
    case = train(varied(tiny_recipe, "colora", "lora"), tmp_path / "a", "a")
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    told: list[tuple[int, int]] = []
    found = predict_file(case.saved, source, batch_size=1, on_row=lambda *count: told.append(count))
    assert told == [(number, len(found.rows)) for number in range(1, len(found.rows) + 1)]
    rows, truncated = found.rows, found.truncated
    logits = torch.as_tensor(case.logits()).reshape(len(TEXTS), -1).softmax(-1)
    for i, row in enumerate(rows):
        assert (row["id"], row["text"]) == (i, TEXTS[i])
        assert row["label"] == case.saved.metadata.labels[int(logits[i].argmax())]
        assert list(row["probabilities"].values()) == pytest.approx(logits[i].tolist(), abs=1e-6)
    assert truncated == 0
    generator = train(varied(generation_recipe, "colora", "lora"), tmp_path / "b", "b")
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    rows = predict_file(generator.saved, source, batch_size=2).rows
    generator.trainer.load(
        dict(generator.saved.shared), {k: torch.as_tensor(v) for k, v in generator.saved.personal.items()}
    )
    tokenizer = generator.trainer.model.base.tokenizer
    assert [r["completion"] for r in rows] == generator.trainer.task.answers([tokenizer(t)["input_ids"] for t in TEXTS])  # type: ignore[attr-defined]


def test_errors_of_an_export(tiny_recipe: dict, tmp_path: Path) -> None:
    saved = train(varied(tiny_recipe, "colora", "none"), tmp_path / "a", "a").saved
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for arguments, words in (
        ({"out": tmp_path / "full"}, "--out .* is not empty"),
        ({"out": tmp_path / "n", "part": "shared", "merge": True}, "cannot be combined with --only shared"),
    ):
        with pytest.raises(ColoraError, match=words):
            export(saved, **arguments)
    alone = train(varied(tiny_recipe, "local", "none"), tmp_path / "b", "b").saved
    with pytest.raises(ColoraError, match="has no shared values"):
        export(alone, tmp_path / "n", "shared")
    with pytest.raises(ColoraError, match="nowhere"):
        read_saved_model(tmp_path / "nowhere")
    assert not (tmp_path / "n").exists()


@pytest.mark.slow
def test_a_changed_base_model_is_refused(tiny_recipe: dict, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(tiny_recipe["model"]["source"], copy)
    raw = {**tiny_recipe, "model": {**tiny_recipe["model"], "source": str(copy)}}
    saved = train(varied(raw, "colora", "none"), tmp_path / "a", "a").saved
    Predictor(saved)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "more": 1}))
    with pytest.raises(ColoraError, match="fingerprint"):
        Predictor(saved)
