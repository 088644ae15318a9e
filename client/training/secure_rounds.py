"""A site's part in secure sums: its answer to each step, and a record on disk of its masked vectors and opened sums.

Two rules hold, also after a restart: one masked vector for each attempt, and one opened sum for each round. Without
them a coordinator could ask twice and compare, or get both secrets of one site.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...common.atomic_io import load_arrays, save_arrays
from ...common.checked_entries import CheckedEntries, Entries
from ...common.config.schema import Plan, digest
from ...common.errors import DamagedError, RefusedError
from ...common.protocol.types import PRELIMINARY, SumReply, SumRequest, TrainReply, TrainRequest, check_arrays
from ...common.secure_aggregation.bodies import Opened, Shared, SumBody, from_bytes, to_bytes
from ...common.secure_aggregation.fixed_point import flatten
from ...common.secure_aggregation.identity import Identity
from ...common.secure_aggregation.masking import derive
from ...common.secure_aggregation.participant import Participant
from ...common.secure_aggregation.view import View, from_hex, salt_of
from .state_store import StateStore

RECORD = "secure-sums.json"  # in the federation's folder
REFERENCE = "secure-reference.safetensors"  # the shared arrays that the site trained from last
MASKED, OPENED = "masked", "opened"  # of an entry: the masks of each attempt, and the sum that was opened
MAX_ATTEMPTS = 1000  # masked vectors of one round


class SumRecord:
    """The file of the masked vectors and opened sums of one federation. Raises StateError or DamagedError."""

    def __init__(self, path: Path, site: str) -> None:
        self.site = site
        expected, lost = "a record of secure sums", "it is unknown which sums this site has opened"
        hint = "Restore the file. If you delete it, the coordinator can have the sums of past rounds opened again."
        self.file = CheckedEntries(path, "rounds", expected, lost, hint)

    def mask(self, round_number: int, attempt: str, salt: str) -> None:
        """Record that a vector is masked in an attempt. Raises RefusedError if it has other masks already."""
        entries = self._read()
        masked = entries.setdefault(str(round_number), {MASKED: {}, OPENED: None})[MASKED]
        if masked.get(attempt, salt) != salt:
            message = "The coordinator asked for a second masked vector in one attempt, with other keys."
            raise RefusedError("mask keys", "those of the first request", "others", site=self.site, message=message)
        if attempt not in masked:
            if len(masked) >= MAX_ATTEMPTS:
                raise RefusedError("attempts", f"at most {MAX_ATTEMPTS} of a round", len(masked) + 1, site=self.site)
            masked[attempt] = salt
            self.file.write(entries)

    def open(self, round_number: int, attempt: str, salt: str, opened: str) -> None:
        """Record which sum of a round is opened. Raises RefusedError for another one, or one without this site."""
        entries = self._read()
        entry = entries.get(str(round_number), {MASKED: {}, OPENED: None})
        if entry[MASKED].get(attempt) != salt:
            message = "The coordinator asked to open a sum for which this site has sent no masked vector."
            raise RefusedError("attempt", "one of this site", "another", site=self.site, message=message)
        if entry[OPENED] not in (None, opened):
            message = f"The coordinator asked to open a second sum of round {round_number}."
            hint = "The difference of two sums could be the update of one site."
            raise RefusedError("sum", "the one of before", "another", site=self.site, message=message, hint=hint)
        if entry[OPENED] is None:
            entry[OPENED] = opened
            self.file.write(entries)

    def _read(self) -> Entries:
        return self.file.read(_check_entry)


@dataclass(frozen=True)
class SecureRounds:
    """``secret`` is a text that the coordinator does not know, from which the keys of all rounds derive."""

    plan: Plan
    identity: Identity
    secret: str
    store: StateStore

    def prepare(self, request: TrainRequest) -> None:
        """Keep the arrays of a train request until the update is sent. Raises RefusedError for other requests.

        Before round 1 a site would send arrays that no other site's masks.
        """
        if request.kind in PRELIMINARY:
            found, site = request.kind, self.identity.site
            raise RefusedError("request", "a round, with secure aggregation", found, site=site)
        if request.kind == "train" and self._reference_key() != request.key:
            save_arrays(self._reference, dict(request.shared), {"key": request.key})

    def answer(self, request: SumRequest) -> SumReply:
        """Take a step of a secure sum. Raises RefusedError, and StateError for files."""
        body, trained = from_bytes(SumBody, request.body), self._trained(request)
        view = self._view(request, body)
        view.check(self.identity.site)
        bound = self.plan.train.max_update_norm
        assert bound is not None  # check_privacy
        weight = {"tokens": trained.terms, "examples": trained.examples, "uniform": 1}[body.weights]
        vector = view.fixed_point(bound).encode(self._update(trained), weight)
        content = hashlib.sha256(vector.tobytes()).hexdigest()
        secret = derive(self.secret.encode(), view.digest, f"round {request.key} {content}")
        answer = STEPS[request.step](self, request, body, Participant(self.identity, view, secret), vector)
        return SumReply(self.identity.site, request.federation, request.round, request.step, request.key, answer)

    def _view(self, request: SumRequest, body: SumBody) -> View:
        plan = digest(request.plan)
        names = (request.federation, request.round, body.token, plan, request.reference)
        return View(*names, body.weights, body.max_weight, body.members, self.plan.privacy.min_sites)

    def _share(self, request: SumRequest, body: SumBody, participant: Participant, vector: np.ndarray) -> bytes:
        sealed = {name: text.hex() for name, text in participant.envelopes().items()}
        return to_bytes(Shared(participant.offer, sealed))

    def _mask(self, request: SumRequest, body: SumBody, participant: Participant, vector: np.ndarray) -> bytes:
        masked = participant.mask(vector, body.offers)
        self._record.mask(request.round, participant.view.digest.hex(), salt_of(participant.view, body.offers).hex())
        return masked.astype("<u4").tobytes()

    def _open(self, request: SumRequest, body: SumBody, participant: Participant, vector: np.ndarray) -> bytes:
        envelopes = {name: from_hex(text, None, "envelope") for name, text in body.envelopes.items()}
        revealed = participant.reveal(body.offers, body.survivors, envelopes)
        salt, attempt = salt_of(participant.view, body.offers).hex(), participant.view.digest.hex()
        survivors = digest("|".join((salt, attempt, *sorted(body.survivors))))
        self._record.open(request.round, attempt, salt, survivors)
        return to_bytes(Opened.of(revealed))

    @property
    def _record(self) -> SumRecord:
        return SumRecord(self.store.folder / RECORD, self.identity.site)

    @property
    def _reference(self) -> Path:
        return self.store.folder / REFERENCE

    def _reference_key(self) -> str | None:
        try:
            return load_arrays(self._reference)[1].get("key") if self._reference.exists() else None
        except DamagedError:
            return None

    def _trained(self, request: SumRequest) -> TrainReply:
        reply = self.store.reply(request.round, request.key)
        if reply is None:
            message = f"The site has no reply to the request of round {request.round} that the coordinator names."
            raise RefusedError("request", "one that the site has answered", "another", message=message)
        return reply

    def _update(self, reply: TrainReply) -> np.ndarray:
        """The update (n,) in fp64: what the site would have sent, less what it received."""
        arrays, meta = load_arrays(self._reference) if self._reference.exists() else ({}, {})
        if meta.get("key") != reply.key:
            message = f"The site no longer has the arrays that it received in round {reply.round}."
            raise RefusedError("reference", "the arrays of the request", "others", message=message)
        check_arrays(arrays, {key: array.shape for key, array in reply.shared.items()}, self.identity.site)
        return flatten(reply.shared) - flatten(arrays)


Step = Callable[[SecureRounds, SumRequest, SumBody, Participant, np.ndarray], bytes]
STEPS: dict[str, Step] = {"share": SecureRounds._share, "mask": SecureRounds._mask, "open": SecureRounds._open}


def without_update(reply: TrainReply) -> TrainReply:
    """The reply as it leaves a site: the update and its weight are sent masked, in later messages."""
    return dataclasses.replace(reply, shared={}, terms=0, examples=0)


def _check_entry(entry: Any) -> None:
    if not isinstance(entry, dict) or entry.keys() != {MASKED, OPENED} or not isinstance(entry[MASKED], dict):
        raise ValueError("an entry has other fields")
