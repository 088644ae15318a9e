"""Checks of a site's sources that need neither torch nor a network, for the first moments of a command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...common.config.schema import DataSettings
from ...common.dataset import TASKS, Row
from ...common.errors import DataError
from ...common.tasks.columns import RawRow
from ...common.tasks.conversations import parse_example
from .packaged import check_asset
from .readers import as_test_source, is_hub_id, read_rows
from .row_schema import of_file

SMALL = 1 << 22  # bytes; a larger file is read once only, later


def check_sources(data: DataSettings, site: str | None) -> None:
    """Check that the sources' files exist, can be read and have the columns of the task.

    Columns are checked in files of up to ``SMALL`` bytes. For an asset only the name is checked. Hub data sets are
    not checked. Raises the error that reading the rows would raise.
    """
    if not data.source:
        message, hint = "data.source is empty.", "Set it to a file, an asset or a hub data set."
        raise DataError(
            "data.source", "a file, an asset or a hub data set", "nothing", site=site, message=message, hint=hint
        )
    _check(data.source, data, site)
    if data.test_source:
        with as_test_source():
            _check(data.test_source, data, site)


def _check(source: str, data: DataSettings, site: str | None) -> None:
    if source.startswith("asset:"):
        check_asset(source.removeprefix("asset:"), site)
        return
    path = Path(source)
    if path.is_dir() or (not path.exists() and is_hub_id(source)):
        return
    if not path.exists() or path.stat().st_size <= SMALL:
        _check_columns(read_rows(source, site, data), replace(data, source=source), site or "")


def _check_columns(rows: Sequence[Row], data: DataSettings, site: str) -> None:
    """Raise the error of the rows' columns where every row has it."""
    first: DataError | None = None
    for number, row in enumerate(rows, 1):
        try:
            _find_columns(RawRow(row, number, site), data)
        except DataError as error:
            first = first or error
        else:
            return
    if first:
        where = ("every row" if len(rows) > 1 else "row 1") + of_file(data)
        found = f"{first.found.removesuffix(' in row 1')} in {where}"
        raise DataError(first.field, first.expected, found, site=first.site, hint=first.hint)


def _find_columns(raw: RawRow, data: DataSettings) -> None:
    task = TASKS[data.task]
    if task.needs_causal_lm:
        parse_example(raw, data)
        return
    for name in task.array_columns:
        raw.column(name, name)
    if task.has_labels:
        raw.column(data.text, "text")
        if data.text_pair:
            raw.column(data.text_pair, "text_pair")
        for name in data.label_columns or ():
            raw.column(name, "label_columns")
        if not data.label_columns:
            raw.column(data.label, "label")
