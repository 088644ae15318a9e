"""Validation errors of pydantic as sentences that name the key and the nearest known one.

A plan comes from another machine, so every key and value that a sentence quotes is cut.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, get_origin, get_type_hints

import pydantic

from ..errors import ColoraError, ConfigError
from ..foreign_text import clean
from ..methods import ALSO_CALLED, METHODS
from .other_names import OTHER_NAMES

NAME_RULE = "a letter or digit, then at most 63 letters, digits, '.', '_' or '-'"
REVISION_RULE = "letters, digits, '_' and '-', with single '.' or '/' between them"
PATTERNS = {"delimiter": "one character", "revision": REVISION_RULE}  # by key: its pattern, if not that of a name
MAX_EXPECTED = 400  # characters: the alternatives of a key can be many
SETTINGS = "settings"  # the key of an error about all of them
UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")  # pydantic's types of errors about unknown keys
REPLACEMENTS = {"an object": "a table", "a valid array": "a list", "a valid string": "a string"}


def config_error(kind: type, error: pydantic.ValidationError) -> ConfigError:
    """Return one validation error as a ConfigError: an unknown key, which may be why another is missing, or the first.

    ``kind`` is the settings dataclass that was validated.
    """
    errors = error.errors()
    first = next((each for each in errors if each["type"] in UNKNOWN), errors[0])
    path = _path(first["loc"])
    if first["type"] in UNKNOWN:
        *tables, leaf = *_path(first["loc"][:-1]), str(first["loc"][-1])
        return _unknown_key(_dotted([*tables, _key(leaf)]), leaf, _fields_at(kind, tables), _paths(kind))
    key = _dotted(path) or SETTINGS
    if first["type"] == "json_invalid":  # JSON for pydantic may be less deep, and has no half of a character
        reason = clean(first.get("ctx", {}).get("error", first["msg"]))
        return ConfigError(SETTINGS, "valid JSON", reason, message=f"The settings are not valid JSON: {reason}.")
    if first["type"] in ("missing", "missing_argument"):
        return ConfigError(key, "a value", "nothing", message=f"{key} is missing.")
    expected = _expected(first, path)
    value = clean(repr(first["input"]))
    hint = _as_a_table(key, first["input"], _fields_at(kind, path)) if expected == "a table" else None
    return ConfigError(key, expected, value, message=f"{key} must be {expected}, not {value}.", hint=hint)


def _path(location: tuple[Any, ...]) -> list[Any]:
    """The keys and list indices of pydantic's location, without its names of alternatives, such as ``tuple[str, ...]``.

    A key of a table by layer need not be an identifier; it is left out, too.
    """
    return [part if isinstance(part, int) else clean(part) for part in location if _is_key(part)]


def _is_key(part: Any) -> bool:
    return isinstance(part, int) or part.isidentifier()


def _key(leaf: str) -> str:
    """An unknown key as a sentence shows it: in quotation marks, if it could not be one of ours."""
    return clean(leaf) if leaf.replace("-", "_").isidentifier() else repr(clean(leaf))


def _expected(error: Any, path: list[Any]) -> str:
    """What pydantic's error expects, in words."""
    if error["type"] == "string_pattern_mismatch":
        return PATTERNS.get(str(path[-1]) if path else "", NAME_RULE)
    expected = error["msg"].removeprefix("Input should be ").removeprefix("String should have ")
    expected = expected.removeprefix("String should ")
    return clean(REPLACEMENTS.get(expected, expected), MAX_EXPECTED)


def at_named_site(error: ConfigError, sites: list[dict[str, Any]]) -> ColoraError:
    """Return an error about ``site[2].data.text`` as one about ``text`` at the site's name; others unchanged."""
    index, bracket, key = error.field.removeprefix("site[").partition("].")
    if not bracket or not index.isdigit():
        return error
    key = key.removeprefix("data.")
    site = str(sites[int(index)].get("name", f"#{int(index) + 1}"))
    message = error.message and error.message.replace(error.field, key)
    return ConfigError(key, error.expected, error.found, site=site, message=message, hint=error.hint)


def did_you_mean(word: str, known: Iterable[str], *, similarity: float = 0.5) -> str:
    """Return "Did you mean 'X'? " for the nearest known word; empty if none has this similarity (0 to 1)."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=similarity)
    return f"Did you mean {near[0]!r}? " if near else ""


def suggest_method(name: str) -> str:
    """Return "Did you mean 'X'? " for the method that other tools call by this name, or for the nearest name."""
    other = ALSO_CALLED.get(name.lower().replace("_", "-"))
    return f"Did you mean {other!r}? " if other else did_you_mean(name, METHODS)


def _suggest_key(leaf: str, known: list[str], paths: list[str]) -> str:
    """Suggest the key that other tools call ``leaf``, the key of that name in another table, or the nearest here."""
    other = OTHER_NAMES.get(leaf.lower().replace("-", "_"))
    elsewhere = [path for path in paths if path.rpartition(".")[2] == leaf]
    if other and other.rpartition(".")[2] in known:
        other = other.rpartition(".")[2]
    elif other not in paths:
        other = elsewhere[0] if elsewhere else None
    return f"Did you mean {other!r}? " if other else did_you_mean(leaf, known)


def _as_a_table(key: str, value: Any, fields: list[str]) -> str | None:
    """Say how a text that stands for a table is written, as in ``method = "fedit"``."""
    if not isinstance(value, str) or not fields or fields[0] not in ("name", "source"):
        return None
    value = ALSO_CALLED.get(value.lower(), value) if key == "method" else value
    return f'Write {key}.{fields[0]} = "{clean(value)}", or a table [{key}].'


def _unknown_key(key: str, leaf: str, known: list[str], paths: list[str]) -> ConfigError:
    names = ", ".join(known)
    return ConfigError(
        key,
        f"one of {names}",
        repr(clean(leaf)),
        message=f"There is no key {key}.",
        hint=f"{_suggest_key(leaf, known, paths)}The keys here are {names}.",
    )


def _dotted(path: list[Any]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _fields_at(kind: Any, path: list[Any]) -> list[str]:
    for part in path:
        hints = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        inner = hints.get(part, kind)
        candidates = [inner, *getattr(inner, "__args__", ())]
        kind = next((c for c in candidates if dataclasses.is_dataclass(c)), kind)
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _paths(kind: Any, prefix: str = "") -> list[str]:
    """Return all keys of a settings dataclass and its tables as dotted paths, those of outer tables first."""
    names = [f.name for f in dataclasses.fields(kind)]
    inner = {name: table for name in names if (table := _table_of(get_type_hints(kind)[name]))}
    keys = [f"{prefix}{name}" for name in names if name not in inner]
    return keys + [path for name, table in inner.items() for path in _paths(table, f"{prefix}{name}.")]


def _table_of(hint: Any) -> Any:
    """Return the dataclass of a key's type, itself or one of its alternatives; None for a value or a list of tables."""
    candidates = [hint, *getattr(hint, "__args__", ())] if get_origin(hint) is not tuple else []
    return next((c for c in candidates if dataclasses.is_dataclass(c)), None)
