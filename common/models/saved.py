"""Models on disk: a site's state file or a coordinator's checkpoint, with metadata.

Array names begin with a prefix: ``shared/`` for the shared adapter of the model, ``reply/`` for the site's trained
version of it as it was sent, which stands for both where it is alone, and ``state/`` for the site's personal groups.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic_io import load_arrays
from ..config.schema import Plan, parse
from ..errors import ColoraError, DamagedError, StateError

logger = logging.getLogger("colora.models")
FINGERPRINTS = ("model", "tokenizer", "chat_template")  # fields of Fingerprint
SHARED, TRAINED, PERSONAL = "shared/", "reply/", "state/"
DISCRIMINATOR, WRITER = "transfer/", "writer/"  # of a later transfer
FILES = f"round-{'[0-9]' * 6}.safetensors"  # no other file in the folder, such as a copy, is a model
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
    groups: int = 1  # shared adapters in the file, of which this is one: of a federation whose sites were grouped
    closed: bool = True  # ``shared`` is the adapter of all sites, not this site's trained version of it

    @property
    def is_personal(self) -> bool:
        """Whether this is the model of one site."""
        return bool(self.metadata.site)


def read_saved_model(place: Path, group: int | None = None, round_number: int | None = None) -> SavedModel:
    """Read the model at ``place``: a file, or a folder of a run or site, of which the newest whole file is read.

    ``round_number`` selects the file of one round in the folder; a site's last one is that of the final steps.

    ``group`` counts from 1, the largest, where a checkpoint has a shared adapter for each group of sites; unset, the
    largest is read with a warning. Newer files that are damaged are skipped with a warning. Raises StateError if there
    is no model, more than one, or no such group, and DamagedError if none is whole.
    """
    newest = find_saved_model(place)
    if round_number is not None:
        return _read(_of_round(newest, round_number), group)
    others = [] if newest == place else [path for path in newest.parent.glob(FILES) if path != newest]
    damage: DamagedError | None = None
    for path in (newest, *sorted(others, reverse=True)):
        try:
            saved = _read(path, group)
        except DamagedError as error:
            damage = damage or error
            continue
        if damage:
            logger.warning("%s is damaged. Using %s.", newest, path)
        return saved
    assert damage, "there is at least one file"
    raise damage


def _of_round(newest: Path, round_number: int) -> Path:
    path = newest.with_name(f"round-{round_number:06d}.safetensors")
    if path.exists():
        return path
    known = [str(int(file.stem.removeprefix("round-"))) for file in sorted(newest.parent.glob(FILES))]
    raise StateError(
        f"--round {round_number}",
        f"one of {', '.join(known)}",
        round_number,
        message=f"{newest.parent} has no model of round {round_number}, only of {', '.join(known)}.",
        hint='Models of all rounds are kept with train.keep_states = "all".',
    )


def _read(path: Path, group: int | None) -> SavedModel:
    arrays, meta = load_arrays(path)
    if "card" not in meta:
        message = f"{path} is not a state or checkpoint of this version of colora."
        raise StateError(str(path), "a state or checkpoint of this version", "a file without metadata", message=message)
    try:
        metadata = ModelMetadata(**{**meta["card"], "labels": tuple(meta["card"]["labels"])})
        plan = _plan(path, metadata)
    except ColoraError:  # damaged, or a plan of another version
        raise
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        message = f"The metadata of {path} are damaged: {error}."
        raise DamagedError(str(path), "complete metadata", error, message=message) from None
    prefix = group_prefix(_chosen_group(path, meta, group) - 1)
    shared, trained = below(arrays, prefix + SHARED), below(arrays, TRAINED)
    return SavedModel(
        path,
        metadata,
        plan,
        shared or trained,
        below(arrays, PERSONAL),
        below(arrays, DISCRIMINATOR),
        below(arrays, WRITER),
        meta.get("transfer"),
        groups=meta.get("groups", 1),
        closed=not trained,
    )


def _chosen_group(path: Path, meta: Mapping[str, Any], group: int | None) -> int:
    count = meta.get("groups", 1)
    members = [[site for site, index in meta.get("group", {}).items() if index == g] for g in range(count)]
    told = "; ".join(f"{g}: {', '.join(sites)}" for g, sites in enumerate(members, 1))
    if group is None and count > 1:
        logger.warning("%s has %d groups of sites (%s). Using group 1; --group selects another.", path, count, told)
    if group is not None and not 1 <= group <= count:
        message = f"{path} has no group {group}."
        hint = f"The groups are {told}." if count > 1 else "It has one shared adapter. Remove --group."
        raise StateError(str(path), f"a group from 1 to {count}", group, message=message, hint=hint)
    return group or 1


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
        if (folder / "adapter_config.json").is_file():
            hint = "It is an export, which PEFT loads. Name the site's folder that it was made from."
        raise StateError(str(place), "a run, a site's folder or a model file", "nothing", message=message, hint=hint)
    return next(iter(newest.values()))


def _plan(path: Path, metadata: ModelMetadata) -> Plan:
    raw: Any = json.loads(metadata.plan)
    if not isinstance(raw, dict):
        raise DamagedError(str(path), "a plan", metadata.plan[:40], message=f"The plan in {path} is damaged.")
    return parse(Plan, raw)


def group_prefix(index: int) -> str:
    """Return the prefix of a group's arrays in a checkpoint; those of the largest group have none."""
    return f"group-{index + 1}/" if index else ""


def below(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Return the arrays whose names begin with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
