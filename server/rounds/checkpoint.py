"""Checkpoints: the coordinator's state after each round as one safetensors file, written atomically."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...common.atomic_io import load_arrays, save_arrays
from ...common.config.schema import Recipe, to_json
from ...common.errors import DamagedError, StateError
from ...common.models.saved import FILES, FINGERPRINTS, SHARED, ModelMetadata, below, group_prefix
from .broadcast import Difference
from .shared_adapter import SharedAdapter
from .site_privacy import Spent

OPTIMIZER_STATE, AGGREGATOR_STATE = "memory/", "aggregator/"  # prefixes of array names in the file
FEEDBACK, DIFFERENCE = "feedback/", "difference/"  # with communication.broadcast_bits
logger = logging.getLogger("colora.checkpoints")
MAX_CHECKPOINTS = 3  # newest checkpoints kept on disk


@dataclass(frozen=True)
class BestRound:
    """The round with the lowest validation loss so far, and the loss of every site that measured it."""

    round: int
    losses: Mapping[str, float]


@dataclass(frozen=True)
class ServerState:
    """The state of a federation after ``round``. ``admitted`` is each site's last round whose reply was admitted."""

    round: int
    adapters: tuple[SharedAdapter, ...]  # of the groups, the largest first; one where sites were not grouped
    group: Mapping[str, int] = field(default_factory=dict)  # index of a site's adapter; 0 for a site that is not in it
    admitted: Mapping[str, int] = field(default_factory=dict)
    pins: Mapping[str, str] = field(default_factory=dict)  # fingerprints that every site must have
    weights: str = ""  # how updates are weighted, decided at the first join
    benefit: Mapping[str, float] = field(default_factory=dict)  # running mean of each site's benefit ratio
    finalized: bool = False
    task: str = ""  # of all sites; empty if they have different tasks
    validated: int = 0  # last round whose validation loss was measured
    best: BestRound | None = None
    spent: Spent | None = None  # of the privacy budget of each site, up to this round

    @property
    def shared(self) -> Mapping[str, np.ndarray]:
        """The shared adapter of the largest group."""
        return self.adapters[0].shared

    def by_group(self, sites: Iterable[str]) -> dict[int, list[str]]:
        """Return these sites by the index of their adapter, in the given order."""
        members: dict[int, list[str]] = {}
        for site in sites:
            members.setdefault(self.group.get(site, 0), []).append(site)
        return dict(sorted(members.items()))

    def divided(self, groups: Sequence[Sequence[str]]) -> ServerState:
        """Return the state in which each of these groups continues with a copy of the one adapter."""
        index = {site: i for i, group in enumerate(groups) for site in group}
        return dataclasses.replace(self, adapters=self.adapters * max(1, len(groups)), group=index)


class Checkpoints:
    """The ``checkpoints/`` folder of one federation."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.identity = folder, {"federation": recipe.name, "recipe": recipe.identity}
        self.plan, self.keeps_all = to_json(recipe.plan), recipe.train.keep_states == "all"
        secure = recipe.privacy.secure_aggregation  # the sites open no second sum of a round
        self.otherwise = "begin a run with another name" if secure else "delete them to begin again at round 1"
        self.damaged: list[str] = []

    def latest(self) -> ServerState | None:
        """Return the newest whole state, or None; ``damaged`` then has the names of the newer, damaged files.

        Raises StateError if a file belongs to another federation or recipe, or if all are damaged.
        """
        paths, self.damaged = sorted(self.folder.glob(FILES)), []
        for path in reversed(paths):
            try:
                return self._read(path)
            except DamagedError as error:
                logger.warning("%s", error)
                self.damaged.append(path.name)
        if paths:
            raise StateError(
                str(self.folder),
                "a whole checkpoint",
                "damaged ones only",
                message=f"All checkpoints in {self.folder} are damaged: {', '.join(self.damaged)}.",
                hint=f"Restore one from a backup, or {self.otherwise}.",
            )
        return None

    def read(self, round_number: int) -> ServerState:
        """Return the state after a round. Raises DamagedError, and StateError if there is none."""
        return self._read(self._path(round_number))

    def _read(self, path: Path) -> ServerState:
        arrays, meta = load_arrays(path)
        for name, expected in self.identity.items():
            if meta.get(name) != expected:
                raise StateError(
                    f"{path}: {name}",
                    expected,
                    meta.get(name),
                    message=f"{path} belongs to another {name}: {meta.get(name)}, not {expected}.",
                    hint="Use the recipe that the run began with, or another run folder.",
                )
        try:
            return ServerState(
                meta["round"],
                tuple(_adapter(arrays, index, number) for index, number in enumerate(meta["differences"])),
                meta["group"],
                meta["admitted"],
                meta["pins"],
                meta["weights"],
                meta["benefit"],
                meta["closed"],
                meta["task"],
                meta["validated"],
                BestRound(**meta["best"]) if meta["best"] else None,
                Spent(**meta["spent"]) if meta.get("spent") else None,
            )
        except KeyError as error:
            raise _incomplete(path, error) from None

    def write(self, state: ServerState) -> None:
        """Write a state and delete all but the newest checkpoints."""
        arrays: dict[str, np.ndarray] = {}
        for index, adapter in enumerate(state.adapters):
            arrays |= _under(group_prefix(index) + SHARED, adapter.shared)
            arrays |= _under(group_prefix(index) + OPTIMIZER_STATE, adapter.optimizer_state)
            arrays |= _under(group_prefix(index) + AGGREGATOR_STATE, adapter.aggregator_state)
            arrays |= _under(group_prefix(index) + FEEDBACK, adapter.feedback)
            if adapter.difference:
                arrays[group_prefix(index) + DIFFERENCE] = np.frombuffer(adapter.difference.data, np.uint8)
        meta = {
            **self.identity,
            "round": state.round,
            "groups": len(state.adapters),
            "differences": [adapter.difference and adapter.difference.round for adapter in state.adapters],
            "group": dict(state.group),
            "admitted": dict(state.admitted),
            "pins": dict(state.pins),
            "weights": state.weights,
            "benefit": dict(state.benefit),
            "closed": state.finalized,
            "task": state.task,
            "validated": state.validated,
            "best": dataclasses.asdict(state.best) if state.best else None,
            "spent": dataclasses.asdict(state.spent) if state.spent else None,
            "card": dataclasses.asdict(self._metadata(state)),
        }
        save_arrays(self._path(state.round), arrays, meta)
        if not self.keeps_all:
            best = self._path(state.best.round) if state.best else None
            for path in sorted(self.folder.glob(FILES))[:-MAX_CHECKPOINTS]:
                if path != best:
                    path.unlink(missing_ok=True)

    def _path(self, round_number: int) -> Path:
        return self.folder / f"round-{round_number:06d}.safetensors"

    def _metadata(self, state: ServerState) -> ModelMetadata:
        fingerprint = {name: state.pins[name] for name in FINGERPRINTS if name in state.pins}
        federation = self.identity["federation"]
        return ModelMetadata(federation, state.round, self.plan, task=state.task, fingerprint=fingerprint)


@dataclass(frozen=True)
class CheckpointInfo:
    """The newest checkpoint without its arrays. ``written`` is in seconds since 1970."""

    round: int
    admitted: Mapping[str, int]
    finalized: bool
    written: float


def latest_checkpoint_info(folder: Path) -> tuple[CheckpointInfo | None, list[str]]:
    """Describe the newest whole checkpoint in ``folder``, of any federation, and name the newer, damaged ones.

    Only the metadata are checked. Another process may be writing there.
    """
    damaged: list[str] = []
    for path in sorted(folder.glob(FILES), reverse=True):
        try:
            _, meta = load_arrays(path, prefix=" ")
            return CheckpointInfo(meta["round"], meta["admitted"], meta["closed"], path.stat().st_mtime), damaged
        except (StateError, OSError, KeyError):
            if path.exists():  # otherwise a newer one has replaced it
                damaged.append(path.name)
    return None, damaged


def _adapter(arrays: Mapping[str, np.ndarray], group: int, number: int | None) -> SharedAdapter:
    """``number`` is the round of the adapter's difference."""
    prefix = group_prefix(group)
    shared, optimizer, aggregator, feedback = (
        below(arrays, prefix + part) for part in (SHARED, OPTIMIZER_STATE, AGGREGATOR_STATE, FEEDBACK)
    )
    difference = None if number is None else Difference(number, arrays[prefix + DIFFERENCE].tobytes())
    return SharedAdapter(shared, optimizer, aggregator, feedback, difference)


def _under(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + key: value for key, value in arrays.items()}


def _incomplete(path: Path, error: KeyError) -> DamagedError:
    message = f"{path} is damaged: its metadata have no {error}."
    return DamagedError(str(path), f"metadata with {error}", "none", message=message)
