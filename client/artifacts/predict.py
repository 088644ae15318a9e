"""``colora predict``: predictions of a personalized model for the rows of a file."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
from ...common.tasks import task_class
from ...common.tasks.columns import RawRow
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


@dataclass(frozen=True)
class FilePredictions:
    """The rows of a file with their predictions, and what was special about its inputs.

    ``truncated`` inputs were longer than ``model.max_length``. ``blank`` are the numbers of rows without an input,
    which have no prediction. ``notes`` say how the file was read.
    """

    rows: list[Row]
    truncated: int
    blank: tuple[int, ...]
    notes: tuple[str, ...]


def predict_file(
    saved: SavedModel,
    source: Path,
    columns: DataSettings | None = None,
    *,
    device: str = "auto",
    batch_size: int | None = None,
    on_row: Callable[[int, int], None] = lambda done, total: None,
) -> FilePredictions:
    """Predict the rows of a file. The inputs are in the columns that the model was trained on.

    ``columns`` names other ones. A prediction's key that is a column already gets the prefix ``predicted_``. ``on_row``
    receives the number of rows that are done, and of all. Raises DataError for a row without the column, before the
    model is loaded.
    """
    spec = TASKS.get(saved.metadata.task)
    if spec is None or spec.input_column is None:
        task = saved.metadata.task or "no task"
        raise StateError(
            str(saved.path),
            "a site's model for classification or generation",
            task,
            message=f"{saved.path}: predictions need a site's model of texts, not {task}.",
        )
    notes: list[str] = []
    data = dataclasses.replace(columns or trained_columns(saved), task=saved.metadata.task)
    rows = list(read_rows(str(source), None, data, notes))
    inputs = [_input(row, number, data, source) for number, row in enumerate(rows, 1)]
    given = [row for row in inputs if row is not None]
    predictor = Predictor(saved, device=device, batch_size=batch_size) if given else None
    predictions = iter(predictor.predict(given)) if predictor else iter(())
    results, truncated = [], 0
    for number, (row, parsed) in enumerate(zip(rows, inputs, strict=True), 1):
        prediction = next(predictions) if parsed is not None else {}
        truncated += prediction.pop("truncated", False)
        results.append({**row, **{f"predicted_{key}" if key in row else key: v for key, v in prediction.items()}})
        on_row(number, len(rows))
    blank = tuple(number for number, parsed in enumerate(inputs, 1) if parsed is None)
    return FilePredictions(results, truncated, blank, tuple(notes))


def trained_columns(saved: SavedModel) -> DataSettings:
    """The columns that a site's model was trained on."""
    return DataSettings(**{**saved.metadata.columns, "chat": saved.metadata.chat})  # type: ignore[arg-type]


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


def _input(row: Row, number: int, data: DataSettings, source: Path) -> Row | None:
    """Return a row's input, or None where it is blank. Raises DataError for a row without the column."""
    try:
        return task_class(data.task).parse_input(RawRow(row, number, ""), data)
    except DataError as error:
        key = error.field.removeprefix("data.")
        found = error.found.removesuffix(f" in row {number}")
        raise DataError(
            f"row {number} of {source}",
            error.expected,
            found,
            message=f"Row {number} of {source} needs {error.expected} ({key}), but has {found}.",
            hint="Name the column with --column.",
        ) from None
