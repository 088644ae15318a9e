"""Columns of a source become rows of a task, or a DataError that names the row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ...common.config.schema import DataSettings
from ...common.dataset import Row, SiteDataset
from ...common.errors import DataError


def check_rows(site: str, data: DataSettings, train: Sequence[Row], test: Sequence[Row]) -> SiteDataset:
    """Rules that need all rows: some on both sides, at least two classes, no test label that training lacks."""
    if not train:
        raise DataError("data.source", "rows to train on", f"none in {data.source}", site=site)
    if not test:
        key, place = ("test_source", data.test_source) if data.test_source else ("test_fraction", data.source)
        raise DataError(f"data.{key}", "rows to test on", f"none in {place} beside {len(train)} to train on", site=site)
    for key in ("x", "y") if data.task == "regression" else ():
        shapes = sorted({np.shape(row[key]) for row in (*train, *test)})
        if len(shapes) > 1:
            raise DataError(f"data.{key}", f"one shape in every row, {shapes[0]}", shapes[1], site=site)
    if data.task != "classification":
        return SiteDataset(site, data.task, train, test)
    seen = {row["label"] for row in train}
    unseen = sorted({row["label"] for row in test} - seen)
    if unseen:
        raise DataError("data.label", f"a label seen in training ({_few(seen)})", repr(unseen[0]), site=site)
    labels = data.labels or tuple(sorted(seen))
    if len(seen) < 2:
        raise DataError("data.label", "at least two classes", f"only {_few(seen)}", site=site)
    return SiteDataset(site, data.task, train, test, labels)


def _classification(row: Row, number: int, data: DataSettings, site: str) -> Row:
    text, label = (
        _column(row, data.text, "data.text", number, site),
        _column(row, data.label, "data.label", number, site),
    )
    if isinstance(label, float) or label is None:
        raise DataError("data.label", "a text or whole number", f"{label!r} in row {number}", site=site)
    return {"text": _text(text, "data.text", number, site), "label": str(label)}


def _generation(row: Row, number: int, data: DataSettings, site: str) -> Row:
    if data.messages:
        messages = _column(row, data.messages, "data.messages", number, site)
        if not isinstance(messages, list) or not all(_is_turn(turn) for turn in messages):
            wanted = "a list of {role, content}"
            raise DataError("data.messages", wanted, f"{type(messages).__name__} in row {number}", site=site)
        return {"messages": messages}
    prompt, completion = (
        _text(_column(row, getattr(data, key), f"data.{key}", number, site), f"data.{key}", number, site)
        for key in ("prompt", "completion")
    )
    if data.chat:
        turns = (("user", prompt), ("assistant", completion))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}
    return {"prompt": prompt, "completion": completion}


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


def _regression(row: Row, number: int, data: DataSettings, site: str) -> Row:
    return {key: _array(_column(row, key, f"data.{key}", number, site), f"data.{key}", number, site) for key in "xy"}


ROW_PARSERS: dict[str, Callable[[Row, int, DataSettings, str], Row]] = {
    "classification": _classification,
    "generation": _generation,
    "regression": _regression,
}


def _column(row: Row, name: str, field: str, number: int, site: str) -> Any:
    if name not in row:
        raise DataError(field, f"a column {name!r}", f"only {', '.join(map(str, row))} in row {number}", site=site)
    return row[name]


def _array(value: Any, field: str, number: int, site: str) -> np.ndarray:
    try:
        return np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        raise DataError(field, "numbers", f"{type(value).__name__} in row {number}", site=site) from None


def _text(value: Any, field: str, number: int, site: str) -> str:
    if not isinstance(value, str):
        found = "nothing" if value is None else type(value).__name__
        raise DataError(field, "text", f"{found} in row {number}", site=site)
    return value


def _few(labels: Iterable[str]) -> str:
    names = sorted(labels)
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
