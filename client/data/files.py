"""Readers of files, by suffix: JSON, tables, Parquet, Excel and NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ...common.dataset import Row
from ...common.errors import DataError
from ...common.tasks.columns import RECOGNIZED
from .source import Source
from .tables import check_columns, read_table

XLSX_HINT = 'Install it with pip install "colora[xlsx]", or save the file as CSV.'


def _read_json(source: Source) -> Iterable[Row]:
    """Read a list of objects, or one object per line; or an object that has one list of objects among its values."""
    text = source.text()
    if text.lstrip().startswith("["):
        return _checked_rows(_parsed(text, source), source)
    if source.suffix == ".json" and (rows := _only_list(text)) is not None:
        return _checked_rows(rows, source)
    return _read_lines(text, source)


def _read_lines(text: str, source: Source) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row = _parsed(line, source, number)
            if not isinstance(row, dict):
                raise DataError(_place(source, number), "one JSON object", type(row).__name__, site=source.site)
            yield row


def _parsed(text: str, source: Source, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        expected = "one JSON object" if line else "a JSON list of objects"
        raise DataError(_place(source, line or error.lineno), expected, error.msg, site=source.site) from None


def _place(source: Source, line: int) -> str:
    return f"{source.path.name} line {line}"


def _only_list(text: str) -> list[Any] | None:
    """Return the list of objects in one JSON object, such as ``{"version": 1, "data": [{…}, …]}``.

    One conversation is a list of one. None for anything else.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:  # one object per line
        return None
    if not isinstance(value, dict):
        return None
    if "instruction" in value or any(_are_turns(value.get(key)) for key in RECOGNIZED):
        return [value]
    lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
    return lists[0] if len(lists) == 1 else None


def _are_turns(value: Any) -> bool:
    turns = value if isinstance(value, list) else []
    return any(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns)


def _checked_rows(rows: Any, source: Source) -> list[Row]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise source.error(
                "a list of objects",
                f"{type(row).__name__} in row {number}",
                message=f"row {number} of {source.name} is not an object with columns ({type(row).__name__}).",
            )
    return rows


def _read_parquet(source: Source) -> Iterable[Row]:
    import pyarrow.parquet

    with source.open() as file:
        return pyarrow.parquet.read_table(file).to_pylist()


def _read_npz(source: Source) -> Iterator[Row]:
    with source.open() as stream, np.load(stream, allow_pickle=False) as file:
        if set(file.files) != {"x", "y"}:
            raise DataError("data.source", "arrays x and y", ", ".join(file.files), site=source.site)
        yield from ({"x": x, "y": y} for x, y in zip(file["x"], file["y"], strict=True))


def _read_xlsx(source: Source) -> Iterator[Row]:
    """Read the first sheet; its first row names the columns. Rows without any value are left out."""
    try:
        import openpyxl
    except ImportError:
        message = f"reading {source.name} needs the package openpyxl."
        raise source.error("the package openpyxl", "no such package", message=message, hint=XLSX_HINT) from None
    with source.open() as file:
        book = openpyxl.load_workbook(file, read_only=True, data_only=True)
        sheet: Any = book.worksheets[0]
        sheet.reset_dimensions()  # some programs write wrong ones
        records = sheet.iter_rows(values_only=True)
        columns = [("" if name is None else str(name).strip()) for name in next(records, ())]
        check_columns(columns, source)
        for record in records:
            if any(value is not None for value in record):
                yield {name: value for name, value in zip(columns, record, strict=False) if name}
        if len(book.sheetnames) > 1:
            source.notes.append(f"only the first sheet of {source.name} was read ({book.sheetnames[0]})")


READERS: dict[str, Callable[[Source], Iterable[Row]]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": read_table,
    ".tsv": read_table,
    ".parquet": _read_parquet,
    ".xlsx": _read_xlsx,
    ".npz": _read_npz,
}
