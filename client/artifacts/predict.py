"""``colora predict``: predictions of a personalized model for the rows of a file."""

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
from ...common.dataset import TASKS, Row, SiteDataset
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
    """A site's saved model, loaded into memory. Raises StateError for a checkpoint, which has no task."""

    def __init__(self, saved: SavedModel, *, device: str = "auto", batch_size: int | None = None) -> None:
        metadata = saved.metadata
        plan = dataclasses.replace(saved.plan, model=dataclasses.replace(saved.plan.model, device=device))
        if not saved.is_personal:
            raise StateError(
                str(saved.path),
                "a site's state",
                "a coordinator's checkpoint",
                message=f"{saved.path} is a checkpoint, which has no task.",
                hint="Name a site's folder: sites/NAME in the run folder.",
            )
        check_fingerprint(saved.plan.model, metadata.fingerprint)
        if batch_size:
            plan = dataclasses.replace(plan, evaluation=dataclasses.replace(plan.evaluation, batch_size=batch_size))
        base = load_base_model(plan.model, generates=TASKS[metadata.task].needs_causal_lm)
        rows = SiteDataset(metadata.site, metadata.task, (), (), metadata.labels)  # type: ignore[arg-type]
        self.trainer = Trainer(attach_adapters(base, plan), rows, StateStore(saved.path.parent, metadata.federation))
        shared = dict(saved.shared)
        self.trainer.load(shared, {key: torch.as_tensor(value) for key, value in saved.personal.items()})
        self.chat = metadata.chat

    def predict(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """Yield one prediction a row, in order (see ``Task.predict``)."""
        return self.trainer.task.predict(rows)


def predict_file(
    saved: SavedModel, source: Path, columns: DataSettings, *, device: str = "auto", batch_size: int | None = None
) -> tuple[list[Row], int]:
    """Return the rows of a file with their predictions, and the number of inputs truncated to ``model.max_length``.

    A prediction's key that is a column already gets the prefix ``predicted_``. Raises DataError for a row without an
    input, before the model is loaded.
    """
    rows = list(read_rows(str(source)))
    task_spec = TASKS.get(saved.metadata.task)
    parse_input = _INPUT_PARSERS.get((task_spec.input_column if task_spec else None, saved.metadata.chat))
    if parse_input is None:
        task = saved.metadata.task or "no task"
        raise StateError(
            str(saved.path),
            "a site's model for classification or generation",
            task,
            message=f"{saved.path}: predictions need a site's model of texts, not {task}.",
        )
    inputs = [parse_input(row, number, columns, source) for number, row in enumerate(rows, 1)]
    predictions = list(Predictor(saved, device=device, batch_size=batch_size).predict(inputs))
    truncated = sum(prediction.pop("truncated") for prediction in predictions)
    results = (
        {**row, **{f"predicted_{key}" if key in row else key: value for key, value in prediction.items()}}
        for row, prediction in zip(rows, predictions, strict=True)
    )
    return list(results), truncated


def write_rows(rows: Sequence[Row], out: Path) -> None:
    """Write ``.jsonl``, or ``.csv`` and ``.tsv`` with nested values as JSON, atomically.

    Raises DataError for another suffix, StateError where the file cannot be written.
    """
    write_atomically(out, render(rows, out.suffix).encode())


def render(rows: Iterable[Row], suffix: str) -> str:
    """Format rows as the text of a file with this suffix. Raises DataError for an unknown suffix."""
    if suffix not in FORMATS:
        raise DataError(
            "--out",
            f"a file ending in {', '.join(FORMATS)}",
            suffix or "no ending",
            message=f"--out must end in one of {', '.join(FORMATS)}, not in {suffix or 'no suffix'}.",
        )
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
    return {"text": _non_empty(row, columns.text, number, source)}


def _prompt(row: Row, number: int, columns: DataSettings, source: Path) -> Row:
    return {"prompt": _non_empty(row, columns.prompt, number, source)}


def _chat(row: Row, number: int, columns: DataSettings, source: Path) -> Row:
    """Return the conversation up to the answer, or the prompt as its only turn."""
    if not row.get("messages"):
        return {"messages": [{"role": "user", "content": _non_empty(row, columns.prompt, number, source)}]}
    turns = _turns(row["messages"])
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns:
        found = f"{str(row['messages'])[:80]!r}"
        raise DataError(
            f"row {number} of {source}",
            "messages of role and content with a turn to answer",
            found,
            message=f"Row {number} of {source} has no messages of role and content with a turn to answer: {found}.",
        )
    return {"messages": turns}


def _turns(value: Any) -> list[dict[str, str]]:
    """Parse a row's messages, a list or its JSON; return an empty list for anything else."""
    try:
        turns = json.loads(value) if isinstance(value, str) else value
        return [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in turns]
    except (ValueError, TypeError, KeyError):
        return []


def _non_empty(row: Row, column: str, number: int, source: Path) -> str:
    value = row.get(column)
    if value is None:
        names = ", ".join(map(str, row))
        raise DataError(
            f"row {number} of {source}",
            f"a column {column!r}",
            f"only {names}",
            message=f"Row {number} of {source} has no column {column!r}, only {names}.",
            hint="Name the column with --column.",
        )
    if not str(value).strip():
        raise DataError(
            f"row {number} of {source}",
            f"a text in {column!r}",
            "an empty one",
            message=f"Row {number} of {source} has an empty {column!r}.",
        )
    return str(value)


_INPUT_PARSERS: dict[
    tuple[str | None, bool], Callable[[Row, int, DataSettings, Path], Row]
] = {  # by (input column, chat)
    ("text", False): _text,
    ("prompt", False): _prompt,
    ("prompt", True): _chat,
}
