"""``colora predict``: rows in, predictions of a personalised model out."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ...common.atomic_io import write_atomically
from ...common.config.schema import DataSettings
from ...common.dataset import Row, SiteDataset
from ...common.errors import DataError, StateError
from ...common.models.base_model import load_base_model
from ...common.models.saved import SavedModel
from ...common.models.sources import check_fingerprint
from ..data.readers import read_rows
from ..training.adapted_model import attach_adapters
from ..training.state_store import StateStore
from ..training.trainer import Trainer

FORMATS = (".jsonl", ".csv", ".tsv")


class Predictor:
    """A saved model in memory: the site's own one, or, of a checkpoint, what all sites share."""

    def __init__(self, saved: SavedModel, *, device: str = "auto", batch_size: int | None = None) -> None:
        card, plan = (
            saved.metadata,
            dataclasses.replace(saved.plan, model=dataclasses.replace(saved.plan.model, device=device)),
        )
        if not saved.is_personal:
            raise StateError(str(saved.path), "a site's state", "a coordinator's checkpoint, which has no task")
        check_fingerprint(saved.plan.model, card.fingerprint)
        if batch_size:
            plan = dataclasses.replace(plan, evaluation=dataclasses.replace(plan.evaluation, batch_size=batch_size))
        base = load_base_model(plan.model, generates=card.task == "generation")
        rows = SiteDataset(card.site, card.task, (), (), card.labels)  # type: ignore[arg-type]
        self.trainer = Trainer(attach_adapters(base, plan), rows, StateStore(saved.path.parent, card.federation))
        shared = dict(saved.shared)
        self.trainer.load(shared, {key: torch.as_tensor(value) for key, value in saved.personal.items()})
        self.chat = card.chat

    def predict(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """One prediction a row, in order (see ``Task.predict``)."""
        return self.trainer.task.predict(rows)


def predict_file(
    saved: SavedModel, source: Path, columns: DataSettings, *, device: str = "auto", batch_size: int | None = None
) -> tuple[list[Row], int]:
    """The rows of a file with what the model says to each, and how many inputs were cut to ``model.max_length``.

    Raises DataError for a row without an input, before the model is loaded.
    """
    rows = list(read_rows(str(source)))
    shape = _SHAPES.get((saved.metadata.task, saved.metadata.chat))
    if shape is None:
        raise StateError(str(saved.path), "a site's model of texts", f"one of {saved.metadata.task or 'no task'}")
    inputs = [shape(row, number, columns, source) for number, row in enumerate(rows, 1)]
    found = list(Predictor(saved, device=device, batch_size=batch_size).predict(inputs))
    cut = sum(prediction.pop("truncated") for prediction in found)
    named = (
        {f"predicted_{key}" if key in row else key: v for key, v in p.items()}
        for row, p in zip(rows, found, strict=True)
    )
    return [{**row, **prediction} for row, prediction in zip(rows, named, strict=True)], cut


def write_rows(rows: Sequence[Row], out: Path) -> None:
    """``.jsonl``, or ``.csv`` and ``.tsv`` with nested values as JSON, atomically. Raises DataError, StateError."""
    write_atomically(out, render(rows, out.suffix).encode())


def render(rows: Iterable[Row], suffix: str) -> str:
    """Rows as the text of a file of this kind. Raises DataError for another kind."""
    if suffix not in FORMATS:
        raise DataError("--out", f"a file ending in {', '.join(FORMATS)}", suffix or "no ending")
    if suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    rows, text = list(rows), io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, delimiter="\t" if suffix == ".tsv" else ",")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {k: json.dumps(v, ensure_ascii=False) if isinstance(v, dict | list) else v for k, v in row.items()}
        )
    return text.getvalue()


def _text(row: Row, number: int, columns: DataSettings, source: Path) -> Row:
    return {"text": _filled(row, columns.text, number, source)}


def _prompt(row: Row, number: int, columns: DataSettings, source: Path) -> Row:
    return {"prompt": _filled(row, columns.prompt, number, source)}


def _chat(row: Row, number: int, columns: DataSettings, source: Path) -> Row:
    """A conversation that ends before the answer, or a prompt as its only turn."""
    if not row.get("messages"):
        return {"messages": [{"role": "user", "content": _filled(row, columns.prompt, number, source)}]}
    turns = _turns(row["messages"])
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns:
        wanted = "messages of role and content with a turn to answer"
        raise DataError(f"row {number} of {source}", wanted, f"{str(row['messages'])[:80]!r}")
    return {"messages": turns}


def _turns(value: Any) -> list[dict[str, str]]:
    """The messages of a row, as a list or as its JSON; none where they are something else."""
    try:
        turns = json.loads(value) if isinstance(value, str) else value
        return [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in turns]
    except (ValueError, TypeError, KeyError):
        return []


def _filled(row: Row, column: str, number: int, source: Path) -> str:
    value = row.get(column)
    if value is None:
        wanted = f"a column {column!r} (or another, named by --column)"
        raise DataError(f"row {number} of {source}", wanted, f"only {', '.join(map(str, row))}")
    if not str(value).strip():
        raise DataError(f"row {number} of {source}", f"a text in {column!r}", "an empty one")
    return str(value)


_SHAPES: dict[tuple[str, bool], Callable[[Row, int, DataSettings, Path], Row]] = {  # by task, and whether it is chat
    ("classification", False): _text,
    ("generation", False): _prompt,
    ("generation", True): _chat,
}
