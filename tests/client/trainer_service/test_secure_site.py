"""A site with secure aggregation as a trainer process: what leaves it, and what it never does twice."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from colora.client.trainer_service.client import TrainerError
from colora.client.training.secure_rounds import RECORD, REFERENCE, SumRecord
from colora.common.config.schema import Plan, PrivacySettings, to_json
from colora.common.digest import digest
from colora.common.errors import DamagedError, RefusedError
from colora.common.protocol.types import SumRequest, TrainRequest
from colora.common.secure_aggregation.bodies import Opened, Shared, SumBody, from_bytes, to_bytes
from colora.common.secure_aggregation.identity import Identity
from colora.common.secure_aggregation.participant import Participant
from colora.common.secure_aggregation.view import Offer, View
from colora.server.deployment.provisioning.certificates import new_site_key

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SiteSetup

NAMES = ("ada", "bob", "cyd", "dee")


class Others:
    """The other sites of the roster, played by the test, and the coordinator."""

    def __init__(self, setup: SiteSetup) -> None:
        keys = {name: new_site_key(name) for name in NAMES}
        (setup.folder / "aggregation.key").write_bytes(keys["ada"][0])
        (setup.folder / "roster.pub").write_bytes(b"".join(public for _, public in keys.values()))
        private: dict[str, Any] = {name: load_ssh_private_key(key, None) for name, (key, _) in keys.items()}
        self.keys: dict[str, ec.EllipticCurvePrivateKey] = private
        self.roster = {name: key.public_key() for name, key in self.keys.items()}

    def play(self, view: View) -> dict[str, Participant]:
        return {
            name: Participant(Identity(name, self.keys[name], self.roster), view, name.encode().ljust(32))
            for name in view.members
            if name != "ada"
        }


def secure_plan(setup: SiteSetup, **privacy: Any) -> Plan:
    settings = PrivacySettings(secure_aggregation=True, **privacy)
    return dataclasses.replace(setup.plan(max_update_norm=10.0), privacy=settings)


def body(token: str = "first", **more: Any) -> SumBody:
    return SumBody(token, NAMES, "tokens", 64, **more)


def view_of(request: TrainRequest, asked: SumBody) -> View:
    names = (request.federation, request.round, asked.token, digest(request.plan), request.reference)
    min_sites = json.loads(request.plan)["privacy"]["min_sites"]
    return View(*names, asked.weights, asked.max_weight, asked.members, min_sites)


def step(request: TrainRequest, name: Any, content: SumBody) -> SumRequest:
    train = (request.admitted_round, request.plan, request.evaluate, request.reference)
    return SumRequest(request.federation, request.round, name, *train, to_bytes(content))


def attempt(setup: SiteSetup, others: Others, request: TrainRequest, token: str) -> tuple[SumBody, dict[str, str]]:
    """Run the first step; return the body of the next one, and what the others sealed for this site."""
    asked = body(token)
    mine = from_bytes(Shared, setup.client().sum(step(request, "share", asked)).body)
    played = others.play(view_of(request, asked))
    offers: dict[str, Offer] = {"ada": mine.offer, **{name: other.offer for name, other in played.items()}}
    sealed = {name: other.envelopes()["ada"].hex() for name, other in played.items()}
    return dataclasses.replace(asked, offers=offers), sealed


def refused(setup: SiteSetup, message: str) -> bool:
    return any(message in line for trainer in setup.running for line in trainer.lines)


def test_a_site_sends_its_update_masked_only_and_opens_one_sum_also_after_a_restart(site_setup: SiteSetup) -> None:
    others = Others(site_setup)
    site_setup.configure("[allow]", "require_secure_aggregation = true").start()
    plan, site = secure_plan(site_setup), site_setup.client()
    request = site_setup.request(plan)
    site.site_info(plan.name, to_json(plan))
    reply = site.handle(request)
    assert (reply.shared, reply.terms, reply.examples) == ({}, 0, 0)
    asked, sealed = attempt(site_setup, others, request, "first")
    masked = site.sum(step(request, "mask", asked)).body
    assert len(masked) == 4 * (1 + sum(array.size for array in request.shared.values()))
    assert site.sum(step(request, "mask", asked)).body == masked  # the same request, the same bytes
    fewer = dataclasses.replace(asked, offers={name: asked.offers[name] for name in NAMES[:3]})
    with pytest.raises(TrainerError, match="mask keys"):
        site.sum(step(request, "mask", fewer))
    opening = dataclasses.replace(asked, survivors=NAMES, envelopes=sealed)
    opened = from_bytes(Opened, site.sum(step(request, "open", opening)).body)
    assert set(opened.self_masks) == set(NAMES)
    assert opened.mask_keys == {}
    site_setup.running[-1].end()
    site_setup.start()
    assert from_bytes(Opened, site.sum(step(request, "open", opening)).body) == opened
    without = dataclasses.replace(opening, survivors=NAMES[:3])  # as if dee had been lost: the other secret of dee
    with pytest.raises(TrainerError, match="RefusedError: sum"):
        site.sum(step(request, "open", without))
    again, sealed = attempt(site_setup, others, request, "second")
    assert site.sum(step(request, "mask", again)).body != masked
    with pytest.raises(TrainerError, match="RefusedError: sum"):  # another attempt at the same round
        site.sum(step(request, "open", dataclasses.replace(again, survivors=NAMES[:3], envelopes=sealed)))
    assert refused(site_setup, "asked to open a second sum of round 1")
    lines = [line for line in site_setup.audit() if line["kind"] == "sum"]
    assert [line["phase"] for line in lines][:4] == ["share", "mask", "mask", "open"]
    assert lines[1]["bytes"] == len(masked)


def test_a_site_refuses_what_would_show_its_update(site_setup: SiteSetup) -> None:
    others = Others(site_setup)
    site_setup.configure("[allow]", "require_secure_aggregation = true", "min_sites = 4").start()
    site, plan = site_setup.client(), secure_plan(site_setup, min_sites=4)
    bare = dataclasses.replace(plan, privacy=PrivacySettings())
    for other, key in ((bare, "privacy.secure_aggregation"), (secure_plan(site_setup), "privacy.min_sites")):
        with pytest.raises(TrainerError, match=key):
            site.site_info(other.name, to_json(other))
    with pytest.raises(TrainerError, match="RefusedError: request"):
        site.handle(site_setup.request(plan, 0, kind="trial", admitted_round=0))
    request = site_setup.request(plan)
    with pytest.raises(TrainerError, match="RefusedError: request"):  # nothing was trained yet
        site.sum(step(request, "share", body()))
    site.handle(request)
    with pytest.raises(TrainerError, match="number of sites"):
        site.sum(step(request, "share", SumBody("t", NAMES[:3], "tokens", 64)))
    right = step(request, "share", body())
    for max_weight in (b"0", b"-1", b"%d" % 2**53):
        wrong = right.body.replace(b'"max_weight": 64', b'"max_weight": ' + max_weight)
        with pytest.raises(TrainerError, match="RefusedError: secure aggregation"):
            site.sum(dataclasses.replace(right, body=wrong))
    with pytest.raises(TrainerError, match="RefusedError: sites"):
        site.sum(step(request, "share", SumBody("t", (*NAMES, "made-up"), "tokens", 64)))
    asked, sealed = attempt(site_setup, others, request, "first")
    with pytest.raises(TrainerError, match="RefusedError: attempt"):  # no vector was sent
        site.sum(step(request, "open", dataclasses.replace(asked, survivors=NAMES, envelopes=sealed)))
    with pytest.raises(TrainerError, match="RefusedError: secure aggregation"):
        site.sum(dataclasses.replace(step(request, "share", body()), body=b"\xff[" * 10))


def test_a_site_takes_part_with_one_list_of_sites_in_a_round_also_after_a_restart(site_setup: SiteSetup) -> None:
    others = Others(site_setup)
    site_setup.configure("[allow]", "require_secure_aggregation = true").start()
    site, plan = site_setup.client(), secure_plan(site_setup)
    request = site_setup.request(plan)
    site.handle(request)
    attempt(site_setup, others, request, "first")
    other = SumBody("second", NAMES[:3], "tokens", 64)
    with pytest.raises(TrainerError, match="RefusedError: list of sites of round 1"):
        site.sum(step(request, "share", other))
    site_setup.running[-1].end()
    site_setup.start()
    with pytest.raises(TrainerError, match="RefusedError: list of sites of round 1"):
        site.sum(step(request, "share", other))
    assert refused(site_setup, "names other sites for the sum of round 1 than before")
    again, _ = attempt(site_setup, others, request, "second")  # the same list, in another attempt
    assert site.sum(step(request, "mask", again)).body
    second = site_setup.request(plan, 2, seed=1)
    site.handle(second)
    assert site.sum(step(second, "share", other)).body  # another round, another list


def test_a_federation_that_had_secure_aggregation_cannot_go_on_without(site_setup: SiteSetup) -> None:
    """Also before the first sum. A federation with another name can be without."""
    Others(site_setup)
    site_setup.configure().start()
    site, plan = site_setup.client(), secure_plan(site_setup)
    site.handle(site_setup.request(plan))
    bare = dataclasses.replace(plan, privacy=PrivacySettings())
    for ask in (lambda: site.site_info(bare.name, to_json(bare)), lambda: site.handle(site_setup.request(bare))):
        with pytest.raises(TrainerError, match=r"RefusedError: privacy\.secure_aggregation"):
            ask()
    assert refused(site_setup, "Federation town had secure aggregation before, and the coordinator now asks without.")
    site.handle(site_setup.request(dataclasses.replace(bare, name="village")))


def test_no_metric_that_is_computed_from_the_update_is_sent(site_setup: SiteSetup) -> None:
    Others(site_setup)
    site_setup.configure().start()
    plan = dataclasses.replace(secure_plan(site_setup), train=site_setup.plan(max_update_norm=1e-4).train)
    bare = dataclasses.replace(plan, name="village", privacy=PrivacySettings())
    plain, secure = (site_setup.client().handle(site_setup.request(each)).metrics for each in (bare, plan))
    assert plain["update.scale"] < 1
    assert set(secure) == set(plain) - {"update.scale"}
    assert [line["withheld"] for line in site_setup.audit() if line["kind"] == "reply"] == [["update.scale"]]


def test_a_site_without_a_roster_says_so_in_one_sentence(site_setup: SiteSetup) -> None:
    site_setup.configure().start()
    plan = secure_plan(site_setup)
    with pytest.raises(TrainerError, match=r"ConfigError: trainer\.aggregation_key"):
        site_setup.client().site_info(plan.name, to_json(plan))
    assert refused(site_setup, "colora provision writes it into the folder of each site.")


def test_a_damaged_record_of_sums_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    record = SumRecord(tmp_path / RECORD, "ada")
    record.join(1, NAMES, "adapter", 0)
    record.mask(1, "attempt", "salt")
    record.open(1, "attempt", "salt", "sum")
    record.open(1, "attempt", "salt", "sum")
    with pytest.raises(RefusedError, match="a second sum of round 1"):
        record.open(1, "attempt", "salt", "other")
    with pytest.raises(RefusedError, match="a second masked vector in one attempt"):
        record.mask(1, "attempt", "other")
    whole = record.file.path.read_bytes()
    found = json.loads(whole)
    found["rounds"]["1"]["opened"] = None
    for data in (b"", b"{}", whole[:-9], b"[]", json.dumps(found).encode()):
        record.file.path.write_bytes(data)
        with pytest.raises(DamagedError, match="it is unknown which sums this site has opened"):
            record.open(1, "attempt", "salt", "other")
    record.file.path.write_bytes(whole)
    record.open(1, "attempt", "salt", "sum")


def test_an_update_whose_start_is_lost_is_not_sent(site_setup: SiteSetup) -> None:
    Others(site_setup)
    site_setup.configure().start()
    plan = secure_plan(site_setup)
    request = site_setup.request(plan)
    site_setup.client().handle(request)
    (site_setup.state / plan.name / REFERENCE).unlink()
    with pytest.raises(TrainerError, match="RefusedError: reference"):
        site_setup.client().sum(step(request, "share", body()))
    site_setup.client().handle(request)  # the coordinator sends it again with the next attempt
    assert site_setup.client().sum(step(request, "share", body())).body
