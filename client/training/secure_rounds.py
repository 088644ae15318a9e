"""A site's part in secure sums: its answer to each step, and a record on disk of its masked vectors and opened sums.

These rules hold, also after a restart. In each round, a site takes part with one list of sites and opens one sum. In
each attempt, it masks one vector. It takes part in the sum of a second round from the same adapter only if it continued
from its state of the first, or of a later round. A federation that had secure aggregation cannot go on without.

What the first rule gives is about the sites in a sum. Their updates may still be zero: the coordinator chooses the
adapter, the plan and the state that each site begins with. Let a list have n sites, of which t ≥ 2n/3 open a sum, and
let c of them work with the coordinator. Two opened sums need t sites each, and no honest site opens both, so that
2(t - c) ≤ n - c. With fewer than 2t - n colluders, at most one sum of a list is opened, and no site has both of its
secrets revealed. An honest site is on one list only, so that its update is in at most one opened sum of a round. The
coordinator chooses the lists, but t ≥ ``min_sites`` (a site refuses fewer than its ``allow.min_sites``) and n ≤ 3t/2
give 2t - n ≥ t/2. So all of this holds for every list with fewer than half of ``min_sites`` colluders, and at least two
honest sites are then in each opened sum.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...common.atomic_io import load_arrays, save_arrays
from ...common.checked_entries import CheckedEntries, Entries
from ...common.config.schema import Plan
from ...common.digest import digest
from ...common.errors import DamagedError, RefusedError
from ...common.protocol.types import (
    OF_UPDATE,
    PRELIMINARY,
    SumReply,
    SumRequest,
    TrainReply,
    TrainRequest,
    check_arrays,
)
from ...common.secure_aggregation.bodies import Opened, Shared, SumBody, from_bytes, to_bytes
from ...common.secure_aggregation.fixed_point import flatten
from ...common.secure_aggregation.identity import Identity
from ...common.secure_aggregation.masking import derive
from ...common.secure_aggregation.participant import Participant
from ...common.secure_aggregation.view import View, from_hex, salt_of
from .state_store import StateStore

RECORD = "secure-sums.json"  # in the federation's folder
REFERENCE = "secure-reference.safetensors"  # the shared arrays that the site trained from last
MEMBERS, REFERENCES = "members", "references"  # of an entry: hashes of the list of sites, and of the shared arrays
AGAIN = "A run that begins again needs another name."
MASKED, OPENED = "masked", "opened"  # of an entry: the masks of each attempt, and the sum that was opened


class SumRecord:
    """The file of the lists of sites, masked vectors and opened sums of one federation.

    Raises StateError or DamagedError.
    """

    def __init__(self, path: Path, site: str) -> None:
        self.site = site
        expected, lost = "a record of secure sums", "it is unknown which sums this site has opened"
        hint = "Restore the file. If you delete it, the coordinator can have the sums of past rounds opened again."
        self.file = CheckedEntries(path, "rounds", expected, lost, hint)

    def join(self, round_number: int, members: Sequence[str], reference: str, start: int) -> None:
        """Record that the site takes part in a round, with this list of sites and trained from these shared arrays.

        ``start`` is the round of the personal state that the training began with. Raises RefusedError for a second
        list, and for arrays of another round if the site's state is not newer: the update would be the same.
        """
        entries, listed = self._read(), digest(json.dumps(sorted(members)))
        entry = entries.setdefault(str(round_number), {MEMBERS: listed, REFERENCES: [], MASKED: {}, OPENED: None})
        if entry[MEMBERS] != listed:
            field, found = f"list of sites of round {round_number}", f"another one, of {len(members)}"
            message = f"The coordinator names other sites for the sum of round {round_number} than before."
            hint = f"{AGAIN} It keeps the list of each round in secure/members.json of its run folder."
            raise RefusedError(field, "the one of before", found, site=self.site, message=message, hint=hint)
        again = [t for t, e in entries.items() if reference in e[REFERENCES] and start < int(t) != round_number]
        if again:
            message = f"The coordinator asks for the update of round {again[0]} again, as that of round {round_number}."
            hint = f"The difference of two sums could be the update of one site. {AGAIN}"
            found = f"that of round {again[0]}"
            raise RefusedError("reference", "another adapter", found, site=self.site, message=message, hint=hint)
        if reference not in entry[REFERENCES]:
            entry[REFERENCES].append(reference)
            self.file.write(entries)

    def mask(self, round_number: int, attempt: str, salt: str) -> None:
        """Record that a vector is masked in an attempt of a round that the site has joined.

        Raises RefusedError if it has other masks already.
        """
        entries = self._read()
        masked = entries[str(round_number)][MASKED]
        if masked.get(attempt, salt) != salt:
            message = "The coordinator asked for a second masked vector in one attempt, with other keys."
            raise RefusedError("mask keys", "those of the first request", "others", site=self.site, message=message)
        if attempt not in masked:
            masked[attempt] = salt
            self.file.write(entries)

    def open(self, round_number: int, attempt: str, salt: str, opened: str) -> None:
        """Record which sum of a round is opened. Raises RefusedError for another one, or one without this site."""
        entries = self._read()
        entry = entries.get(str(round_number), {})
        if entry.get(MASKED, {}).get(attempt) != salt:
            message = "The coordinator asked to open a sum for which this site has sent no masked vector."
            raise RefusedError("attempt", "one of this site", "another", site=self.site, message=message)
        if entry[OPENED] not in (None, opened):
            message = f"The coordinator asked to open a second sum of round {round_number}."
            hint = f"The difference of two sums could be the update of one site. {AGAIN}"
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
        self._join(request, body)
        return to_bytes(Shared(participant.offer, sealed))

    def _mask(self, request: SumRequest, body: SumBody, participant: Participant, vector: np.ndarray) -> bytes:
        masked = participant.mask(vector, body.offers)
        self._join(request, body)
        self._record.mask(request.round, participant.view.digest.hex(), salt_of(participant.view, body.offers).hex())
        return masked.astype("<u4").tobytes()

    def _open(self, request: SumRequest, body: SumBody, participant: Participant, vector: np.ndarray) -> bytes:
        envelopes = {name: from_hex(text, None, "envelope") for name, text in body.envelopes.items()}
        revealed = participant.reveal(body.offers, body.survivors, envelopes)
        salt, attempt = salt_of(participant.view, body.offers).hex(), participant.view.digest.hex()
        survivors = digest("|".join((salt, attempt, *sorted(body.survivors))))
        self._record.open(request.round, attempt, salt, survivors)
        return to_bytes(Opened.of(revealed))

    def _join(self, request: SumRequest, body: SumBody) -> None:
        start = self.store.previous(request.round) or 0
        self._record.join(request.round, body.members, request.reference, start)

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
    """The reply as it leaves a site: no update, no weight, and no metric that is computed from the update.

    The first two are sent masked, in later messages.
    """
    metrics = {name: value for name, value in reply.metrics.items() if name not in OF_UPDATE}
    return dataclasses.replace(reply, shared={}, terms=0, examples=0, metrics=metrics)


def check_still_secure(plan: Plan, folder: Path, site: str) -> None:
    """Raise RefusedError for a plan without secure aggregation if the federation of this folder had it before."""
    if not plan.privacy.secure_aggregation and any((folder / name).exists() for name in (RECORD, REFERENCE)):
        message = f"Federation {plan.name} had secure aggregation before, and the coordinator now asks without."
        hint = "Without it, the coordinator sees the update of this site. Use another name for another federation."
        expected = "true, as before"
        raise RefusedError("privacy.secure_aggregation", expected, "false", site=site, message=message, hint=hint)


def _check_entry(entry: Any) -> None:
    kinds = {MEMBERS: str, REFERENCES: list, MASKED: dict, OPENED: str | None}
    if not isinstance(entry, dict) or entry.keys() != kinds.keys():
        raise ValueError("an entry has other fields")
    if not all(isinstance(entry[name], kind) for name, kind in kinds.items()):
        raise ValueError("a field of an entry is of another type")
