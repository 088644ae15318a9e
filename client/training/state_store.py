"""A site's personal state on disk: one file per round, written atomically.

``round-000007.safetensors`` holds the site's state after round 7 (core, head, private adapter, optimizer state, data
position) and the reply that it sent, so the two cannot disagree. The state is a candidate until a later request names
round 7 as admitted. Until then training starts from the file of the last admitted round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...common.atomic_io import load_arrays, save_arrays
from ...common.config.schema import Plan, PrivateSettings, parse, to_dict
from ...common.errors import DamagedError, RefusedError, StateError
from ...common.models.saved import DISCRIMINATOR, FILES, PERSONAL, SHARED, TRAINED, WRITER, ModelMetadata
from ...common.protocol.types import Arrays, TrainReply
from ...transfer.preparation import TransferArtifacts

logger = logging.getLogger("colora.trainer")
LOCAL, LOCAL_MOMENTS = "local/", "local-moments/"  # prefixes of a model that the site trains alone
RECEIVED = "received/"  # prefix of the shared adapter that the state was trained from, where differences follow it
FEEDBACK = "feedback/"  # prefix of what rounding left out of the last update
MOMENTS = "moments/"  # prefix of the optimizer state's names in the file
NOTHING = "none/"  # a prefix that no array has: reads the metadata alone
MAX_STATES = 3  # admitted states kept on disk; the coordinator keeps as many checkpoints


@dataclass(frozen=True)
class PersonalState:
    """The personal state of a site after a round. Round 0 is a site that has not trained yet."""

    round: int = 0
    previous: int = 0  # the round whose state training started from
    position: int = 0  # number of examples drawn so far
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    optimizer_state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    base: Mapping[str, float] | None = None  # metrics of the base model without adapters, measured once
    row_scores: tuple[float, ...] = ()  # of each test row with the finished personal model; they stay at the site
    plan: str = ""  # JSON of the plan that the state was trained with, including the site's own choices
    local: PersonalState | None = None  # of the model that the site trains alone, with train.fallback
    feedback: Mapping[str, torch.Tensor] = field(default_factory=dict)  # what rounding left out of the last update
    noised: bool = False  # every training step up to here had the noise of differential privacy
    received: Arrays = field(default_factory=dict)  # the adapter for the next difference
    is_local: bool = False  # the model in ``tensors`` was trained alone, and needs no shared adapter


class StateStore:
    """The state folder of one site in one federation.

    A ``secret`` of the site takes the place of the recipe's seed in everything random at the site.
    """

    def __init__(self, folder: Path, federation: str, secret: str | None = None) -> None:
        self.folder, self.federation, self.secret = folder, federation, secret

    def state(self, round_number: int) -> PersonalState | None:
        """Return the state after ``round_number``, or None if there is none. Round 0 always exists.

        In place of a damaged file, the newest whole state of an earlier round is returned, and the log says so.
        """
        if round_number == 0:
            return PersonalState()
        path = self.path(round_number)
        if not path.exists():
            return None
        try:
            return self._read(path, round_number)
        except DamagedError as error:
            logger.error("%s", error)
        for older in sorted(self.folder.glob(FILES), reverse=True):
            if older < path:
                try:
                    state = self._read(older, _round_of(older))
                except (StateError, ValueError):
                    continue
                logger.error("Round %d continues from the state of round %d.", round_number + 1, state.round)
                return state
        logger.error("No earlier state is whole. The site starts from the shared adapter.")
        return None

    def _read(self, path: Path, round_number: int) -> PersonalState:
        arrays, meta = load_arrays(path)
        self._check(path, meta)
        try:
            return PersonalState(
                round_number,
                meta["previous"],
                meta["position"],
                _under(arrays, PERSONAL),
                _under(arrays, MOMENTS),
                meta["base"],
                tuple(meta.get("row_scores", ())),
                meta["card"]["plan"],
                local=_local_state(arrays, meta, round_number),
                feedback=_under(arrays, FEEDBACK),
                noised=meta.get("noised", False),
            )
        except (KeyError, TypeError) as error:
            raise _incomplete(path, error) from None

    def newest(self) -> PersonalState | None:
        """Return the state of the last round on disk, or None if there is none; see ``state`` for damaged files."""
        rounds = [_round_of(path) for path in self.folder.glob(FILES)]
        return self.state(max(rounds)) if rounds else None

    def labels(self) -> tuple[str, ...]:
        """Return the labels of the site's first state on disk, in the order of its head; empty without a state."""
        for path in sorted(self.folder.glob(FILES)):
            with contextlib.suppress(DamagedError, KeyError):
                return tuple(load_arrays(path, prefix=NOTHING)[1]["card"]["labels"])
        return ()

    def reply(self, round_number: int, key: str) -> TrainReply | None:
        """Return the stored reply to the request with this key; None if there is none or its file is damaged."""
        path = self.path(round_number)
        if not path.exists():
            return None
        try:
            arrays, meta = load_arrays(path, prefix=TRAINED)
            self._check(path, meta)
            return TrainReply(**meta["reply"], shared=arrays) if meta["reply"]["key"] == key else None
        except (DamagedError, KeyError, TypeError) as error:
            logger.error("The stored reply of round %d is damaged, so the round runs again: %s", round_number, error)
            return None

    def received(self, round_number: int) -> Arrays:
        """Return the shared adapter that a round's state was trained from; nothing if it is not stored or damaged."""
        path = self.path(round_number)
        if not path.exists():
            return {}
        try:
            arrays, meta = load_arrays(path, prefix=RECEIVED)
            self._check(path, meta)
            return arrays
        except StateError as error:
            logger.error("The site asks for the whole adapter, because it cannot read the last one: %s", error)
            return {}

    def write(
        self,
        state: PersonalState,
        reply: TrainReply,
        metadata: ModelMetadata,
        shared: Arrays,
        artifacts: TransferArtifacts | None = None,
    ) -> None:
        """Write state and reply to disk in one rename. Raises StateError, and leaves the old files, when it cannot.

        ``shared`` is the adapter of the state's model, so that every file is a complete model. It is empty where the
        reply has it. ``artifacts`` are what a later transfer needs.
        """
        arrays = {PERSONAL + k: v.cpu().numpy() for k, v in state.tensors.items()}
        arrays |= {MOMENTS + k: v.cpu().numpy() for k, v in state.optimizer_state.items()}
        arrays |= {FEEDBACK + k: v.numpy() for k, v in state.feedback.items()}
        arrays |= {RECEIVED + k: v for k, v in state.received.items()}
        if state.local:
            arrays |= {LOCAL + k: v.cpu().numpy() for k, v in state.local.tensors.items()}
            arrays |= {LOCAL_MOMENTS + k: v.cpu().numpy() for k, v in state.local.optimizer_state.items()}
        arrays |= {TRAINED + k: v for k, v in reply.shared.items()}
        arrays |= {SHARED + k: v for k, v in shared.items()}
        reply_fields = {f.name: getattr(reply, f.name) for f in dataclasses.fields(reply) if f.name != "shared"}
        meta = {"federation": self.federation, "previous": state.previous, "position": state.position}
        meta |= {
            "base": state.base,
            "row_scores": state.row_scores,
            "noised": state.noised,
            "local_position": state.local.position if state.local else None,
            "reply": reply_fields,
            "card": dataclasses.asdict(metadata),
        }
        if artifacts:
            arrays |= {DISCRIMINATOR + k: v.cpu().numpy() for k, v in artifacts.discriminator.items()}
            arrays |= {WRITER + k: v.cpu().numpy() for k, v in artifacts.tuned_generator.items()}
            meta["transfer"] = {
                "seeds": artifacts.seeds,
                "about": artifacts.dataset_name,
                "examples": artifacts.examples,
            }
        save_arrays(self.path(state.round), arrays, meta)

    def prune(self, admitted: int) -> None:
        """Delete states older than the last admitted one, except the few that it was trained from.

        A coordinator that was reset to an older checkpoint may name these. Candidates that were never admitted are
        deleted. A round of which the site has no state, or a damaged one, deletes nothing.
        """
        if not self.path(admitted).exists():
            return
        ancestors, number = [], admitted
        while number and len(ancestors) < MAX_STATES and self.path(number).exists():
            ancestors.append(self.path(number))
            before = self.previous(number)
            if before is None:  # it may be the newest whole state
                return
            number = before
        for path in self.folder.glob(FILES):
            if path < self.path(admitted) and path not in ancestors:
                path.unlink(missing_ok=True)

    def previous(self, round_number: int) -> int | None:
        """Return the round whose state the training of a round began with; None if it is unknown."""
        try:
            return load_arrays(self.path(round_number), prefix=NOTHING)[1]["previous"]
        except (StateError, KeyError):
            return None

    def path(self, round_number: int) -> Path:
        """The path of a round's file."""
        return self.folder / f"round-{round_number:06d}.safetensors"

    def _check(self, path: Path, meta: Mapping[str, object]) -> None:
        if "federation" not in meta:
            raise _incomplete(path, KeyError("federation"))
        if meta.get("federation") != self.federation:
            other = meta.get("federation")
            raise StateError(
                str(path),
                f"a state of federation {self.federation}",
                other,
                message=f"{path} belongs to federation {other}, not to {self.federation}.",
                hint="Use another state folder.",
            )


def _round_of(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))


def check_own_choices(state: PersonalState, plan: Plan, site: str) -> None:
    """Refuse another private adapter or another rank than those of the stored state. Raises RefusedError."""
    stored = parse(Plan, json.loads(state.plan)) if state.plan else plan
    if stored.private != plan.private:
        before, now = _describe_private(stored.private), _describe_private(plan.private)
        raise RefusedError(
            "private",
            f"{before}, as in the site's state of round {state.round} (or a new state folder)",
            now,
            site=site,
            message=f"The private adapter is {now}, but the site's state of round {state.round} has {before}.",
            hint="Keep the private adapter's settings, or use a new state folder.",
        )
    before, now = stored.adapter.rank, plan.adapter.rank
    if before != now:
        raise RefusedError(
            "adapter.rank",
            f"rank {before}, as in the site's state of round {state.round} (or a new state folder)",
            now,
            site=site,
            message=f"The adapter has rank {now} here, but the site's state of round {state.round} has rank {before}.",
            hint="Keep adapter.rank and allow.max_rank, or use a new state folder.",
        )


def _describe_private(private: PrivateSettings) -> str:
    return ", ".join(f"{k} {v}" for k, v in to_dict(private).items()) if private.present else "none"


def _incomplete(path: Path, error: Exception) -> DamagedError:
    message = f"{path} is damaged: its metadata are incomplete ({error})."
    return DamagedError(str(path), "complete metadata", error, message=message)


def _local_state(arrays: Mapping[str, object], meta: Mapping[str, Any], round_number: int) -> PersonalState | None:
    if (position := meta.get("local_position")) is None:
        return None
    return PersonalState(
        round_number, position=position, tensors=_under(arrays, LOCAL), optimizer_state=_under(arrays, LOCAL_MOMENTS)
    )


def _under(arrays: Mapping[str, object], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): torch.as_tensor(v) for k, v in arrays.items() if k.startswith(prefix)}
