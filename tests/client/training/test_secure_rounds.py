"""Sites with secure aggregation against a coordinator that leads them to different sums of one round."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from colora.client.training.secure_rounds import SecureRounds
from colora.client.training.state_store import StateStore
from colora.common.atomic_io import save_arrays
from colora.common.config.schema import ModelSettings, Plan, PrivacySettings, TrainSettings, to_json
from colora.common.digest import digest
from colora.common.errors import RefusedError
from colora.common.protocol.types import SumRequest, SumStep, TrainReply, TrainRequest
from colora.common.secure_aggregation.bodies import Opened, Shared, SumBody, from_bytes, to_bytes
from colora.common.secure_aggregation.identity import Identity
from colora.common.secure_aggregation.opening import unmask
from colora.common.secure_aggregation.participant import Revealed
from colora.common.secure_aggregation.view import View

BOUND, SIZE, MIN_SITES = 1.0, 20, 5
VICTIM, PEERS, OTHERS = "ada", ("bob", "cyd", "dee", "eve"), ("fay", "gus", "hal")
COLLUDERS = ("yan", "zoe")  # fewer than half of MIN_SITES
KEYS = {name: ec.generate_private_key(ec.SECP384R1()) for name in (VICTIM, *PEERS, *OTHERS, *COLLUDERS)}
ROSTER = {name: key.public_key() for name, key in KEYS.items()}
PLAN = Plan(
    "fed",
    4,
    ModelSettings("none"),
    train=TrainSettings(steps=1, max_update_norm=BOUND),
    privacy=PrivacySettings(secure_aggregation=True, min_sites=MIN_SITES),
)


class Trained(StateStore):
    """The state of a site that has trained: its reply to any request adds the same update to the adapter."""

    def __init__(self, folder: Path, site: str, update: np.ndarray) -> None:
        super().__init__(folder, PLAN.name)
        self.site, self.update, self.requests = site, update, dict[str, TrainRequest]()

    def reply(self, round_number: int, key: str) -> TrainReply | None:
        if key not in self.requests:
            return None
        shared = {name: value + self.update for name, value in self.requests[key].shared.items()}
        return TrainReply(self.site, PLAN.name, round_number, key, shared, terms=7, examples=3)


def train_request(t: int = 1, start: float = 0.0, admitted: int = 0) -> TrainRequest:
    shared = {"A": np.full(SIZE, start, np.float32)}
    return TrainRequest(PLAN.name, t, "train", admitted, to_json(PLAN), shared, evaluate=False)


@dataclass
class Attempt:
    """One attempt at a sum: who is named, who is said to be in the sum to each site that opens it."""

    token: str
    members: tuple[str, ...]
    survivors: tuple[str, ...]
    told: Mapping[str, tuple[str, ...]]

    @property
    def body(self) -> SumBody:
        return SumBody(self.token, self.members, "uniform", 1)

    def view(self, request: TrainRequest) -> View:
        names = (request.federation, request.round, self.token, digest(request.plan), request.reference)
        return View(*names, "uniform", 1, self.members, MIN_SITES)


@dataclass
class Coordinator:
    """It asks as it likes. The colluders forget what they have opened."""

    folder: Path
    request: TrainRequest = field(default_factory=train_request)
    refusals: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(1)
        self.updates = {name: rng.uniform(-0.1, 0.1, SIZE).astype(np.float32) for name in KEYS}

    def site(self, name: str) -> SecureRounds:
        """The site after a restart, with what it has on disk."""
        store = Trained(self.folder / name, name, self.updates[name])
        store.folder.mkdir(exist_ok=True)
        secure = SecureRounds(PLAN, Identity(name, KEYS[name], ROSTER), f"secret of {name}", store)
        secure.prepare(self.request)
        store.requests[self.request.key] = self.request
        return secure

    def ask(self, name: str, step: SumStep, body: SumBody) -> bytes | None:
        train = self.request
        same = (train.admitted_round, train.plan, train.evaluate, train.reference)
        try:
            return self.site(name).answer(SumRequest(PLAN.name, train.round, step, *same, to_bytes(body))).body
        except RefusedError as error:
            self.refusals.append(str(error))
            return None

    def sum_of(self, attempt: Attempt) -> np.ndarray | None:
        """The sum of the updates of the attempt's survivors; None if it does not get it."""
        for name in COLLUDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        replies = {name: self.ask(name, "share", attempt.body) for name in attempt.members}
        shared = {name: from_bytes(Shared, reply) for name, reply in replies.items() if reply is not None}
        body = dataclasses.replace(attempt.body, offers={name: each.offer for name, each in shared.items()})
        vectors = {name: self.ask(name, "mask", body) for name in shared}
        if any(vectors.get(name) is None for name in attempt.survivors):
            return None
        opened: dict[str, Revealed] = {}
        for name, survivors in attempt.told.items():
            sealed = {sender: each.envelopes[name] for sender, each in shared.items() if sender != name}
            reply = self.ask(name, "open", dataclasses.replace(body, survivors=survivors, envelopes=sealed))
            opened |= {name: from_bytes(Opened, reply).revealed()} if reply else {}
        masked = [np.frombuffer(vectors[name] or b"", "<u4") for name in attempt.survivors]
        view, total = attempt.view(self.request), np.sum(masked, axis=0, dtype=np.uint32)
        try:
            total = unmask(total, view, body.offers, attempt.survivors, opened).total
        except RefusedError:
            return None
        return view.fixed_point(BOUND).decode(total, len(masked)).update * len(masked)


def with_victim() -> Attempt:
    """The sum of the victim, its peers and the colluders. The victim, two of the peers and the colluders open it."""
    members = (VICTIM, *PEERS, *COLLUDERS)
    return Attempt("first", members, members, dict.fromkeys((VICTIM, *PEERS[:2], *COLLUDERS), members))


def without_victim() -> Attempt:
    """The sum of the peers and the colluders.

    The other two peers open it, and three more sites, of which each is told that the two others were lost. So the
    coordinator gets the keys of all three, and takes them out of the sum.
    """
    survivors = (*PEERS, *COLLUDERS)
    told = {**dict.fromkeys((*PEERS[2:], *COLLUDERS), survivors), **{name: (*survivors, name) for name in OTHERS}}
    return Attempt("second", (*PEERS, *OTHERS, *COLLUDERS), survivors, told)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_colluders_and_two_lists_of_sites_do_not_show_the_update_of_a_site(
    tmp_path: Path, order: tuple[int, int]
) -> None:
    """Each honest site opens one sum only. If the peers were in both, the difference would be the victim's update."""
    coordinator, attempts = Coordinator(tmp_path), (with_victim(), without_victim())
    sums = {k: coordinator.sum_of(attempts[k]) for k in order}
    first, second = sums[order[0]], sums[order[1]]
    assert first is not None
    expected = np.sum([coordinator.updates[name] for name in attempts[order[0]].survivors], axis=0)
    assert np.allclose(first, expected, atol=1e-6)
    if second is not None:
        difference = first - second if order == (0, 1) else second - first
        far = np.abs(difference - coordinator.updates[VICTIM]).max()
        pytest.fail(f"the difference of two sums is the update of {VICTIM} to {far:.1e}")
    said = [text for text in coordinator.refusals if "names other sites for the sum of round 1 than before" in text]
    assert len(said) == len(PEERS)


def test_an_update_is_not_summed_again_under_the_number_of_another_round(tmp_path: Path) -> None:
    """Without a state of round 1, or from the same state as before, the same training would give the same update."""
    coordinator, members = Coordinator(tmp_path), (VICTIM, *PEERS, *COLLUDERS)
    assert coordinator.sum_of(everyone(members)) is not None
    for admitted in (0, 1):
        coordinator.request = train_request(2, admitted=admitted)
        assert coordinator.sum_of(everyone(members[1:])) is None
    assert any("asks for the update of round 1 again, as that of round 2" in text for text in coordinator.refusals)
    coordinator.request = train_request(2, start=0.5)
    assert coordinator.sum_of(everyone(members[1:])) is not None


@pytest.mark.parametrize(("start", "takes_part"), [(1, True), (0, False)])
def test_a_site_sums_from_the_same_adapter_again_if_its_training_began_with_its_state(
    tmp_path: Path, start: int, takes_part: bool
) -> None:
    """As after a round whose sum could not be read. A state that came after the training is not enough."""
    coordinator, members = Coordinator(tmp_path), (VICTIM, *PEERS)
    assert coordinator.sum_of(everyone(members)) is not None
    for name in members:
        save_arrays(tmp_path / name / "round-000001.safetensors", {}, {"previous": 0})
        save_arrays(tmp_path / name / "round-000002.safetensors", {}, {"previous": start})
    coordinator.request = train_request(2, admitted=1)
    assert (coordinator.sum_of(everyone(members)) is not None) == takes_part


def everyone(members: tuple[str, ...]) -> Attempt:
    """An attempt in which all do as they should."""
    return Attempt("only", members, members, dict.fromkeys(members, members))
