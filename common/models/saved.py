"""A model as it lies on disk: a site's state file or a coordinator's checkpoint, with a card that says what it is.

Both kinds of file have the shared adapter below ``shared/`` (a state of a round that trained has its own version of it
below ``reply/``) and a site's own groups below ``state/``.
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

FINGERPRINTS = ("model", "tokenizer", "chat_template")  # fingerprints
SHARED, TRAINED, PERSONAL = "shared/", "reply/", "state/"
DISCRIMINATOR, WRITER = "transfer/", "writer/"  # of a later transfer
FILES = "round-*.safetensors"
PLACES = (FILES, f"checkpoints/{FILES}", f"state/{FILES}", f"state/*/{FILES}")  # below what a user names


@dataclass(frozen=True)
class ModelMetadata:
    """What the arrays of a file are: of which federation, round and plan, and of which site and task, if of one."""

    federation: str
    round: int
    plan: str  # JSON
    site: str = ""
    task: str = ""
    labels: tuple[str, ...] = ()
    chat: bool = False  # texts went through the chat template
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SavedModel:
    """A model: the shared adapter, and a site's own groups (none in a checkpoint)."""

    path: Path
    metadata: ModelMetadata
    plan: Plan
    shared: Mapping[str, np.ndarray]
    personal: Mapping[str, np.ndarray]
    discriminator: Mapping[str, np.ndarray] = field(default_factory=dict)
    tuned_generator: Mapping[str, np.ndarray] = field(default_factory=dict)
    transfer_metadata: Mapping[str, Any] | None = None  # seeds and more, where the site prepared a transfer
    closed: bool = True  # ``shared`` is what all sites have, and not what this site made of it in a round

    @property
    def is_personal(self) -> bool:
        """Whether this is one site's model, and not what all sites share."""
        return bool(self.metadata.site)


def read_saved_model(place: Path) -> SavedModel:
    """The model at ``place``: a file, or a folder of a run or site, whose newest file counts. Raises StateError."""
    path = find_saved_model(place)
    arrays, meta = load_arrays(path)
    if "card" not in meta:
        raise StateError(str(path), "a state or checkpoint of this version of colora", "one without a card")
    card = ModelMetadata(**{**meta["card"], "labels": tuple(meta["card"]["labels"])})
    shared, trained = _below(arrays, SHARED), _below(arrays, TRAINED)
    return SavedModel(
        path,
        card,
        _plan(path, card),
        trained or shared,
        _below(arrays, PERSONAL),
        _below(arrays, DISCRIMINATOR),
        _below(arrays, WRITER),
        meta.get("transfer"),
        closed=not trained,
    )


def find_saved_model(place: Path) -> Path:
    """The file that a user means by a file, a run folder, a site's folder, its ``site.toml`` or its state folder."""
    if place.is_file() and place.suffix != ".toml":
        return place
    folder = place.parent if place.is_file() else place
    found = {file.parent: file for pattern in PLACES for file in sorted(folder.glob(pattern))}  # the last wins
    if len(found) > 1:
        raise StateError(str(place), "one model", f"several: {', '.join(str(path) for path in sorted(found))}")
    if not found:
        raise StateError(str(place), "a run, a site's folder or a round-….safetensors", "none there")
    return next(iter(found.values()))


def _plan(path: Path, card: ModelMetadata) -> Plan:
    raw: Any = json.loads(card.plan)
    if not isinstance(raw, dict):
        raise StateError(str(path), "a plan", card.plan[:40])
    return parse(Plan, raw)


def _below(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
