"""Over 70 model families: each works in every step as stock PEFT does, or is refused with one clear sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from colora.client.artifacts.export import export
from colora.client.artifacts.predict import Predictor
from colora.client.training.adapted_model import attach_adapters
from colora.client.training.state_store import StateStore
from colora.client.training.trainer import Trainer
from colora.common.adapters.fit import check_fit
from colora.common.adapters.initialization import initial_shared_state
from colora.common.config.schema import AdapterSettings, EvaluationSettings, ModelSettings, Plan, TrainSettings, to_json
from colora.common.dataset import SiteDataset
from colora.common.errors import ColoraError
from colora.common.models.base_model import load_base_model
from colora.common.models.saved import SavedModel, read_saved_model
from colora.common.protocol.types import TrainRequest
from tests.families import DECODERS, ENCODERS, SEQ2SEQ, save_tiny
from tests.tables import show_table

CLOSE = 1e-5  # of the largest logit, in fp32
TEXTS = ["red a b c", "blue cat dog sun moon sea hill a b", "green x"]
LABELS = ("no", "yes")
COLUMNS = ("family", "task", "train", "export", "merge", "predict")


def rows_of(task: str) -> list[dict[str, Any]]:
    if task == "generation":
        return [{"prompt": text, "completion": text.split()[-1]} for text in TEXTS * 2]
    return [{"text": text, "label": LABELS[i % 2]} for i, text in enumerate(TEXTS * 2)]


@dataclass
class Trained:
    """A site's model after one round, and its logits for each text alone."""

    task: str
    base: Path
    saved: SavedModel
    logits: list[np.ndarray]


def train(base: Path, task: str, folder: Path) -> Trained:
    """Check, train and save as a site does."""
    settings = TrainSettings(steps=5, batch_size=4, lr=0.05)
    model, measure = (
        ModelSettings(str(base), max_length=32, device="cpu"),
        EvaluationSettings(every=0, max_new_tokens=4),
    )
    plan = Plan("fed", 1, model, adapter=AdapterSettings(4, 8.0), train=settings, evaluation=measure)
    check_fit(plan, {task})
    loaded = load_base_model(model, generates=task == "generation")
    rows, labels = rows_of(task), LABELS if task == "classification" else ()
    site = SiteDataset("ada", task, rows, rows[:3], labels)  # type: ignore[arg-type]
    trainer = Trainer(attach_adapters(loaded, plan), site, StateStore(folder, "fed"))
    shared = initial_shared_state(plan, len(labels))
    trainer.handle(TrainRequest("fed", 1, "train", 0, to_json(plan), shared, False))
    saved = read_saved_model(folder)
    trainer.load(dict(saved.shared), {k: torch.as_tensor(v) for k, v in saved.personal.items()})
    return Trained(task, base, saved, list(logits_of(trainer.task.module, loaded.tokenizer)))


@torch.no_grad()
def logits_of(model: Any, tokenizer: Any) -> Iterator[np.ndarray]:
    """The logits of each text alone: those of its last token where the model generates."""
    model.eval()
    for text in TEXTS:
        batch = tokenizer([text], return_tensors="pt", return_token_type_ids=False)
        out = model(**batch).logits
        yield out.float().numpy().reshape(-1, out.shape[-1])[-1]


def difference(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """The largest difference of two logits, relative to the largest logit."""
    return float(max(np.abs(a - b).max() for a, b in zip(one, other, strict=True)) / np.abs(np.stack(one)).max())


def stock(trained: Trained, folder: Path, *, merged: bool) -> list[np.ndarray]:
    """The logits of Transformers and PEFT alone, of an export in ``folder``."""
    generates = trained.task == "generation"
    kind = AutoModelForCausalLM if generates else AutoModelForSequenceClassification
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if merged:
        return list(logits_of(kind.from_pretrained(folder, dtype=torch.float32), tokenizer))
    config = transformers.AutoConfig.from_pretrained(folder / "config")
    model = kind.from_pretrained(trained.base, config=config, dtype=torch.float32, ignore_mismatched_sizes=True)
    return list(logits_of(PeftModel.from_pretrained(model, folder), tokenizer))


def exported(trained: Trained, folder: Path, *, merged: bool) -> str:
    export(trained.saved, folder, merge=merged)
    apart = difference(trained.logits, stock(trained, folder, merged=merged))
    close = CLOSE * 10 if merged else CLOSE  # a merged weight is rounded before its product with the input
    return "works" if apart < close else f"DIFFERS by {apart:.1e}"


def predicted(trained: Trained) -> str:
    """Compare the predictions for all texts in one batch with the logits of each text alone."""
    predictor = Predictor(trained.saved, device="cpu")
    if trained.task == "generation":
        together = [p["completion"] for p in predictor.predict([{"prompt": text} for text in TEXTS])]
        alone = [next(predictor.predict([{"prompt": text}]))["completion"] for text in TEXTS]
        return "works" if together == alone else f"DIFFERS: {together} in a batch, {alone} alone"
    together = [p["probabilities"] for p in predictor.predict([{"text": text} for text in TEXTS])]
    apart = max(
        abs(p[label] - q)
        for p, logits in zip(together, trained.logits, strict=True)
        for label, q in zip(LABELS, torch.softmax(torch.tensor(logits), 0).tolist(), strict=True)
    )
    return "works" if apart < CLOSE * 10 else f"DIFFERS by {apart:.1e}"


def outcome(step: Callable[[], Any]) -> tuple[Any, str]:
    """The result of a step and its cell: works, the sentence of a refusal, or a fault."""
    try:
        result = step()
    except ColoraError as error:
        sentence = str(error)
        return None, sentence if "\n" not in sentence else f"FAULT: lines in {sentence!r}"
    except Exception as error:
        return None, f"FAULT: {type(error).__name__}: {error}"
    return result, result if isinstance(result, str) else "works"


def row_of(family: str, base: Path, task: str, folder: Path) -> list[str]:
    trained, cell = outcome(lambda: train(base, task, folder / "state"))
    cells = [family, task, cell.replace(str(base), "FOLDER")]
    if trained is None:
        return [*cells, "", "", ""]
    adapter, merged = folder / "adapter", folder / "merged"
    cells.append(outcome(lambda: exported(trained, adapter, merged=False))[1])
    cells.append(outcome(lambda: exported(trained, merged, merged=True))[1])
    cells.append(outcome(lambda: predicted(trained))[1])
    return cells


GROUPS = {"encoders": ENCODERS, "encoder-decoders": SEQ2SEQ, "decoders": DECODERS}
WORKING = {"encoders": 20, "encoder-decoders": 0, "decoders": 50}  # families that can be trained for a task at least


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Transformers and PEFT, about single families
@pytest.mark.parametrize("group", GROUPS)
def test_every_family_works_or_is_refused_in_one_sentence(group: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    table: list[list[str]] = []
    for family in GROUPS[group]:
        base = save_tiny(family, tmp_path / family / "base")
        table += [row_of(family, base, task, tmp_path / family / task) for task in ("classification", "generation")]
    show_table(f"families-{group}", COLUMNS, table)
    wrong = [row for row in table if any("FAULT" in cell or "DIFFERS" in cell for cell in row)]
    assert not wrong, "\n".join(" | ".join(row) for row in wrong)
    assert len({row[0] for row in table if row[2] == "works"}) >= WORKING[group]


STOCK_PROCESS = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
found = {}
for name, folder in json.load(sys.stdin).items():
    code = open(f"{folder}/README.md").read().partition("```python\\n")[2].partition("```")[0]
    names = {}
    exec(code.replace("HERE", folder), names)
    model, tokenizer = names["model"].eval(), names["tokenizer"]
    with torch.no_grad():
        for text in TEXTS:
            out = model(**tokenizer([text], return_tensors="pt", return_token_type_ids=False)).logits
            found.setdefault(name, []).append(out.float().reshape(-1, out.shape[-1])[-1].tolist())
assert "colora" not in sys.modules
print(json.dumps(found))
"""
BY_CARD = {
    **dict.fromkeys(("bert", "roberta", "electra", "deberta-v2", "albert"), "classification"),
    **dict.fromkeys(("gpt2", "llama", "qwen2", "mistral", "gpt_neox"), "generation"),
}


@pytest.mark.slow
def test_ten_families_are_loaded_by_the_code_of_their_model_cards(tmp_path: Path) -> None:
    """In a fresh process, without colora. The logits are those of the trained model."""
    torch.set_num_threads(1)
    trained, folders = {}, {}
    for family, task in BY_CARD.items():
        base = save_tiny(family, tmp_path / family / "base")
        trained[family] = train(base, task, tmp_path / family / "state")
        folders[family] = str(tmp_path / family / "adapter")
        export(trained[family].saved, Path(folders[family]))
    code = f"TEXTS = {TEXTS!r}\n{STOCK_PROCESS}"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(folders),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    for family, logits in json.loads(ran.stdout.splitlines()[-1]).items():
        assert difference(trained[family].logits, [np.array(row) for row in logits]) < CLOSE, family


def test_the_table_has_at_least_70_families() -> None:
    assert len({family for group in GROUPS.values() for family in group}) >= 70
