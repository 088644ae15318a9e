"""Pairs of texts, class weights and label smoothing, against stock Transformers, PyTorch and hand arithmetic."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, PreTrainedTokenizerFast

from colora.common.config.schema import ModelSettings, Plan, TrainSettings
from colora.common.dataset import Row, SiteDataset
from colora.common.models.base_model import BaseModel, load_base_model
from colora.common.tasks import build_task
from colora.common.tasks.classification import Classification
from tests.conftest import WORDS
from tests.families import save_tiny

LABELS = ("a", "b", "c")
ROWS: list[Row] = [{"text": f"red {w}", "label": "aaab"[i % 4]} for i, w in enumerate(WORDS[:8])]


@pytest.fixture
def base(tiny_bert: Path) -> BaseModel:
    return load_base_model(ModelSettings(str(tiny_bert), max_length=8, device="cpu"), generates=False)


def made(base: BaseModel, rows: list[Row] = ROWS, **train: Any) -> Classification:
    plan = Plan("fed", 1, ModelSettings("m", max_length=8), train=TrainSettings(**train))
    task = build_task(SiteDataset("ada", "classification", rows, rows[:4], LABELS), base, plan)
    assert isinstance(task, Classification)
    torch.manual_seed(0)
    for parameter in task.head.values():
        torch.nn.init.normal_(parameter)
    return task


def test_balanced_weights_give_every_label_the_same_total(base: BaseModel) -> None:
    """Six examples of a and two of b: weights 8/(2·6) and 8/(2·2); c has none."""
    task = made(base, class_weights="balanced")
    assert task._class_weights.tolist() == pytest.approx([8 / 12, 2.0, 0.0])
    batch = task.collate(task.train.examples)
    losses = F.cross_entropy(task._logits(batch), batch["labels"], reduction="none")
    weights = task._class_weights[batch["labels"]]
    assert weights.mean().item() == pytest.approx(1)
    assert task.loss(batch)[0].item() == pytest.approx((losses * weights).mean().item())
    halves = [task.loss(task.collate(task.train.examples[i : i + 4]))[0].item() for i in (0, 4)]
    assert sum(halves) / 2 == pytest.approx(task.loss(batch)[0].item()), "micro-batches sum to the batch"


def test_label_smoothing_is_pytorchs(base: BaseModel) -> None:
    task = made(base, label_smoothing=0.2)
    batch = task.collate(task.train.examples)
    expected = F.cross_entropy(task._logits(batch), batch["labels"], label_smoothing=0.2)
    assert task.loss(batch)[0].item() == pytest.approx(expected.item())


def test_the_measured_loss_has_neither_weights_nor_smoothing(base: BaseModel) -> None:
    plain = made(base).measure(generate=False)
    assert made(base, class_weights="balanced", label_smoothing=0.2).measure(generate=False) == plain


def test_without_options_the_loss_is_the_mean_cross_entropy(base: BaseModel) -> None:
    task = made(base)
    batch = task.collate(task.train.examples)
    assert torch.equal(
        task.loss(batch)[0], F.cross_entropy(task._logits(batch), batch["labels"], reduction="none").mean()
    )


def pair_tokenizer() -> Any:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<user>", "<assistant>", "<system>", "<end>"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]")
    fast.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return fast


def test_pairs_of_texts_are_encoded_as_stock_models_read_them(base: BaseModel, tiny_bert: Path) -> None:
    base = dataclasses.replace(base, tokenizer=pair_tokenizer())
    pairs = [("red sun", "blue"), ("cat", "dog hill sea"), ("a b c d e f", "g")]
    rows: list[Row] = [{"text": a, "text_pair": b, "label": "ab"[i % 2]} for i, (a, b) in enumerate(pairs * 2)]
    task = made(base, rows)
    assert task.train.truncated == 2
    batch = task.collate(task.train.examples[:3])
    stock = base.tokenizer(*zip(*pairs, strict=True), truncation=True, max_length=8, padding=True, return_tensors="pt")
    for key in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(batch[key], stock[key]), key
    hidden = AutoModel.from_pretrained(tiny_bert)(**stock).pooler_output
    expected = F.linear(hidden, task.head["head.classifier.weight"], task.head["head.classifier.bias"]).softmax(-1)
    predictions = list(task.predict([{"text": a, "text_pair": b} for a, b in pairs]))
    ours = torch.tensor([list(p["probabilities"].values()) for p in predictions])
    assert torch.allclose(ours, expected, atol=1e-5)
    assert [p["truncated"] for p in predictions] == [False, False, True]


@pytest.mark.parametrize("family", ["convbert", "bert", "xlnet"])
def test_predictions_do_not_depend_on_the_texts_beside(family: str, tmp_path: Path) -> None:
    """A convolution reads padding: its model gets texts of one length at a time. XLNet is padded on the left."""
    settings = ModelSettings(str(save_tiny(family, tmp_path)), max_length=32, device="cpu")
    task = made(load_base_model(settings, generates=False))
    task.plan = dataclasses.replace(task.plan, model=settings)
    texts = [{"text": text} for text in ("red cat", "a b c d e f g h", "blue", "sun moon")]
    task.module.eval()
    examples = [(tokens, 0) for tokens in task.encoder(texts)]
    for outputs in (task._in_batches, lambda given: torch.tensor(task._features(given)[0])):
        alone = torch.cat([outputs([example]) for example in examples])
        assert torch.allclose(outputs(examples), alone, atol=1e-6)
    together = [p["probabilities"]["a"] for p in task.predict(texts)]
    assert together == pytest.approx([next(task.predict([text]))["probabilities"]["a"] for text in texts], abs=1e-6)
    assert task._ignores_padding is (family != "convbert")
