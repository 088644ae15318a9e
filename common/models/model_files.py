"""The files of a base model: which decide its tokens, which one set holds its weights, and whether they are whole."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import ModelError

CONFIGS = ("config.json", "generation_config.json")
TEMPLATES = ("chat_template*", "additional_chat_templates/*.jinja")
TOKEN_FILES = (  # every file that a tokenizer of Transformers reads, by pattern
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*",
    "*merges*.txt",
    "*.model",
    "tokenizer.model.*",
    "*.spm",
    "*.tiktoken",
    "*.tokenizer",
    "*.codes",
    "tekken.json",
    "dict.txt",
    "encoder.json",
    "emoji.json",
    "normalizer.json",
    "byte_maps.json",
    "word_shape.json",
    "word_pronunciation.json",
)
WEIGHT_SETS = (  # the file that stands for a set of weights, and its parts, in the order in which Transformers looks
    ("model.safetensors", ()),
    ("model.safetensors.index.json", ("*-of-*.safetensors",)),
    ("pytorch_model.bin", ()),
    ("pytorch_model.bin.index.json", ("*-of-*.bin",)),
)
LFS_POINTER = b"version https://git-lfs"  # begins the file that stands for a large file in a clone without Git LFS


def token_files(names: Iterable[str]) -> list[str]:
    """Return the files that decide a text's tokens, sorted."""
    return sorted(name for name in names if any(fnmatch(name, pattern) for pattern in TOKEN_FILES) and "/" not in name)


def weight_files(names: Iterable[str]) -> list[str]:
    """Return the one set of weights that Transformers loads, sorted; empty without weights in a form that it loads."""
    names = set(names)
    for first, parts in WEIGHT_SETS:
        if first in names:
            found = {name for name in names if any(fnmatch(name, part) for part in parts) and "/" not in name}
            return sorted({first} | {name for name in found if not name.startswith("consolidated")})
    return []


def needed_files(names: Iterable[str]) -> list[str]:
    """Return the files of a repository that a federation needs: configuration, tokens, templates and weights."""
    names = list(names)
    templates = {name for name in names if any(fnmatch(name, pattern) for pattern in TEMPLATES)}
    return sorted({*token_files(names), *weight_files(names), *templates, *(n for n in names if n in CONFIGS)})


def file_names(folder: Path) -> list[str]:
    """Return the names of the files in a model folder."""
    return sorted(file.name for file in folder.iterdir() if file.is_file())


def check_whole(folder: Path, source: str, field: str = "model.source", *, weights: bool = True) -> None:
    """Check that no needed file is a Git LFS pointer, cut, or missing. Raises ModelError for ``field``."""
    names = file_names(folder)
    needed = [*token_files(names), *(name for name in names if name in CONFIGS)]
    if weights:
        needed += weight_files(names)
    for name in needed:
        if problem := _problem(folder / name):
            what, hint = problem
            raise ModelError(field, "whole files", f"{name}: {what}", message=f"{source!r}: {name} {what}.", hint=hint)


def _problem(file: Path) -> tuple[str, str] | None:
    """What is wrong with a file, and what to do about it."""
    again = "Download it again."
    with file.open("rb") as opened:
        begin = opened.read(len(LFS_POINTER))
    if begin == LFS_POINTER:
        return "is a Git LFS pointer and not the file itself", "Run git lfs pull in its folder, or download the file."
    if file.suffix == ".safetensors" and _is_cut(file):
        return "is cut or damaged", again
    if file.suffix == ".bin" and begin.startswith(b"PK") and not zipfile.is_zipfile(file):
        return "is cut or damaged", again
    if file.name in CONFIGS and not _is_object(file):
        return "is not a JSON object", again
    if file.name.endswith(".index.json"):
        missing = next((part for part in _parts(file) if not (file.parent / part).is_file()), None)
        return (f"names {missing}, which is not there", "Download it.") if missing else None
    return None


def _is_object(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_bytes()), dict)
    except ValueError:
        return False


def _is_cut(file: Path) -> bool:
    """Whether a safetensors file is not as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length <= size - 8:
            return True
        try:
            header: dict[str, Any] = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return True
    return size != 8 + length + max(ends, default=0)


def _parts(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
