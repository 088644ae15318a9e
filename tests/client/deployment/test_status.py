"""The status of a site, from a state folder and fake health services."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from rich.console import Console

from colora.client.deployment.status import show_site, site_file, site_status
from colora.client.trainer_service.audit_log import AuditLog
from colora.client.training.privacy_budget import LEDGER, PrivacyLedger
from colora.common.atomic_io import save_arrays
from colora.common.config.schema import ModelSettings, Plan, PrivacySettings, to_json
from colora.common.processes.supervised import free_port, write_services
from colora.common.protocol.types import SiteInfo
from colora.common.training.accountant import Spending
from colora.server.deployment.provisioning.provision import provision

PLAN = '[coordinator]\naddress = "127.0.0.1:9443"\n[[site]]\nname = "north"\n'


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site file with the state folder of one federation."""
    file = tmp_path / "north" / "site.toml"
    file.parent.mkdir()
    file.write_text('name = "north"\n[data]\nsource = "rows.csv"\n[coordinator]\naddress = "far:9443"\n')
    folder = file.parent / "state" / "town"
    for t, metrics in ((9, {"base.accuracy": 0.5, "personal.accuracy": 0.6}), (10, {"personal.accuracy": 0.75})):
        card = {"task": "classification", "metrics": metrics}
        save_arrays(folder / f"round-{t:06d}.safetensors", {}, {"card": card})
    AuditLog(folder, "town").site_info(SiteInfo("north", 2, "", "", "", "", "classification", 1, 1, 0, 0))
    (file.parent / "state" / "logs").mkdir()
    return file


@pytest.fixture
def trainer() -> Iterator[grpc.Server]:
    """A server whose health service says SERVING, without a port."""
    server, states = grpc.server(ThreadPoolExecutor(1)), health.HealthServicer()
    states.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(states, server)
    yield server
    server.stop(None).wait()


def write_record(site: Path, **services: object) -> None:
    pids = {"client": os.getpid(), "trainer": os.getpid()}
    write_services(site.parent / "state" / "services.json", {"pids": pids, **services})


def test_a_site_whose_processes_serve_is_healthy(site: Path, trainer: grpc.Server, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/a socket"
    trainer.add_insecure_port(f"unix:{tmp_path}/a%20socket")
    node = trainer.add_insecure_port("127.0.0.1:0")
    trainer.start()
    write_record(site, trainer=address, supernode_health=f"127.0.0.1:{node}")
    status = site_status(site)
    assert status.problems == ()
    assert {each.name: each.state for each in status.services} == {"trainer": "serving", "supernode": "serving"}
    assert (status.site, status.coordinator) == ("north", "far:9443")
    (town,) = status.federations
    assert (town.federation, town.round) == ("town", 10)
    assert town.age is not None
    assert 0 <= town.age < 60
    assert town.audit is not None
    assert town.audit["kind"] == "description"
    assert (town.metric("base"), town.metric("shared"), town.metric("personal")) == (0.5, None, 0.75)


@pytest.mark.parametrize("line", ["5", "[1]", '"x"', "null", '{"torn', "[" * 100_000])
def test_a_damaged_last_line_of_an_audit_log_hides_nothing(site: Path, line: str) -> None:
    write_record(site)
    for folder in (site.parent / "state" / "town", site.parent / "state"):
        log = AuditLog(folder, "town")
        log.error("DataError: data.label")
        with log.path.open("a") as file:
            file.write(f"{line}\n")
    status = site_status(site)
    assert "the site's last answer was an error (DataError: data.label)" in status.problems[0]
    show_site(status, Console(quiet=True))


def test_a_site_whose_last_answer_was_an_error_needs_a_person(site: Path) -> None:
    write_record(site)
    assert site_status(site).healthy
    log = AuditLog(site.parent / "state" / "town", "town")
    log.error("DataError: data.label")
    (problem,) = site_status(site).problems
    assert problem.startswith("town: the site's last answer was an error (DataError: data.label); ")
    assert problem.endswith("state/logs/trainer.log has it in full")
    log.error("DataError: data.label")
    log.site_info(SiteInfo("north", 2, "", "", "", "", "classification", 1, 1, 0, 0))
    assert site_status(site).healthy, "it has joined since"


def test_a_site_that_refused_the_coordinators_plan_needs_a_person(site: Path) -> None:
    write_record(site)
    reason = "site north: train.steps: expected at least 24 examples (allow.min_examples), found 2 × batch size 8"
    AuditLog(site.parent / "state", "town").refusal("RefusedError: train.steps", reason)
    assert site_status(site).problems == (f"town: the site refused the coordinator's plan: {reason}",)
    AuditLog(site.parent / "state" / "town", "town").site_info(
        SiteInfo("north", 2, "", "", "", "", "classification", 1, 1, 0, 0)
    )
    assert site_status(site).healthy, "it has joined since"


def test_a_trainer_behind_tls_is_asked_with_the_sites_certificates(tmp_path: Path, trainer: grpc.Server) -> None:
    (tmp_path / "sites.toml").write_text(PLAN)
    provision(tmp_path / "sites.toml", tmp_path / "keys")
    folder = tmp_path / "keys" / "sites" / "north"
    link = folder / "link"
    ca, certificate, key = ((link / name).read_bytes() for name in ("ca.crt", "trainer.crt", "trainer.key"))
    port = trainer.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)], ca, True))
    trainer.start()
    address = f"0.0.0.0:{port}"
    (folder / "site.toml").write_text(
        f'name = "north"\n[data]\nsource = "rows.csv"\n[trainer]\nlisten = "{address}"\nlink = "link"\n'
    )
    write_record(folder / "site.toml", trainer=address)
    assert [each.state for each in site_status(folder / "site.toml").services] == ["serving"]
    (link / "node.key").unlink()
    assert [each.state for each in site_status(folder / "site.toml").services] == ["down"]


def test_what_is_down_is_named(site: Path) -> None:
    node = f"127.0.0.1:{free_port()}"
    write_record(
        site, trainer="unix:/nowhere/trainer.sock", supernode_health=node, pids={"trainer": None, "client": os.getpid()}
    )
    assert site_status(site).problems == (
        "trainer at unix:/nowhere/trainer.sock is down",
        f"supernode at {node} is down",
        "trainer (process None) has ended",
    )


def test_a_site_that_was_never_started_says_so(site: Path) -> None:
    assert site_status(site).problems == ("not running: colora client has not been started for this site",)


def test_a_site_is_known_by_its_file_its_folder_and_its_state_folder(site: Path, tmp_path: Path) -> None:
    for path in (site, site.parent, site.parent / "state"):
        assert site_file(path) == site
    assert site_file(tmp_path) is None
    assert site_file(site.parent / "state" / "town") is None


def test_the_page_and_the_command_tell_the_same(site: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=160, file=(tmp_path / "page").open("w"))
    show_site(site_status(site), console)
    page = console.export_text()
    for words in ("site north, coordinator far:9443", "town", "10", "0.500", "0.750", "description, ", "! not running"):
        assert words in page
    call = [sys.executable, "-m", "colora", "status", str(site.parent / "state"), "--json"]
    done = subprocess.run(call, capture_output=True, text=True)
    page_json = json.loads(done.stdout)
    assert (done.returncode, page_json["kind"], page_json["version"], page_json["healthy"]) == (1, "site", 1, False)
    assert page_json["federations"][0]["audit"]["kind"] == "description"
    assert page_json["federations"][0]["metrics"] == {"base.accuracy": 0.5, "personal.accuracy": 0.75}


def private_site(site: Path) -> PrivacyLedger:
    """Give the newest state of the federation a private plan, and the site a limit; return its ledger."""
    plan = Plan("town", 20, ModelSettings("m"), privacy=PrivacySettings(epsilon=8.0, delta=1e-6))
    card = {"task": "classification", "metrics": {}, "plan": to_json(plan)}
    save_arrays(site.parent / "state/town/round-000010.safetensors", {}, {"card": card})
    site.write_text(site.read_text() + "[allow]\nmax_epsilon = 9.0\n")
    write_record(site)
    return PrivacyLedger(site.parent / "state" / LEDGER)


def epsilon_by_steps(*spendings: Spending) -> float:
    """ε of the accountant of Opacus, which is told of one step after the other."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    for each in spendings:
        for _ in range(each.steps):
            accountant.step(noise_multiplier=each.noise_multiplier, sample_rate=each.sample_rate)
    return accountant.get_epsilon(delta=1e-6)


@pytest.mark.filterwarnings("ignore:Optimal order")
def test_the_spent_budget_of_a_site_is_that_of_its_ledger(site: Path) -> None:
    ledger = private_site(site)
    (town,) = site_status(site).federations
    assert town.privacy is not None
    assert (town.privacy.epsilon, town.privacy.budget) == (0.0, 8.0)
    here, elsewhere = Spending(1.1, 0.2, 6), Spending(2.0, 0.5, 3)
    ledger.spend("town", "a", here)
    ledger.spend("village", "b", elsewhere)
    status = site_status(site)
    spent, total = epsilon_by_steps(here), epsilon_by_steps(here, elsewhere)
    (told,) = [each["privacy"] for each in json.loads(json.dumps(status.as_dict()))["federations"]]
    assert told == {
        "epsilon": pytest.approx(spent),
        "delta": 1e-6,
        "budget": 8.0,
        "in_all": pytest.approx(total),
        "max_epsilon": 9.0,
    }
    console = Console(record=True, width=200, file=io.StringIO())
    show_site(status, console)
    line = f"town: privacy budget spent: ε = {spent:.3g} of 8 at δ = 1e-06; all federations {total:.3g} of 9"
    assert line in console.export_text()


def test_a_damaged_ledger_needs_a_person_and_hides_nothing_else(site: Path) -> None:
    ledger = private_site(site)
    ledger.spend("town", "a", Spending(1.1, 0.2, 6))
    ledger.file.path.write_bytes(ledger.file.path.read_bytes().replace(b"1.1", b"9.9"))
    status = site_status(site)
    (problem,) = status.problems
    assert problem.startswith("town: the privacy budget is unknown: ")
    assert "privacy.json is damaged" in problem
    assert (status.federations[0].round, status.federations[0].privacy) == (10, None)
