"""A site's personal state on disk: one file a round, written whole or not at all.

``round-000007.safetensors`` holds what the site became in round 7 (core, head, private adapter, optimiser moments,
data position) together with the reply it gave, so the two can never disagree. It is a candidate until a later
order says that round 7 was admitted; until then the file of the last admitted round is the base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..common.errors import StateError
from ..common.files import load_arrays, save_arrays
from ..common.protocol import Reply

TENSORS, MOMENTS, REPLY = "state/", "moments/", "reply/"


@dataclass(frozen=True)
class PersonalState:
    """What a site owns after a round. Round 0 is a site that has trained nothing yet."""

    round: int = 0
    position: int = 0  # examples drawn so far
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    moments: Mapping[str, torch.Tensor] = field(default_factory=dict)
    base: Mapping[str, float] | None = None  # metrics of the bare base model, measured once


class Store:
    """The state folder of one site in one federation."""

    def __init__(self, folder: Path, federation: str) -> None:
        self.folder, self.federation = folder, federation

    def state(self, round_number: int) -> PersonalState | None:
        """The state after ``round_number``; None when there is none. Round 0 is always there."""
        if round_number == 0:
            return PersonalState()
        path = self._path(round_number)
        if not path.exists():
            return None
        arrays, meta = load_arrays(path)
        self._check(path, meta)
        return PersonalState(
            round_number, meta["position"], _under(arrays, TENSORS), _under(arrays, MOMENTS), meta["base"]
        )

    def reply(self, round_number: int, key: str) -> Reply | None:
        """The stored reply to exactly this order, if there is one."""
        path = self._path(round_number)
        if not path.exists():
            return None
        arrays, meta = load_arrays(path, prefix=REPLY)
        self._check(path, meta)
        return Reply(**meta["reply"], shared=arrays) if meta["reply"]["key"] == key else None

    def write(self, state: PersonalState, reply: Reply) -> None:
        """Puts state and reply on disk in one rename. Raises StateError, and leaves the old files, when it cannot."""
        arrays = {TENSORS + k: v.cpu().numpy() for k, v in state.tensors.items()}
        arrays |= {MOMENTS + k: v.cpu().numpy() for k, v in state.moments.items()}
        arrays |= {REPLY + k: v for k, v in reply.shared.items()}
        said = {f.name: getattr(reply, f.name) for f in dataclasses.fields(reply) if f.name != "shared"}
        meta = {"federation": self.federation, "position": state.position, "base": state.base, "reply": said}
        save_arrays(self._path(state.round), arrays, meta)

    def forget_before(self, admitted: int) -> None:
        """Deletes states older than the last admitted one but one, which a restored coordinator may name."""
        older = [path for path in sorted(self.folder.glob("round-*.safetensors")) if path < self._path(admitted)]
        for path in older[:-1]:
            path.unlink(missing_ok=True)

    def _path(self, round_number: int) -> Path:
        return self.folder / f"round-{round_number:06d}.safetensors"

    def _check(self, path: Path, meta: Mapping[str, object]) -> None:
        if meta.get("federation") != self.federation:
            raise StateError(str(path), f"a state of federation {self.federation}", meta.get("federation"))


def _under(arrays: Mapping[str, object], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): torch.as_tensor(v) for k, v in arrays.items() if k.startswith(prefix)}
