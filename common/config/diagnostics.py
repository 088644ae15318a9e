"""What is wrong with a recipe, in words: the key, what was expected, what was found and what was perhaps meant."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, get_type_hints

import pydantic

from ..errors import ColoraError, ConfigError


def config_error(kind: type, error: pydantic.ValidationError) -> ConfigError:
    """The first thing that pydantic found wrong, as an error that names the key and the nearest known one."""
    first = error.errors()[0]
    path = [part for part in first["loc"] if isinstance(part, int) or part.isidentifier()]
    where = _dotted(path)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _fields_at(kind, path[:-1])
        return ConfigError(where, f"one of {', '.join(known)}", did_you_mean(str(path[-1]), known))
    if first["type"] in ("missing", "missing_argument"):
        return ConfigError(where, "a value", "nothing")
    expected = first["msg"].removeprefix("Input should be ").removeprefix("String should ")
    return ConfigError(where, expected, f"{first['input']!r}")


def naming_the_site(error: ConfigError, sites: list[dict[str, Any]]) -> ColoraError:
    """``site[2].data.text`` as ``text`` of the site's name; any other error as it is."""
    index, bracket, key = error.field.removeprefix("site[").partition("].")
    if not bracket or not index.isdigit():
        return error
    key = key.removeprefix("data.")
    return ConfigError(key, error.expected, error.found, site=str(sites[int(index)].get("name", f"#{int(index) + 1}")))


def did_you_mean(word: str, known: Any) -> str:
    """A word as it was found, with the nearest known one."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"{word!r}" + (f" (did you mean {near[0]!r}?)" if near else "")


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
