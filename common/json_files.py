"""Small JSON files of colora: read with a check of their types, so that a damaged one is one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import DamagedError, StateError


def read_json(path: Path, is_valid: Callable[[Any], bool], expected: str, hint: str) -> Any:
    """Read a JSON file of colora and check its content, types included, with ``is_valid``.

    ``expected`` says what the file holds, and ``hint`` what to do if it is damaged. Raises StateError for a file that
    cannot be opened, and DamagedError for one that is no JSON or that holds something else.
    """
    try:
        return parse_json(path.read_bytes(), is_valid)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StateError(str(path), "a readable file", reason, message=f"{path} cannot be read: {reason}.") from None
    except ValueError as error:
        message = f"{path} is damaged: expected {expected}, found {error}."
        raise DamagedError(str(path), expected, error, message=message, hint=hint) from None


def parse_json(data: bytes, is_valid: Callable[[Any], bool]) -> Any:
    """Parse JSON in UTF-8 that may hold anything. Raises ValueError for no JSON and for content that is not valid."""
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError):
        raise ValueError("no complete JSON") from None
    if not is_valid(value):
        raise ValueError("other JSON")
    return value
