"""What a source model with its adapters says to written inputs: the rows that a new base model learns from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...common.adapters.inject import activate
from ...common.dataset import Row
from ...common.models.saved import SavedModel
from .predict import Predictor


def pseudo_label(saved: SavedModel, texts: Sequence[str]) -> list[Row]:
    """The answers of the source model with its adapters: probabilities of labels, or greedy completions."""
    predictor = Predictor(saved, device=saved.plan.model.device)
    if saved.metadata.task == "classification":
        found = predictor.predict([{"text": text} for text in texts])
        return [
            {"text": text, "label": p["label"], "probabilities": list(p["probabilities"].values())}
            for text, p in zip(texts, found, strict=True)
        ]
    asked = [
        {"messages": [{"role": "user", "content": text}]} if saved.metadata.chat else {"prompt": text} for text in texts
    ]
    answers = zip(asked, predictor.predict(asked), strict=True)
    return [_answered(row, str(p["completion"])) for row, p in answers if str(p["completion"]).strip()]


def best_by_titok(saved: SavedModel, rows: Sequence[Row], wanted: int) -> list[Row]:
    """The rows with the highest mean log p_{M+θ}(y) − log p_M(y) of their answers (TiTok, arXiv 2510.04682)."""
    predictor = Predictor(saved, device=saved.plan.model.device)
    task, backbone = predictor.trainer.task, predictor.trainer.model.base.backbone
    task.module.eval()
    examples = task.encode(rows).examples
    with torch.no_grad():
        adapted = [float(task.loss(task.collate([example]))[0]) for example in examples]
        activate(backbone, [])
        bare = [float(task.loss(task.collate([example]))[0]) for example in examples]
    scores = [b - a for a, b in zip(adapted, bare, strict=True)]
    best = sorted(range(len(rows)), key=lambda i: -scores[i])[:wanted]
    return [rows[i] for i in sorted(best)]


def _answered(row: Row, completion: str) -> Row:
    if "messages" in row:
        return {"messages": [*row["messages"], {"role": "assistant", "content": completion}]}
    return {**row, "completion": completion}
