"""Whose signatures the gateway accepts, for how long, and on which connection."""

from __future__ import annotations

import socket
from base64 import b64decode, b64encode

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from colora.server.deployment.gateway import signatures
from colora.server.deployment.gateway.proxy import Upstream
from colora.server.deployment.gateway.server import GatewayServer, ListenAddress
from colora.server.deployment.gateway.signatures import SignatureCheck

P384 = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973


def test_what_flowers_own_client_signs_is_valid(keys: tuple) -> None:
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
    from flwr.proto import fleet_pb2
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    seen: list[httpx.Request] = []
    private = keys[0].private
    with FleetHttpClient(
        "http://gateway", interceptors=[NodeAuthHttpInterceptor(private, private.public_key())]
    ) as client:
        client._client = httpx.Client(transport=httpx.MockTransport(lambda r: seen.append(r) or httpx.Response(200)))
        client.PullMessages(fleet_pb2.PullMessagesRequest())
    check = SignatureCheck([keys[0].public])
    assert check.check(seen[0].headers, "here") == "valid"
    assert (signatures.SIGNATURE_MAX_AGE, signatures.SIGNATURE_MAX_AHEAD) == (
        TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE,
        SYSTEM_TIME_TOLERANCE,
    )


@pytest.mark.parametrize(("age", "verdict"), [(0, "valid"), (300, "valid"), (306, "invalid"), (-6, "invalid")])
def test_a_signature_is_valid_for_as_long_as_the_superlink_accepts_it(keys: tuple, age: float, verdict: str) -> None:
    assert SignatureCheck([keys[0].public]).check(keys[0].headers(age), "here") == verdict


def test_a_key_signs_for_itself_only(keys: tuple) -> None:
    check = SignatureCheck([key.public for key in keys])
    stolen = keys[0].headers() | {"flwr-public-key": keys[1].public}
    assert check.check(stolen, "here") == "invalid"
    assert SignatureCheck([keys[1].public]).check(keys[0].headers(), "here") == "unknown key"
    for name, value in (("flwr-timestamp", "today"), ("flwr-signature", "?"), ("flwr-signature", "")):
        assert check.check(keys[0].headers() | {name: value}, "here") == "invalid"
    assert check.check({}, "here") == "unknown key"


def test_a_captured_signature_is_of_no_use_on_another_connection(keys: tuple) -> None:
    check, captured = SignatureCheck([keys[0].public]), keys[0].headers()
    assert check.check(captured, "here") == "valid"
    assert check.check(captured, "there") == "used"
    assert check.check(captured, "here") == "valid"
    r, s = decode_dss_signature(b64decode(captured["flwr-signature"]))  # (r, n - s) is a signature of the same text
    other = captured | {"flwr-signature": b64encode(encode_dss_signature(r, P384 - s)).decode()}
    assert check.check(other, "there") == "used"
    assert check.check(keys[0].headers(), "there") == "valid"


def test_old_signatures_are_forgotten(keys: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    check, now = SignatureCheck([keys[0].public]), [0.0]
    monkeypatch.setattr(signatures.time, "monotonic", lambda: now[0])
    for second in range(0, 1000, 5):
        now[0] = float(second)
        check.check(keys[0].headers(), "here")
    assert len(check._used) <= (signatures.SIGNATURE_MAX_AGE + signatures.SIGNATURE_MAX_AHEAD) / 5 + 1


def unread(gateway: GatewayServer, headers: dict[str, str]) -> int:
    """The status of a request with a body that never comes."""
    lines = ["POST /v1/fleet/get-run HTTP/1.1", "Host: gateway", "Content-Length: 1000000"]
    with socket.create_connection((gateway.host, gateway.port), 5) as connection:
        connection.sendall("\r\n".join([*lines, *map(": ".join, headers.items()), "", ""]).encode())
        return int(connection.recv(65536).split()[1])


def test_the_gateway_refuses_before_it_reads_the_body(upstream: str, keys: tuple) -> None:
    with (
        GatewayServer(ListenAddress("127.0.0.1", 0), Upstream(upstream, keys=frozenset({keys[0].public}))) as gateway,
        httpx.Client(base_url=f"http://{gateway.address}", trust_env=False, timeout=5) as client,
    ):
        invalid = keys[0].headers() | {"flwr-signature": "AAAA"}
        assert [unread(gateway, headers) for headers in (invalid, keys[1].headers())] == [401, 400]
        signed = keys[0].headers()
        assert client.post("/v1/fleet/get-run", headers=signed, content=b"x").text == "done"
        with httpx.Client(base_url=f"http://{gateway.address}", trust_env=False) as other:
            assert other.post("/v1/fleet/get-run", headers=signed, content=b"x").status_code == 503
            assert other.post("/v1/fleet/get-run", headers=keys[0].headers(), content=b"x").text == "done"
