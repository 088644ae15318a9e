"""Tables as text, with one line of column names: .csv, .tsv and other delimiters."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ...common.dataset import Row
from ...common.errors import DataError
from ...common.tasks.columns import listed
from .source import Source

DELIMITERS = {".csv": ",", ".tsv": "\t"}  # expected, by suffix
CANDIDATES = (",", ";", "\t", "|")
NAMES = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}
SAMPLE, SAMPLE_CHARACTERS = 100, 1 << 20  # rows that decide between delimiters, and characters in which they are
LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+")
EXCEL = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)  # a first line that Excel writes
MAX_FIELD = 2**31 - 1  # characters


@dataclass(frozen=True)
class Table:
    """The records of a table: column names and fields, with the line in which each record ends."""

    columns: list[str]
    records: list[list[str]]
    quoted: bool  # whether quotation marks enclose fields; otherwise they are ordinary characters


def read_table(source: Source) -> Iterator[Row]:
    """Read a table. Column names lose surrounding white space.

    The delimiter is ``data.delimiter``. Unset, it is the suffix's, or with a note the one that splits the first lines
    into more than one column. Raises DataError for rows with more fields than columns, and for quotation marks that
    are not closed.
    """
    text = source.text()
    declared = EXCEL.match(text)
    if declared:
        text = text[declared.end() :]
    delimiter = source.data.delimiter or (declared and declared[1]) or _sniffed(text, source)
    table = _parsed(text, delimiter, source)
    _check_delimiter(text, table, source)
    check_columns(table.columns, source)
    _check_lengths(table, delimiter, source)
    width = len(table.columns)
    for record in table.records:
        if len(record) != width:
            record = [*record[:width], *[None] * (width - len(record))]
        yield dict(zip(table.columns, record, strict=True))


def _sniffed(text: str, source: Source) -> str:
    """Return the delimiter: the suffix's, unless it finds one column only and another finds several.

    ``csv.Sniffer`` counts characters anywhere and so takes a comma of the texts for the delimiter of a table with tabs.
    """
    expected, start = DELIMITERS[source.suffix], text[:SAMPLE_CHARACTERS]
    if _fit(start, expected):
        return expected
    fits = {delimiter: _fit(start, delimiter) for delimiter in CANDIDATES}
    best = max(CANDIDATES, key=fits.__getitem__)
    if not fits[best]:
        return expected
    source.notes.append(f"{source.name} was read with {NAMES[best]} between columns; set data.delimiter if it is wrong")
    return best


def _fit(text: str, delimiter: str) -> float:
    """The fraction of the first rows with as many fields as the header; 0 for a header of one field."""
    rows = [row for row in islice(_reader(text, delimiter, csv.QUOTE_MINIMAL, strict=False), SAMPLE) if row]
    if not rows or len(rows[0]) < 2:
        return 0.0
    return sum(len(row) == len(rows[0]) for row in rows) / len(rows)


def _parsed(text: str, delimiter: str, source: Source) -> Table:
    """Parse the table. Quotation marks that enclose no field are ordinary characters where every row then fits."""
    try:
        rows = _records(_reader(text, delimiter, csv.QUOTE_MINIMAL, strict=True))
        failure = _swallowed(rows, delimiter)
    except csv.Error as error:
        rows, failure = [], str(error)
    if failure is None:
        return Table([name.strip() for name in rows[0]] if rows else [], rows[1:], True)
    plain = _records(_reader(text, delimiter, csv.QUOTE_NONE, strict=False))
    if all(len(row) == len(plain[0]) for row in plain) and not any(_is_enclosed(f) for row in plain for f in row):
        source.notes.append(f"{source.name} has quotation marks that enclose no field; they were kept as characters")
        return Table([name.strip() for name in plain[0]], plain[1:], False)
    line = _first_bad_line(text, delimiter)
    raise source.error(
        "closed quotation marks",
        f"{failure} in line {line} of {source.name}",
        message=f"a quotation mark in or after line {line} of {source.name} is not closed, or must be written twice "
        f"({failure}).",
        hint='Write a quotation mark inside a quoted field as "".',
    )


def _records(reader: Iterable[list[str]]) -> list[list[str]]:
    """Return the records. Blank lines are left out; in a table of one column those between rows are empty values."""
    rows = list(reader)
    filled = [i for i, row in enumerate(rows) if row]
    if filled and len(rows[filled[0]]) == 1:
        return [row or [""] for row in rows[filled[0] : filled[-1] + 1]]
    return [rows[i] for i in filled]


def _swallowed(rows: Sequence[Sequence[str]], delimiter: str) -> str | None:
    """Describe a field that holds whole rows, as a stray quotation mark in a text with tabs makes it; None without."""
    if delimiter == ",":  # texts have commas of their own
        return None
    width = len(rows[0]) if rows else 0
    for row in rows:
        for value in row:
            lines = [line.count(delimiter) == width - 1 for line in value.split("\n")]
            if len(lines) > 1 and (all(lines[1:-1]) if lines[1:-1] else any(lines)):
                return "a field holds whole rows"
    return None


def _is_enclosed(value: str) -> bool:
    return len(value) > 1 and value.startswith('"') and value.endswith('"')


def _first_bad_line(text: str, delimiter: str) -> int:
    """Return the line in which the record starts that cannot be parsed, or that spans most lines."""
    reader, start, longest = _reader(text, delimiter, csv.QUOTE_MINIMAL, strict=True), 1, (0, 1)
    try:
        for _ in reader:
            longest = max(longest, (reader.line_num - start, -start))
            start = reader.line_num + 1
    except csv.Error:
        return start
    return -longest[1]


def _reader(text: str, delimiter: str, quoting: Any, *, strict: bool) -> Any:
    csv.field_size_limit(MAX_FIELD)
    lines = (line[0] for line in LINE.finditer(text))  # io.StringIO would take four bytes for every character
    return csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=strict)


def _check_delimiter(text: str, table: Table, source: Source) -> None:
    """Refuse a ``data.delimiter`` that finds one column only, where another delimiter finds several."""
    told, start = source.data.delimiter, text[:SAMPLE_CHARACTERS]
    if told is None or len(table.columns) != 1:
        return
    better = max(CANDIDATES, key=lambda delimiter: _fit(start, delimiter))
    if _fit(start, better):
        name, other = NAMES.get(told, repr(told)), NAMES[better]
        raise DataError(
            "data.delimiter",
            f"the delimiter of {source.name}",
            repr(told),
            site=source.site,
            message=f"data.delimiter is {name}, which finds one column only in {source.name}; {other} finds several.",
            hint="Remove data.delimiter, or set it to the character between the columns.",
        )


def check_columns(columns: Sequence[str], source: Source) -> None:
    """Refuse two columns of one name."""
    repeated = next((name for name in columns if name and columns.count(name) > 1), None)
    if repeated is not None:
        raise source.error(
            "column names that differ",
            f"{repeated!r} twice in {source.name}",
            message=f"two columns of {source.name} are named {repeated!r}.",
            hint="The first line of the file must name the columns.",
        )


def _check_lengths(table: Table, delimiter: str, source: Source) -> None:
    """Refuse rows with more fields than there are columns; empty ones at the end do not count."""
    width = len(table.columns)
    numbers = [n for n, row in enumerate(table.records, 1) if len(row) > width and "".join(row[width:]).strip()]
    if not numbers:
        return
    fields, rows = len(table.records[numbers[0] - 1]), listed(numbers)
    name = NAMES.get(delimiter, repr(delimiter))
    raise DataError(
        "data.source",
        f"{width} fields in every row of {source.name}",
        f"{fields} fields in {rows}",
        site=source.site,
        message=f"data.source: {source.name} has {width} columns, but there are {fields} fields in {rows}.",
        hint=f'Enclose texts that contain {name} in quotation marks ("), or set data.delimiter.',
    )
