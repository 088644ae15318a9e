"""Models on disk: a site's state file or a coordinator's checkpoint, with metadata.

Array names begin with a prefix: ``shared/`` for the shared adapter as it arrived, ``reply/`` for the site's trained
version of it, and ``state/`` for the site's personal groups.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic_io import load_arrays
from ..config.schema import Plan, parse
from ..errors import StateError

FINGERPRINTS = ("model", "tokenizer", "chat_template")  # fields of Fingerprint
SHARED, TRAINED, PERSONAL = "shared/", "reply/", "state/"
DISCRIMINATOR, WRITER = "transfer/", "writer/"  # of a later transfer
FILES = "round-*.safetensors"
PLACES = (FILES, f"checkpoints/{FILES}", f"state/{FILES}", f"state/*/{FILES}")  # patterns below a folder


@dataclass(frozen=True)
class ModelMetadata:
    """Metadata of a model file: its federation, round and plan; for a personal model also site, task and labels."""

    federation: str
    round: int
    plan: str  # JSON
    site: str = ""  # empty in a checkpoint
    task: str = ""
    labels: tuple[str, ...] = ()
    chat: bool = False  # whether texts pass through the chat template
    columns: Mapping[str, str] = field(default_factory=dict)  # of inputs, by key of [data]
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SavedModel:
    """A model from disk: the shared adapter, and a site's personal groups (none in a checkpoint)."""

    path: Path
    metadata: ModelMetadata
    plan: Plan
    shared: Mapping[str, np.ndarray]
    personal: Mapping[str, np.ndarray]
    discriminator: Mapping[str, np.ndarray] = field(default_factory=dict)
    tuned_generator: Mapping[str, np.ndarray] = field(default_factory=dict)
    transfer_metadata: Mapping[str, Any] | None = None  # seeds and settings of a prepared transfer
    closed: bool = True  # ``shared`` is the adapter of all sites, not this site's trained version of it

    @property
    def is_personal(self) -> bool:
        """Whether this is the model of one site."""
        return bool(self.metadata.site)


def read_saved_model(place: Path) -> SavedModel:
    """Read the model at ``place``: a file, or a folder of a run or site, of which the newest file is read.

    Raises StateError if there is no model, or more than one.
    """
    path = find_saved_model(place)
    arrays, meta = load_arrays(path)
    if "card" not in meta:
        message = f"{path} is not a state or checkpoint of this version of colora."
        raise StateError(str(path), "a state or checkpoint of this version", "a file without metadata", message=message)
    metadata = ModelMetadata(**{**meta["card"], "labels": tuple(meta["card"]["labels"])})
    shared, trained = _below(arrays, SHARED), _below(arrays, TRAINED)
    return SavedModel(
        path,
        metadata,
        _plan(path, metadata),
        trained or shared,
        _below(arrays, PERSONAL),
        _below(arrays, DISCRIMINATOR),
        _below(arrays, WRITER),
        meta.get("transfer"),
        closed=not trained,
    )


def find_saved_model(place: Path) -> Path:
    """Return the newest model file of a run folder, site folder, ``site.toml`` or state folder; a file stays as it is.

    Raises StateError if there is no model, or more than one.
    """
    if place.is_file() and place.suffix != ".toml":
        return place
    folder = place.parent if place.is_file() else place
    newest = {file.parent: file for pattern in PLACES for file in sorted(folder.glob(pattern))}  # the last one remains
    if len(newest) > 1:
        folders = ", ".join(str(path) for path in sorted(newest))
        message = f"{place} contains several models: {folders}."
        raise StateError(str(place), "one model", f"several: {folders}", message=message, hint="Name one of them.")
    if not newest:
        message = f"There is no model in {place}."
        hint = "Name a run folder, a site's folder or a file round-….safetensors."
        raise StateError(str(place), "a run, a site's folder or a model file", "nothing", message=message, hint=hint)
    return next(iter(newest.values()))


def _plan(path: Path, metadata: ModelMetadata) -> Plan:
    raw: Any = json.loads(metadata.plan)
    if not isinstance(raw, dict):
        raise StateError(str(path), "a plan", metadata.plan[:40], message=f"The plan in {path} is damaged.")
    return parse(Plan, raw)


def _below(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
