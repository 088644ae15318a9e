"""Certificates, site keys, and a SuperLink that answers every request with "done"."""

from __future__ import annotations

import datetime
import ipaddress
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


def eventually(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether the condition holds within this time."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if true():
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, which is its own CA, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - day).not_valid_after(now + day)
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = builder.add_extension(here, critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    paths = tmp_path / "gate.crt", tmp_path / "gate.key"
    paths[0].write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(*form))
    return paths


@dataclass(frozen=True)
class SiteKey:
    """A site's key. ``headers`` signs as SuperNode does, now or ``age`` seconds ago."""

    private: ec.EllipticCurvePrivateKey

    @property
    def public(self) -> str:
        """The public key as SuperNodes send it."""
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return b64encode(self.private.public_key().public_bytes(serialization.Encoding.PEM, form)).decode()

    def headers(self, age: float = 0.0) -> dict[str, str]:
        signed_at = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age)).isoformat()
        signature = self.private.sign(signed_at.encode(), ec.ECDSA(hashes.SHA256()))
        own = {"flwr-timestamp": signed_at, "flwr-signature": b64encode(signature).decode()}
        return {"flwr-public-key": self.public, **own}


@pytest.fixture
def keys() -> tuple[SiteKey, SiteKey]:
    return SiteKey(ec.generate_private_key(ec.SECP384R1())), SiteKey(ec.generate_private_key(ec.SECP384R1()))


@pytest.fixture
def upstream() -> Iterator[str]:
    """The URL of a SuperLink that answers every POST."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", "4")
            self.end_headers()
            self.wfile.write(b"done")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
