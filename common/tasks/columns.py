"""Values of a row's columns, checked. Every DataError names the site, the key of ``[data]`` and the row's number."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dataset import Row
from ..errors import DataError


@dataclass(frozen=True)
class RawRow:
    """A row of a source, with its number there (from 1) and the site that reads it."""

    values: Row
    number: int
    site: str

    def column(self, name: str, key: str) -> Any:
        """The value of column ``name``, which ``data.KEY`` names."""
        if name not in self.values:
            columns = f"only {', '.join(map(str, self.values))}"
            raise self.error(key, f"a column {name!r}", columns)
        return self.values[name]

    def text(self, name: str, key: str) -> str:
        """The value of a column of texts."""
        value = self.column(name, key)
        if not isinstance(value, str):
            raise self.error(key, "text", "nothing" if value is None else type(value).__name__)
        return value

    def array(self, name: str, key: str) -> np.ndarray:
        """The value of a column of numbers, as fp32."""
        value = self.column(name, key)
        try:
            return np.asarray(value, dtype=np.float32)
        except (TypeError, ValueError):
            raise self.error(key, "numbers", type(value).__name__) from None

    def error(self, key: str, expected: str, found: str) -> DataError:
        """An error of ``data.KEY`` in this row."""
        return DataError(f"data.{key}", expected, f"{found} in row {self.number}", site=self.site)


def abbreviated(labels: Iterable[str]) -> str:
    """At most five labels in alphabetical order."""
    names = sorted(labels)
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
