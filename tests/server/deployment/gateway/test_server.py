"""The gate as a service: port, TLS, silence, a clean end; and before a real SuperLink (slow)."""

from __future__ import annotations

import datetime
import ipaddress
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.control_pb2 import ListRunsRequest

from colora.common.errors import StateError
from colora.common.processes.supervised import free_port, program
from colora.server.deployment.gateway.proxy import Upstream
from colora.server.deployment.gateway.server import GatewayServer, ListenAddress
from colora.server.deployment.superlink import Certificates, SuperLink

NOWHERE = Upstream("http://127.0.0.1:9", hold=0.3)
HERE = ListenAddress("127.0.0.1", 0)
GARBAGE = (b"\x16\x03\x01garbage\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/fleet/get-run HTTP/1.1\r\n")


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, which is its own CA, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - datetime.timedelta(hours=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    paths = folder / "server.crt", folder / "server.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(*form))
    return paths


def health(gate: GatewayServer, **how: object) -> httpx.Response:
    scheme = "https" if gate.door.certificate else "http"
    return httpx.get(f"{scheme}://{gate.address}/health", trust_env=False, **how)  # type: ignore[arg-type]


def test_a_taken_port_is_said_so() -> None:
    with (
        GatewayServer(HERE, NOWHERE) as gate,
        pytest.raises(StateError, match=f"127.0.0.1:{gate.port}: expected a free port"),
    ):
        GatewayServer(ListenAddress("127.0.0.1", gate.port), NOWHERE).__enter__()


def test_an_address_of_another_machine_is_said_so() -> None:
    with pytest.raises(StateError, match="expected a free port of this machine"):
        GatewayServer(ListenAddress("192.0.2.1", 0), NOWHERE).__enter__()


def test_certificates_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    (tmp_path / "other").mkdir()
    foreign = write_certificate(tmp_path / "other")[1]
    with pytest.raises(StateError, match=r"server\.crt: expected a certificate that fits .*other"):
        GatewayServer(ListenAddress("127.0.0.1", 0, certificate, foreign), NOWHERE)
    with pytest.raises(StateError, match="none"):
        GatewayServer(ListenAddress("127.0.0.1", 0, tmp_path / "none", key), NOWHERE)
    with pytest.raises(StateError, match=r"server\.key: expected a CA certificate"):
        GatewayServer(HERE, Upstream("https://127.0.0.1:9", ca=key))


def test_it_ends_cleanly_and_the_port_is_free_again() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with GatewayServer(HERE, NOWHERE) as gate:
        assert health(gate).text == "ok"
        assert gate.alive
        assert {number: signal.getsignal(number) for number in before} == before
    assert not gate.alive
    with GatewayServer(ListenAddress("127.0.0.1", gate.port), NOWHERE) as again:
        assert health(again).text == "ok"
    assert "colora-gate" not in {thread.name for thread in threading.enumerate()}


def test_its_end_answers_what_is_held() -> None:
    answers: list[int] = []
    with GatewayServer(HERE, Upstream("http://127.0.0.1:9")) as gate:
        url = f"http://{gate.address}/v1/fleet/get-run"
        caller = threading.Thread(
            target=lambda: answers.append(httpx.post(url, trust_env=False, timeout=30).status_code)
        )
        caller.start()
        while not gate.server.server_state.tasks:
            caller.join(0.01)
        began = time.monotonic()
    caller.join(5)
    assert answers == [503]
    assert time.monotonic() - began < 3


def test_it_speaks_tls_and_nothing_else(tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    with GatewayServer(ListenAddress("127.0.0.1", 0, certificate, key), NOWHERE) as gate:
        trusting = ssl.create_default_context(cafile=certificate)
        assert health(gate, verify=trusting).text == "ok"
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://{gate.address}/health", trust_env=False)
        with pytest.raises(httpx.ConnectError, match="certificate"):
            health(gate)
        old = ssl.create_default_context(cafile=certificate)
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(httpx.ConnectError):
            health(gate, verify=old)


def test_nothing_that_callers_send_reaches_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    certificate, key = write_certificate(tmp_path)
    for door in (HERE, ListenAddress("127.0.0.1", 0, certificate, key)):
        with GatewayServer(door, NOWHERE) as gate:
            for garbage in (
                b"\x16\x03\x01garbage\r\n\r\n",
                b"GET / HTTP/9.9\r\n\r\n",
                b"POST /v1/fleet/get-run HTTP/1.1\r\n",
            ):
                with socket.create_connection(("127.0.0.1", gate.port), 5) as connection:
                    connection.sendall(garbage)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(4096):
                        pass
            trust = {"verify": ssl.create_default_context(cafile=certificate)} if door.certificate else {}
            assert health(gate, **trust).text == "ok"
    assert capfd.readouterr() == ("", "")


# --- a real SuperLink behind it, a real SuperNode before it, and somebody outside who tries what he can -------------

OUTSIDE = [
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/control/list-runs",
    "/v1/control/list-nodes",
    "/v1/runtime/acquire-task",
    "/v1/runtime/get-nodes",
    "/v1/fleet/register-node",
    "/docs",
    "/openapi.json",
    "/health/",
]


@dataclass
class World:
    link: SuperLink
    gate: GatewayServer
    node: subprocess.Popen[bytes]
    log: Path
    trust: ssl.SSLContext

    @property
    def asking(self) -> int:
        """How many SuperNodes have an empty pull lingering at the gate."""
        return len(self.gate.server.passage.waiting)


def eventually(true: Callable[[], object], seconds: float = 60.0) -> bool:
    """Whether it comes true: these are other processes, which tell nobody."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            if true():
                return True
        except (OSError, httpx.HTTPError):
            pass
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    certificate, key = write_certificate(folder)
    site = ec.generate_private_key(ec.SECP384R1())
    openssh, plain = serialization.Encoding.OpenSSH, serialization.NoEncryption()
    site_key, log = folder / "site.key", folder / "supernode.log"
    site_key.write_bytes(site.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, plain))
    public = site.public_key().public_bytes(openssh, serialization.PublicFormat.OpenSSH)
    link = SuperLink(folder / "flower", folder, folder / "superlink.log", Certificates(certificate, certificate, key))
    trust = ssl.create_default_context(cafile=certificate)
    with GatewayServer(ListenAddress("127.0.0.1", 0, certificate, key), Upstream(link.url, certificate)) as gate:
        link.start()
        assert eventually(lambda: link.online() == []), (folder / "superlink.log").read_text()
        link.register({"north": public})
        arguments = ["--superlink", gate.address, "--port", str(free_port()), "--root-certificates", str(certificate)]
        arguments += ["--auth-supernode-private-key", str(site_key)]
        with log.open("wb") as output:
            node = subprocess.Popen(
                [program("flower-supernode"), *arguments],
                stdout=output,
                stderr=output,
                env={**os.environ, "FLWR_HOME": str(folder / "node")},
                start_new_session=True,
            )
        try:
            yield World(link, gate, node, log, trust)
        finally:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()
            link.child.kill()


@pytest.mark.slow
def test_a_supernode_comes_online_through_the_gate_and_its_pulls_linger(world: World) -> None:
    assert eventually(lambda: world.link.online() == ["north"]), world.log.read_text()
    assert eventually(lambda: world.asking == 1)


@pytest.mark.slow
@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_else_is_there_from_outside(world: World, path: str) -> None:
    headers = {"content-type": "application/protobuf"}
    with httpx.Client(verify=world.trust, trust_env=False) as client:
        inside = client.request(
            "GET" if "." in path or path == "/docs" else "POST", world.link.url + path, headers=headers
        )
        assert inside.status_code not in (404, 502) or path == "/health/", "the SuperLink itself does answer"
        for method in ("POST", "GET"):
            assert client.request(method, f"https://{world.gate.address}{path}", headers=headers).status_code == 404


@pytest.mark.slow
def test_a_caller_without_a_key_is_refused_by_the_superlink(world: World) -> None:
    with httpx.Client(verify=world.trust, trust_env=False) as client:
        headers = {"content-type": "application/protobuf"}
        answer = client.post(f"https://{world.gate.address}/v1/fleet/pull-messages", headers=headers)
    assert answer.status_code == 401


@pytest.mark.slow
def test_a_supernode_survives_the_superlinks_death(world: World) -> None:
    """Held by the gate, it hardly notices: one retry at most, when its pull had lingered for long before."""
    assert eventually(lambda: world.asking == 1)
    said = len(world.log.read_bytes())
    for _ in range(2):
        os.kill(world.link.child.pid or 0, signal.SIGKILL)
        world.link.child.start()
        began = time.monotonic()
        assert eventually(lambda: world.link.online() == ["north"])
        assert eventually(lambda: world.asking == 1)
        assert time.monotonic() - began < 20
        assert world.node.poll() is None
    assert world.log.read_bytes()[said:].count(b"retrying") <= 2, world.log.read_text()


@pytest.mark.slow
def test_a_new_run_ends_the_one_before(world: World) -> None:
    """Or a SuperNode waits a minute for the rest of what a dead ServerApp was sending it."""
    assert eventually(lambda: world.link.online() == ["north"])
    world.link.prepare()
    first, second = world.link.submit(), world.link.submit()
    with world.link._control() as control:
        runs = control.ListRuns(ListRunsRequest()).run_dict
    assert (runs[first].status.status, runs[first].status.sub_status) == ("finished", "stopped")
    assert runs[second].status.sub_status != "stopped"
