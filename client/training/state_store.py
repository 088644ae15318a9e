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

from ...common.atomic_io import load_arrays, save_arrays
from ...common.errors import StateError
from ...common.models.saved import DISCRIMINATOR, PERSONAL, SHARED, TRAINED, WRITER, ModelMetadata
from ...common.protocol.types import Arrays, TrainReply
from ...transfer.preparation import TransferArtifacts

MOMENTS, NOTHING = "moments/", "none/"
MAX_STATES = 3  # admitted states on disk, as many as the coordinator keeps checkpoints


@dataclass(frozen=True)
class PersonalState:
    """What a site owns after a round. Round 0 is a site that has trained nothing yet."""

    round: int = 0
    previous: int = 0  # the round whose state it was trained from
    position: int = 0  # examples drawn so far
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    optimizer_state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    base: Mapping[str, float] | None = None  # metrics of the bare base model, measured once
    plan: str = ""  # JSON of the plan it was trained by, with the site's own choices


class StateStore:
    """The state folder of one site in one federation."""

    def __init__(self, folder: Path, federation: str) -> None:
        self.folder, self.federation = folder, federation

    def state(self, round_number: int) -> PersonalState | None:
        """The state after ``round_number``; None when there is none. Round 0 is always there."""
        if round_number == 0:
            return PersonalState()
        path = self.path(round_number)
        if not path.exists():
            return None
        arrays, meta = load_arrays(path)
        self._check(path, meta)
        return PersonalState(
            round_number,
            meta["previous"],
            meta["position"],
            _under(arrays, PERSONAL),
            _under(arrays, MOMENTS),
            meta["base"],
            meta["card"]["plan"],
        )

    def reply(self, round_number: int, key: str) -> TrainReply | None:
        """The stored reply to exactly this order, if there is one."""
        path = self.path(round_number)
        if not path.exists():
            return None
        arrays, meta = load_arrays(path, prefix=TRAINED)
        self._check(path, meta)
        return TrainReply(**meta["reply"], shared=arrays) if meta["reply"]["key"] == key else None

    def write(
        self,
        state: PersonalState,
        reply: TrainReply,
        card: ModelMetadata,
        shared: Arrays,
        prepared: TransferArtifacts | None = None,
    ) -> None:
        """Puts state and reply on disk in one rename. Raises StateError, and leaves the old files, when it cannot.

        ``shared`` is the adapter that the state was made on, where the reply has none: a file is a whole model.
        ``prepared`` is what a later transfer needs.
        """
        arrays = {PERSONAL + k: v.cpu().numpy() for k, v in state.tensors.items()}
        arrays |= {MOMENTS + k: v.cpu().numpy() for k, v in state.optimizer_state.items()}
        arrays |= {TRAINED + k: v for k, v in reply.shared.items()}
        arrays |= {SHARED + k: v for k, v in shared.items()}
        said = {f.name: getattr(reply, f.name) for f in dataclasses.fields(reply) if f.name != "shared"}
        meta = {"federation": self.federation, "previous": state.previous, "position": state.position}
        meta |= {"base": state.base, "reply": said, "card": dataclasses.asdict(card)}
        if prepared:
            arrays |= {DISCRIMINATOR + k: v.cpu().numpy() for k, v in prepared.discriminator.items()}
            arrays |= {WRITER + k: v.cpu().numpy() for k, v in prepared.tuned_generator.items()}
            kept = {"seeds": prepared.seeds, "about": prepared.dataset_name, "examples": prepared.examples}
            meta["transfer"] = kept
        save_arrays(self.path(state.round), arrays, meta)

    def prune(self, admitted: int) -> None:
        """Deletes states before the last admitted one, but for the few it was trained from.

        A coordinator that was put back to an older checkpoint may name those. Candidates that were never admitted go.
        A round that this site has no state of, whoever named it, deletes nothing.
        """
        if not self.path(admitted).exists():
            return
        kept, number = [], admitted
        while number and len(kept) < MAX_STATES and self.path(number).exists():
            kept.append(self.path(number))
            number = load_arrays(kept[-1], prefix=NOTHING)[1]["previous"]
        for path in self.folder.glob("round-*.safetensors"):
            if path < self.path(admitted) and path not in kept:
                path.unlink(missing_ok=True)

    def path(self, round_number: int) -> Path:
        """The file of a round."""
        return self.folder / f"round-{round_number:06d}.safetensors"

    def _check(self, path: Path, meta: Mapping[str, object]) -> None:
        if meta.get("federation") != self.federation:
            raise StateError(str(path), f"a state of federation {self.federation}", meta.get("federation"))


def _under(arrays: Mapping[str, object], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): torch.as_tensor(v) for k, v in arrays.items() if k.startswith(prefix)}
