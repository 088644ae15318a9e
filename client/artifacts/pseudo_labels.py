"""Answers of a source model to synthetic inputs: the rows that an adapter on a new base model is trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...common.adapters.inject import activate
from ...common.dataset import TASKS, Row
from ...common.models.saved import SavedModel
from .predict import Predictor


def pseudo_label(saved: SavedModel, texts: Sequence[str]) -> list[Row]:
    """Answer texts with the source model and its adapters: label and probabilities, or a greedy completion.

    Texts with an empty completion are left out.
    """
    predictor = Predictor(saved, device=saved.plan.model.device)
    if TASKS[saved.metadata.task].has_labels:
        predictions = predictor.predict([{"text": text} for text in texts])
        return [
            {"text": text, "label": p["label"], "probabilities": list(p["probabilities"].values())}
            for text, p in zip(texts, predictions, strict=True)
        ]
    inputs = [
        {"messages": [{"role": "user", "content": text}]} if saved.metadata.chat else {"prompt": text} for text in texts
    ]
    answers = zip(inputs, predictor.predict(inputs), strict=True)
    return [_with_answer(row, str(p["completion"])) for row, p in answers if str(p["completion"]).strip()]


def best_by_titok(saved: SavedModel, rows: Sequence[Row], count: int) -> list[Row]:
    """Return the ``count`` rows whose answers have the highest mean log p_{M+θ}(y) − log p_M(y), in their order.

    Both are means over the answer's tokens (TiTok, arXiv 2510.04682).
    """
    predictor = Predictor(saved, device=saved.plan.model.device)
    task, backbone = predictor.trainer.task, predictor.trainer.model.base.backbone
    task.module.eval()
    examples = task.encode(rows).examples
    with torch.no_grad():
        adapted = [float(task.loss(task.collate([example]))[0]) for example in examples]
        activate(backbone, [])
        bare = [float(task.loss(task.collate([example]))[0]) for example in examples]
    scores = [b - a for a, b in zip(adapted, bare, strict=True)]
    best = sorted(range(len(rows)), key=lambda i: -scores[i])[:count]
    return [rows[i] for i in sorted(best)]


def _with_answer(row: Row, completion: str) -> Row:
    if "messages" in row:
        return {"messages": [*row["messages"], {"role": "assistant", "content": completion}]}
    return {**row, "completion": completion}
