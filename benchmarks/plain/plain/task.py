"""Model, rows, training and evaluation of the plain app."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from colora.common.models.assets import asset_folder  # a local folder instead of a hub id

BATCH, LENGTH, LR = 8, 32, 1e-3


def load_model(config: Mapping[str, Any]) -> Any:
    """Load MiniLM-L6 with a new LoRA adapter and head."""
    targets = str(config["targets"]).split()
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=int(config["rank"]), lora_alpha=16, target_modules=targets)
    model = AutoModelForSequenceClassification.from_pretrained(asset_folder("minilm-l6"), num_labels=2)
    return get_peft_model(model, lora)


def load_batches(path: str) -> list[dict[str, torch.Tensor]]:
    """Load the site's rows as padded batches."""
    tokenizer = AutoTokenizer.from_pretrained(asset_folder("minilm-l6"))
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    batches = []
    for i in range(0, len(rows), BATCH):
        part = rows[i : i + BATCH]
        texts = [row["text"] for row in part]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        batches.append({**batch, "labels": torch.tensor([int(row["label"] == "yes") for row in part])})
    return batches


def train(model: Any, batches: list[dict[str, torch.Tensor]], steps: int) -> float:
    """Take ``steps`` optimizer steps and return the last loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    model.train()
    loss = torch.zeros(())
    for batch in _cycle(batches, steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss)


@torch.no_grad()
def evaluate(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """Return the accuracy."""
    model.eval()
    right = sum(int((model(**batch).logits.argmax(1) == batch["labels"]).sum()) for batch in batches)
    return right / sum(len(batch["labels"]) for batch in batches)


def _cycle(batches: list[dict[str, torch.Tensor]], steps: int) -> Iterator[dict[str, torch.Tensor]]:
    return (batches[i % len(batches)] for i in range(steps))
