"""Base models of several architectures, their heads and their fingerprints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
)

from colora.common.adapters.initialization import head_layout
from colora.common.config.schema import ModelSettings, Plan
from colora.common.dataset import SiteDataset
from colora.common.models.architecture import skeleton
from colora.common.models.base_model import load_base_model
from colora.common.models.sources import fingerprint
from colora.common.tasks import build_task

SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
ARCHITECTURES = {
    "bert": (BertModel, BertConfig(**SIZES, pad_token_id=0), {"classifier"}),
    "distilbert": (
        DistilBertModel,
        DistilBertConfig(vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=32, pad_token_id=0),
        {"pre_classifier", "classifier"},
    ),
    "roberta": (RobertaModel, RobertaConfig(**SIZES, pad_token_id=0, max_position_embeddings=70), {"classifier"}),
    "llama": (LlamaModel, LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0), {"score"}),
}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, tiny_bert: Path, tmp_path: Path) -> tuple[Path, set[str]]:
    """A random model folder of one architecture, with the tiny tokenizer, and the names of its head's modules."""
    kind, config, heads = ARCHITECTURES[request.param]
    torch.manual_seed(0)
    kind(config).save_pretrained(tmp_path)
    for file in tiny_bert.glob("*token*"):
        shutil.copy(file, tmp_path)
    return tmp_path, heads


def test_a_classifier_has_the_head_of_its_architecture_and_can_be_probed(architecture: tuple[Path, set[str]]) -> None:
    folder, heads = architecture
    settings = ModelSettings(str(folder), max_length=16)
    rows = [{"text": f"red {w} cat", "label": "yn"[i % 2]} for i, w in enumerate("abcdefgh")]
    plan = Plan(name="x", rounds=1, model=settings)
    task = build_task(
        SiteDataset("ada", "classification", rows, rows, ("n", "y")), load_base_model(settings, generates=False), plan
    )
    assert {key.split(".")[1] for key in task.head} == heads
    assert {key: tuple(p.shape) for key, p in task.head.items()} == head_layout(skeleton(settings), 2)
    with torch.no_grad():
        for parameter in task.head.values():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    before = task.measure(generate=False)
    assert {"accuracy", "macro_f1"} <= set(task.probe() or {})
    assert task.measure(generate=False) == before, "the probe restores the head"


@pytest.mark.parametrize("labels", ["yn", "ynm"])
def test_a_fitted_linear_head_predicts_as_the_probe(architecture: tuple[Path, set[str]], labels: str) -> None:
    folder, heads = architecture
    settings = ModelSettings(str(folder), max_length=16)
    rows = [{"text": f"red {w} cat", "label": labels[i % len(labels)]} for i, w in enumerate("abcdefgh")]
    site = SiteDataset("ada", "classification", rows, rows, ("never", *labels))
    task = build_task(site, load_base_model(settings, generates=False), Plan(name="x", rounds=1, model=settings))
    with torch.no_grad():
        for parameter in task.head.values():
            parameter.zero_()
    if heads in ({"pre_classifier", "classifier"}, {"classifier"}) and len(task.head) > 2:
        assert not task.fit_head()
        assert all(bool((parameter == 0).all()) for parameter in task.head.values()), "only linear heads are fitted"
        return
    probed = task.probe() or {}
    assert task.fit_head()
    measured = task.measure(generate=False)
    if "score" in heads:  # a head without bias differs from the probe
        assert measured["accuracy"] > 0.7
        assert "never" not in {p["label"] for p in task.predict([{"text": row["text"]} for row in rows])}
    else:
        assert {key: measured[key] for key in probed} == pytest.approx(probed)


def test_a_head_fitted_to_probabilities_predicts_them_on_average(tiny_bert: Path) -> None:
    """The bias of a logistic regression is not penalized, so that its residuals sum to zero."""
    settings = ModelSettings(str(tiny_bert), max_length=16)
    given = [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4], [0.5, 0.1, 0.4]]
    rows = [{"text": f"red {w} cat", "label": "x", "probabilities": p} for w, p in zip("abcd", given, strict=True)]
    site = SiteDataset("ada", "classification", rows, (), ("x", "y", "z"))
    task = build_task(site, load_base_model(settings, generates=False), Plan(name="x", rounds=1, model=settings))
    assert task.fit_head()
    predicted = [list(p["probabilities"].values()) for p in task.predict([{"text": row["text"]} for row in rows])]
    assert torch.tensor(predicted).mean(0).tolist() == pytest.approx(torch.tensor(given).mean(0).tolist(), abs=1e-3)


def test_a_change_in_a_source_file_changes_its_fingerprint_only(tiny_llama: Path, tmp_path: Path) -> None:
    def changed(name: str) -> set[str]:
        folder = tmp_path / name
        shutil.copytree(tiny_llama, folder)
        before = fingerprint(folder)
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        after = fingerprint(folder)
        return {f for f in ("model", "tokenizer", "chat_template") if getattr(before, f) != getattr(after, f)}

    assert changed("model.safetensors") == {"model"}
    assert changed("config.json") == {"model"}
    assert changed("tokenizer.json") == {"tokenizer"}
    assert changed("tokenizer_config.json") == {"tokenizer"}
    assert changed("chat_template.jinja") == {"chat_template"}
