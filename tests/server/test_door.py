"""The gate as a service: port, TLS, silence, a clean end."""

from __future__ import annotations

import datetime
import ipaddress
import signal
import socket
import ssl
import threading
import time
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from colora.common.errors import StateError
from colora.server.door import Door, Gate
from colora.server.gate import Upstream

NOWHERE = Upstream("http://127.0.0.1:9", hold=0.3)
HERE = Door("127.0.0.1", 0)
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


def health(gate: Gate, **how: object) -> httpx.Response:
    scheme = "https" if gate.door.certificate else "http"
    return httpx.get(f"{scheme}://{gate.address}/health", trust_env=False, **how)  # type: ignore[arg-type]


def test_a_taken_port_is_said_so() -> None:
    with Gate(HERE, NOWHERE) as gate, pytest.raises(StateError, match=f"127.0.0.1:{gate.port}: expected a free port"):
        Gate(Door("127.0.0.1", gate.port), NOWHERE).__enter__()


def test_an_address_of_another_machine_is_said_so() -> None:
    with pytest.raises(StateError, match="expected a free port of this machine"):
        Gate(Door("192.0.2.1", 0), NOWHERE).__enter__()


def test_certificates_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    (tmp_path / "other").mkdir()
    foreign = write_certificate(tmp_path / "other")[1]
    with pytest.raises(StateError, match=r"server\.crt: expected a certificate that fits .*other"):
        Gate(Door("127.0.0.1", 0, certificate, foreign), NOWHERE)
    with pytest.raises(StateError, match="none"):
        Gate(Door("127.0.0.1", 0, tmp_path / "none", key), NOWHERE)
    with pytest.raises(StateError, match=r"server\.key: expected a CA certificate"):
        Gate(HERE, Upstream("https://127.0.0.1:9", ca=key))


def test_it_ends_cleanly_and_the_port_is_free_again() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with Gate(HERE, NOWHERE) as gate:
        assert health(gate).text == "ok"
        assert gate.alive
        assert {number: signal.getsignal(number) for number in before} == before
    assert not gate.alive
    with Gate(Door("127.0.0.1", gate.port), NOWHERE) as again:
        assert health(again).text == "ok"
    assert "colora-gate" not in {thread.name for thread in threading.enumerate()}


def test_its_end_answers_what_is_held() -> None:
    answers: list[int] = []
    with Gate(HERE, Upstream("http://127.0.0.1:9")) as gate:
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
    with Gate(Door("127.0.0.1", 0, certificate, key), NOWHERE) as gate:
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
    for door in (HERE, Door("127.0.0.1", 0, certificate, key)):
        with Gate(door, NOWHERE) as gate:
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
