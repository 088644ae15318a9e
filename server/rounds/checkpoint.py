"""Checkpoints: the coordinator's state after each round as one safetensors file, written atomically."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...common.atomic_io import load_arrays, save_arrays
from ...common.config.schema import Recipe, to_json
from ...common.errors import StateError
from ...common.models.saved import FINGERPRINTS, SHARED, ModelMetadata

OPTIMIZER_STATE, AGGREGATOR_STATE = "memory/", "aggregator/"  # prefixes of array names in the file
MAX_CHECKPOINTS = 3  # newest checkpoints kept on disk


@dataclass(frozen=True)
class ServerState:
    """The state of a federation after ``round``. ``admitted`` is each site's last round whose reply was admitted."""

    round: int
    shared: Mapping[str, np.ndarray]
    optimizer_state: Mapping[str, np.ndarray] = field(default_factory=dict)  # of the server optimizer
    aggregator_state: Mapping[str, np.ndarray] = field(default_factory=dict)  # of the aggregator
    admitted: Mapping[str, int] = field(default_factory=dict)
    pins: Mapping[str, str] = field(default_factory=dict)  # fingerprints that every site must have
    weights: str = ""  # how updates are weighted, decided at the first join
    benefit: Mapping[str, float] = field(default_factory=dict)  # running mean of each site's benefit ratio
    finalized: bool = False
    task: str = ""  # of all sites; empty if they have different tasks


class Checkpoints:
    """The ``checkpoints/`` folder of one federation."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.identity = folder, {"federation": recipe.name, "recipe": recipe.identity}
        self.plan = to_json(recipe.plan)

    def latest(self) -> ServerState | None:
        """Return the newest state, or None. Raises StateError if it belongs to another federation or recipe."""
        paths = sorted(self.folder.glob("round-*.safetensors"))
        if not paths:
            return None
        arrays, meta = load_arrays(paths[-1])
        for name, expected in self.identity.items():
            if meta[name] != expected:
                raise StateError(
                    f"{paths[-1]}: {name}",
                    expected,
                    meta[name],
                    message=f"{paths[-1]} belongs to another {name}: {meta[name]}, not {expected}.",
                    hint="Use the recipe that the run began with, or another run folder.",
                )
        shared, optimizer_state, aggregator_state = (
            {k.removeprefix(p): v for k, v in arrays.items() if k.startswith(p)}
            for p in (SHARED, OPTIMIZER_STATE, AGGREGATOR_STATE)
        )
        return ServerState(
            meta["round"],
            shared,
            optimizer_state,
            aggregator_state,
            meta["admitted"],
            meta["pins"],
            meta["weights"],
            meta.get("benefit", {}),
            meta["closed"],
            meta["task"],
        )

    def write(self, state: ServerState) -> None:
        """Write a state and delete all but the newest checkpoints."""
        arrays = {SHARED + k: v for k, v in state.shared.items()}
        arrays |= {OPTIMIZER_STATE + k: v for k, v in state.optimizer_state.items()}
        arrays |= {AGGREGATOR_STATE + k: v for k, v in state.aggregator_state.items()}
        meta = {
            **self.identity,
            "round": state.round,
            "admitted": dict(state.admitted),
            "pins": dict(state.pins),
            "weights": state.weights,
            "benefit": dict(state.benefit),
            "closed": state.finalized,
            "task": state.task,
            "card": dataclasses.asdict(self._metadata(state)),
        }
        save_arrays(self.folder / f"round-{state.round:06d}.safetensors", arrays, meta)
        for path in sorted(self.folder.glob("round-*.safetensors"))[:-MAX_CHECKPOINTS]:
            path.unlink(missing_ok=True)

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


def latest_checkpoint_info(folder: Path) -> CheckpointInfo | None:
    """Describe the newest checkpoint in ``folder``, of any federation; another process may be writing there."""
    while paths := sorted(folder.glob("round-*.safetensors")):
        try:
            _, meta = load_arrays(paths[-1], prefix=" ")
            return CheckpointInfo(meta["round"], meta["admitted"], meta["closed"], paths[-1].stat().st_mtime)
        except (StateError, OSError):
            if paths[-1].exists():
                raise
    return None
