"""Values of a row's columns, checked. Every DataError names the site, the key of ``[data]`` and the row's number."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

import numpy as np

from ..config.diagnostics import did_you_mean
from ..dataset import Row
from ..errors import DataError

WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")
MAX_LISTED = 5  # row numbers in a message
RECOGNIZED = {  # the format of instruction data that a column shows
    "messages": "messages",
    "conversations": "sharegpt",
    "conversation": "sharegpt",
    "instruction": "alpaca",
}


@dataclass(frozen=True)
class RawRow:
    """A row of a source, with its number there (from 1) and the site that reads it.

    ``remarks`` collects the numbers of rows that were read with a change, by a sentence's beginning.
    """

    values: Row
    number: int
    site: str
    remarks: dict[str, list[int]] = field(default_factory=dict)

    def column(self, name: str, key: str) -> Any:
        """The value of column ``name``, which ``data.KEY`` names; or the text of a template such as ``{a}: {b}``."""
        if name in self.values:
            return self.values[name]
        columns = template_columns(name)
        if any(not column or spec or conversion for _, column, spec, conversion in _parts(name) if column is not None):
            raise self.error(key, "a template of columns in braces, such as {title}: {body}", repr(name))
        missing = next((column for column in columns or (name,) if column not in self.values), None)
        if missing is not None:
            known = ", ".join(map(str, self.values))
            raise self.error(key, f"a column {missing!r}", f"only {known}", hint=self._hint(missing, key))
        return "".join(
            literal + ("" if column is None or self.values[column] is None else str(self.values[column]))
            for literal, column, _, _ in _parts(name)
        )

    def _hint(self, missing: str, key: str) -> str:
        """Suggest the task that the columns show, or the nearest column."""
        near = did_you_mean(missing, map(str, self.values), similarity=0.7)
        if not near and key in ("text", "label") and any(column in self.values for column in (*RECOGNIZED, "prompt")):
            return 'Instruction data needs data.task = "generation".'
        return near

    def text(self, name: str, key: str) -> str:
        """The value of a column of texts."""
        value = self.column(name, key)
        if not isinstance(value, str):
            raise self.error(key, "text", "nothing" if value is None else type(value).__name__)
        return value

    def label(self, value: Any) -> str:
        """A label as text, with single spaces inside and none around it."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, str | int):
            hint = 'Several labels for a text need data.task = "multilabel".' if isinstance(value, list) else None
            raise self.error("label", "a text or whole number", repr(value)[:40], hint=hint)
        text = " ".join(str(value).split())
        if not text:
            raise self.error("label", "a label", "an empty one")
        if text != str(value):
            self.remark("White space was removed from the labels")
        return text

    def remark(self, sentence: str) -> None:
        """Note that this row was read with a change."""
        self.remarks.setdefault(sentence, []).append(self.number)

    def array(self, name: str, key: str) -> np.ndarray:
        """The value of a column of numbers, as fp32."""
        value = self.column(name, key)
        try:
            return np.asarray(value, dtype=np.float32)
        except (TypeError, ValueError):
            raise self.error(key, "numbers", type(value).__name__) from None

    def error(self, key: str, expected: str, found: str, *, hint: str | None = None) -> DataError:
        """An error of ``data.KEY`` in this row."""
        return DataError(f"data.{key}", expected, f"{found} in row {self.number}", site=self.site, hint=hint)


def template_columns(text: str) -> tuple[str, ...]:
    """The columns that a template names in braces; none where the text is not a template."""
    return tuple(column for _, column, _, _ in _parts(text) if column)


def _parts(text: str) -> list[tuple[str, str | None, str | None, str | None]]:
    """The literal text, column, format and conversion of each part of a template; none for another text."""
    try:
        return list(Formatter().parse(text))
    except ValueError:  # a single brace
        return []


def sorted_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels without duplicates: whole numbers by value, others in alphabetical order."""
    distinct = set(labels)
    numeric = all(WHOLE_NUMBER.fullmatch(label) for label in distinct)
    return tuple(sorted(distinct, key=(lambda label: (int(label), label)) if numeric else None))


def abbreviated(labels: Iterable[str]) -> str:
    """At most five labels, sorted."""
    names = sorted_labels(labels)
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def listed(numbers: Sequence[int]) -> str:
    """Name rows by their numbers: ``row 4``, or ``rows 4, 8, 9, 12, 20 and 7 more``."""
    shown = ", ".join(map(str, numbers[:MAX_LISTED]))
    more = f" and {len(numbers) - MAX_LISTED} more" if len(numbers) > MAX_LISTED else ""
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{more}"
