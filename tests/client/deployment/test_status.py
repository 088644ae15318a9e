"""The status of a site, from a state folder and fake health services."""

from __future__ import annotations

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
from colora.common.atomic_io import save_arrays
from colora.common.processes.supervised import free_port, write_services
from colora.common.protocol.types import SiteInfo
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
