"""The gateway as a service: port, TLS, no output, clean shutdown; and in front of a real SuperLink (slow)."""

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


def health(gateway: GatewayServer, **how: object) -> httpx.Response:
    scheme = "https" if gateway.listen.certificate else "http"
    return httpx.get(f"{scheme}://{gateway.address}/health", trust_env=False, **how)  # type: ignore[arg-type]


def test_a_port_in_use_is_reported() -> None:
    with (
        GatewayServer(HERE, NOWHERE) as gateway,
        pytest.raises(StateError, match=f"Cannot listen on 127.0.0.1:{gateway.port}: Address already in use"),
    ):
        GatewayServer(ListenAddress("127.0.0.1", gateway.port), NOWHERE).__enter__()


def test_an_address_of_another_machine_is_reported() -> None:
    with pytest.raises(StateError, match=r"Cannot listen on 192\.0\.2\.1:0: Cannot assign requested address"):
        GatewayServer(ListenAddress("192.0.2.1", 0), NOWHERE).__enter__()


def test_certificates_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    (tmp_path / "other").mkdir()
    foreign = write_certificate(tmp_path / "other")[1]
    with pytest.raises(StateError, match=r"certificate .*server\.crt cannot be used with the key .*other"):
        GatewayServer(ListenAddress("127.0.0.1", 0, certificate, foreign), NOWHERE)
    with pytest.raises(StateError, match="none"):
        GatewayServer(ListenAddress("127.0.0.1", 0, tmp_path / "none", key), NOWHERE)
    with pytest.raises(StateError, match=r"CA certificate .*server\.key cannot be read"):
        GatewayServer(HERE, Upstream("https://127.0.0.1:9", ca=key))


def test_it_ends_cleanly_and_the_port_is_free_again() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with GatewayServer(HERE, NOWHERE) as gateway:
        assert health(gateway).text == "ok"
        assert gateway.alive
        assert {number: signal.getsignal(number) for number in before} == before
    assert not gateway.alive
    with GatewayServer(ListenAddress("127.0.0.1", gateway.port), NOWHERE) as again:
        assert health(again).text == "ok"
    assert "colora-gateway" not in {thread.name for thread in threading.enumerate()}


def test_its_end_answers_what_is_held() -> None:
    answers: list[int] = []
    with GatewayServer(HERE, Upstream("http://127.0.0.1:9")) as gateway:
        url = f"http://{gateway.address}/v1/fleet/get-run"
        caller = threading.Thread(
            target=lambda: answers.append(httpx.post(url, trust_env=False, timeout=30).status_code)
        )
        caller.start()
        while not gateway.server.server_state.tasks:
            caller.join(0.01)
        began = time.monotonic()
    caller.join(5)
    assert answers == [503]
    assert time.monotonic() - began < 3


def test_it_speaks_tls_and_nothing_else(tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    with GatewayServer(ListenAddress("127.0.0.1", 0, certificate, key), NOWHERE) as gateway:
        trusting = ssl.create_default_context(cafile=certificate)
        assert health(gateway, verify=trusting).text == "ok"
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://{gateway.address}/health", trust_env=False)
        with pytest.raises(httpx.ConnectError, match="certificate"):
            health(gateway)
        old = ssl.create_default_context(cafile=certificate)
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(httpx.ConnectError):
            health(gateway, verify=old)


def test_nothing_that_callers_send_reaches_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    certificate, key = write_certificate(tmp_path)
    for listen in (HERE, ListenAddress("127.0.0.1", 0, certificate, key)):
        with GatewayServer(listen, NOWHERE) as gateway:
            for garbage in (
                b"\x16\x03\x01garbage\r\n\r\n",
                b"GET / HTTP/9.9\r\n\r\n",
                b"POST /v1/fleet/get-run HTTP/1.1\r\n",
            ):
                with socket.create_connection(("127.0.0.1", gateway.port), 5) as connection:
                    connection.sendall(garbage)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(4096):
                        pass
            trust = {"verify": ssl.create_default_context(cafile=certificate)} if listen.certificate else {}
            assert health(gateway, **trust).text == "ok"
    assert capfd.readouterr() == ("", "")


# --- between a real SuperLink and a real SuperNode, with requests from outside ---------------------------------------

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
class Deployment:
    link: SuperLink
    gateway: GatewayServer
    node: subprocess.Popen[bytes]
    log: Path
    trust: ssl.SSLContext

    @property
    def asking(self) -> int:
        """Number of SuperNodes with an empty pull that the gateway repeats."""
        return len(self.gateway.server.proxy.waiting)


def eventually(true: Callable[[], object], seconds: float = 60.0) -> bool:
    """Wait until a condition on other processes holds; whether it did."""
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
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("deployment")
    certificate, key = write_certificate(folder)
    site = ec.generate_private_key(ec.SECP384R1())
    openssh, plain = serialization.Encoding.OpenSSH, serialization.NoEncryption()
    site_key, log = folder / "site.key", folder / "supernode.log"
    site_key.write_bytes(site.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, plain))
    public = site.public_key().public_bytes(openssh, serialization.PublicFormat.OpenSSH)
    link = SuperLink(folder / "flower", folder, folder / "superlink.log", Certificates(certificate, certificate, key))
    trust = ssl.create_default_context(cafile=certificate)
    with GatewayServer(ListenAddress("127.0.0.1", 0, certificate, key), Upstream(link.url, certificate)) as gateway:
        link.start()
        assert eventually(lambda: link.online() == []), (folder / "superlink.log").read_text()
        link.register({"north": public})
        arguments = [
            "--superlink",
            gateway.address,
            "--port",
            str(free_port()),
            "--root-certificates",
            str(certificate),
        ]
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
            yield Deployment(link, gateway, node, log, trust)
        finally:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()
            link.child.kill()


@pytest.mark.slow
def test_a_supernode_comes_online_through_the_gate_and_its_pulls_linger(deployment: Deployment) -> None:
    assert eventually(lambda: deployment.link.online() == ["north"]), deployment.log.read_text()
    assert eventually(lambda: deployment.asking == 1)


@pytest.mark.slow
@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_else_is_there_from_outside(deployment: Deployment, path: str) -> None:
    headers = {"content-type": "application/protobuf"}
    with httpx.Client(verify=deployment.trust, trust_env=False) as client:
        inside = client.request(
            "GET" if "." in path or path == "/docs" else "POST", deployment.link.url + path, headers=headers
        )
        assert inside.status_code not in (404, 502) or path == "/health/", "the SuperLink itself does answer"
        for method in ("POST", "GET"):
            assert (
                client.request(method, f"https://{deployment.gateway.address}{path}", headers=headers).status_code
                == 404
            )


@pytest.mark.slow
def test_a_caller_without_a_key_is_refused_by_the_superlink(deployment: Deployment) -> None:
    with httpx.Client(verify=deployment.trust, trust_env=False) as client:
        headers = {"content-type": "application/protobuf"}
        answer = client.post(f"https://{deployment.gateway.address}/v1/fleet/pull-messages", headers=headers)
    assert answer.status_code == 401


@pytest.mark.slow
def test_a_supernode_survives_the_superlinks_death(deployment: Deployment) -> None:
    """The gateway holds its requests: it retries once at most, if its pull had been open for long."""
    assert eventually(lambda: deployment.asking == 1)
    logged = len(deployment.log.read_bytes())
    for _ in range(2):
        os.kill(deployment.link.child.pid or 0, signal.SIGKILL)
        deployment.link.child.start()
        began = time.monotonic()
        assert eventually(lambda: deployment.link.online() == ["north"])
        assert eventually(lambda: deployment.asking == 1)
        assert time.monotonic() - began < 20
        assert deployment.node.poll() is None
    assert deployment.log.read_bytes()[logged:].count(b"retrying") <= 2, deployment.log.read_text()


@pytest.mark.slow
def test_a_new_run_ends_the_one_before(deployment: Deployment) -> None:
    """Otherwise a SuperNode waits a minute for the rest of a message from a dead ServerApp."""
    assert eventually(lambda: deployment.link.online() == ["north"])
    deployment.link.prepare()
    first, second = deployment.link.submit(), deployment.link.submit()
    with deployment.link._control() as control:
        runs = control.ListRuns(ListRunsRequest()).run_dict
    assert (runs[first].status.status, runs[first].status.sub_status) == ("finished", "stopped")
    assert runs[second].status.sub_status != "stopped"
