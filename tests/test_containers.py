"""The properties of docker-compose.yml, and its commands and health checks run without a Docker engine."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer.main
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from colora.cli import app
from colora.common.processes.supervised import write_services
from colora.server.deployment.gateway.proxy import Upstream
from colora.server.deployment.gateway.server import GatewayServer, ListenAddress
from colora.server.deployment.provisioning.provision import provision

ROOT = Path(__file__).resolve().parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "containers" / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
every_service = pytest.mark.parametrize("name", SERVICES)


def mounts(name: str) -> dict[str, str]:
    """Return the volumes of a service: mount point → ``source:mode``."""
    parts = [volume.replace(":-", "=").split(":") for volume in SERVICES[name]["volumes"]]
    return {where: ":".join((what, *mode)) for what, where, *mode in parts}


def secrets(name: str) -> set[str]:
    return {secret["source"] for secret in SERVICES[name].get("secrets", [])}


# --- isolation --------------------------------------------------------------------------------------------


@every_service
def test_every_service_runs_as_an_ordinary_user_with_nothing_to_spare(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"\$\{COLORA_UID:-[1-9]\d*}:\$\{COLORA_UID:-[1-9]\d*}", service["user"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"}


@every_service
def test_every_service_has_a_health_check_and_comes_back(name: str) -> None:
    service = SERVICES[name]
    assert service["healthcheck"]["test"][:3] == ["CMD", "python", "/opt/health.py"]
    assert service["restart"] == "unless-stopped"
    assert service["stop_grace_period"]


@every_service
def test_what_comes_from_the_machine_is_read_only(name: str) -> None:
    """Only named volumes are writable."""
    for where, what in mounts(name).items():
        assert what.split(":")[0] in COMPOSE["volumes"] or what.endswith(":ro"), where


def test_only_the_gate_is_published() -> None:
    assert {name: service.get("ports") for name, service in SERVICES.items() if "ports" in service} == {
        "coordinator": ["${COLORA_PORT:-9443}:9443"]
    }


def test_the_trainer_reaches_nobody_and_reads_its_data_only() -> None:
    assert SERVICES["trainer"]["networks"] == ["link"]
    assert COMPOSE["networks"]["link"] == {"internal": True}
    assert mounts("trainer")["/site/data"].endswith(":ro")
    assert [name for name, service in SERVICES.items() if "link" in service.get("networks", [])] == [
        "supernode",
        "trainer",
    ]


def test_the_node_sees_neither_data_nor_state() -> None:
    assert set(mounts("supernode")) == {"/site/site.toml", "/site/state"}
    assert mounts("supernode")["/site/state"] == "supernode"  # its own volume
    assert mounts("trainer")["/site/state"] == "state"


def test_each_side_of_a_site_has_its_own_keys_only() -> None:
    assert secrets("supernode") == {"ca", "site_key", "link_ca", "node_crt", "node_key"}
    assert secrets("trainer") == {"link_ca", "trainer_crt", "trainer_key", "aggregation_key", "roster"}
    assert secrets("supernode") | secrets("trainer") == set(COMPOSE["secrets"])


@every_service
def test_the_image_itself_has_an_ordinary_user(name: str) -> None:
    """Also when it runs without Compose."""
    stages = re.split(r"(?m)^FROM ", DOCKERFILE)[1:]
    by_name = {stage.splitlines()[0].split(" AS ")[1]: stage for stage in stages}
    stage = by_name[SERVICES[name]["build"]["target"]]
    lines = stage if "USER" in stage else by_name[stage.split()[0]]
    assert re.findall(r"(?m)^USER (.*)", lines) == ["colora"]


# --- versions ----------------------------------------------------------------------------------------------


def ranges(lines: list[str]) -> dict[str, str]:
    return {re.split(r"[\[<>=]", line)[0]: re.sub(r"^[\w-]+(\[.*?])?", "", line) for line in lines}


def test_images_take_the_projects_ranges() -> None:
    project = ranges(PROJECT["dependencies"])
    light = [
        line for line in (ROOT / "containers" / "supernode.txt").read_text().splitlines() if not line.startswith("#")
    ]
    assert {name: project.get(name) for name in ranges(light)} == ranges(light)
    assert f'"torch{project["torch"]}"' in DOCKERFILE
    assert re.search(r"(?m)^ARG PYTHON=3\.\d+\.\d+-slim-\w+$", DOCKERFILE)


@pytest.mark.slow
def test_the_nodes_image_needs_no_more_than_it_has() -> None:
    heavy = "torch transformers peft datasets sklearn gguf rouge_score threadpoolctl ray accelerate"
    code = f"""
import sys
sys.modules.update(dict.fromkeys("{heavy}".split()))  # importing one of them fails
import colora.cli, colora.client.client_app, colora.client.deployment.supervisor
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- commands and health checks -----------------------------------------------------------------------------------


@every_service
def test_the_command_is_one_that_colora_knows(name: str) -> None:
    command, *arguments = SERVICES[name]["command"]
    group: Any = typer.main.get_command(app)
    group.commands[command].make_context(command, list(arguments))
    assert SERVICES[name].get("entrypoint") is None
    assert 'ENTRYPOINT ["colora"]' in DOCKERFILE


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
@pytest.mark.parametrize("override", [[], ["-f", "containers/gpu.yml"]], ids=["cpu", "gpu"])
def test_compose_accepts_all_profiles(override: list[str]) -> None:
    command = ["docker-compose", "-f", "docker-compose.yml", *override]
    command += ["--profile", "coordinator", "--profile", "site", "config"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COLORA_")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(done.stdout)["services"]) == {"coordinator", "supernode", "trainer"}
    assert "not set" not in done.stderr


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "sites.toml").write_text('[coordinator]\naddress = "localhost:9443"\n[[site]]\nname = "north"\n')
    provision(folder / "sites.toml", folder / "out")
    return folder / "out"


def check(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "containers" / "health.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def grpc_server() -> Iterator[grpc.Server]:
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        yield server
        server.stop(None).wait()


def test_the_coordinators_check_finds_the_gate(keys: Path, free: int) -> None:
    own = keys / "coordinator"
    door = ListenAddress("127.0.0.1", 0, own / "server.crt", own / "server.key")
    with GatewayServer(door, Upstream(f"https://127.0.0.1:{free}", own / "ca.crt")) as gate:
        assert check("gateway", gate.address, own / "ca.crt").returncode == 0
        assert check("gateway", gate.address, keys / "sites/north/link/ca.crt").returncode != 0
    assert check("gateway", f"127.0.0.1:{free}", own / "ca.crt").returncode != 0


@pytest.mark.slow
def test_the_nodes_check_asks_grpc_health(tmp_path: Path, grpc_server: grpc.Server) -> None:
    states = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(states, grpc_server)
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    assert check("supernode", tmp_path).returncode != 0  # nothing has started yet
    write_services(tmp_path / "services.json", {"supernode_health": f"127.0.0.1:{port}"})
    states.set("", health_pb2.HealthCheckResponse.SERVING)
    assert check("supernode", tmp_path).returncode == 0
    states.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    assert check("supernode", tmp_path).returncode != 0


def test_the_trainers_check_knows_its_certificate(keys: Path, free: int, grpc_server: grpc.Server) -> None:
    link = keys / "sites/north/link"
    ca, certificate, key = ((link / name).read_bytes() for name in ("ca.crt", "trainer.crt", "trainer.key"))
    credentials = grpc.ssl_server_credentials([(key, certificate)], root_certificates=ca, require_client_auth=True)
    port = grpc_server.add_secure_port("127.0.0.1:0", credentials)
    grpc_server.start()
    assert check("trainer", f"127.0.0.1:{port}", link / "ca.crt").returncode == 0
    assert check("trainer", f"127.0.0.1:{port}", keys / "ca.crt").returncode != 0
    assert check("trainer", f"127.0.0.1:{free}", link / "ca.crt").returncode != 0
