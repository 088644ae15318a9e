"""Seeded raw bytes at the public port: the gateway answers or closes, forwards its calls only, and goes on."""

from __future__ import annotations

import contextlib
import logging
import random
import re
import socket
from collections import Counter

import pytest

from colora.server.deployment.gateway.proxy import CALLS, Upstream
from colora.server.deployment.gateway.server import GatewayServer, ListenAddress

from .test_proxy import SuperLink, post

PATHS = [path.decode() for path in CALLS]
STARTS = (
    "/v1/control/start-run",
    "/v1/runtime/x",
    "//v1/fleet/get-run",
    "/v1/fleet/../control/start-run",
    "*",
    "",
    "/\x00",
)
METHODS = ("POST", "GET", "PUT", "CONNECT", "post", "PO ST", "")
HEADERS = (
    *("Content-Length: -1", "Content-Length: 99999999999999999999", "Content-Length: 1, 2", "Content-Length: x"),
    *("Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked", "Expect: 100-continue", "Upgrade: websocket"),
    *("Host: a\r\nHost: b", "X" * 9000 + ": 1", "X: " + "y" * 70_000, ": empty", "no colon", "X: \x00", "X:\n folded"),
    *("flwr-public-key: " + "A" * 5000, "Connection: close, keep-alive", "Connection: \x1b[2J"),
)
BODIES = (b"", b"x", b"0\r\n\r\n", b"ffffffffffffffffff\r\nx", b"-1\r\n\r\n", b"5\r\nabc", bytes(range(256)) * 40)


def request(rng: random.Random) -> bytes:
    """Random bytes, an odd request, or a good one with some bytes changed, left out or repeated."""
    if rng.random() < 0.2:
        return rng.randbytes(rng.randrange(1, 4000))
    odd = rng.random() < 0.6
    start = f"{rng.choice(METHODS if odd else METHODS[:1])} {rng.choice((*STARTS, *PATHS) if odd else PATHS)} HTTP/1.1"
    headers = [rng.choice(HEADERS) for _ in range(rng.choice((0, 1, 2, 3, 300)))] if odd else []
    body = rng.choice(BODIES)
    if rng.random() < 0.5:
        headers.append(f"Content-Length: {len(body)}")
    text = bytearray("\r\n".join([start, "Host: gateway", "Connection: close", *headers, "", ""]).encode() + body)
    for _ in range(rng.choice((0, 1, 3, 20))):
        at = rng.randrange(len(text))
        text[at : at + rng.randrange(3)] = rng.choice((rng.randbytes(2), b"", bytes(text[:50]), b"\r\n", b"\x00"))
    return bytes(text)


def statuses(port: int, sent: bytes, *, ends: bool) -> list[int]:
    """Send the bytes; return the statuses of all answers until the gateway closes, or is silent for a moment.

    With ``ends`` the client closes its side after them.
    """
    answer = b""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.settimeout(10 if ends else 0.3)
        with contextlib.suppress(OSError):  # the gateway may close before it has read everything
            connection.sendall(sent)
            if ends:
                connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError, *(() if ends else (TimeoutError,))):
            while chunk := connection.recv(65536):
                answer += chunk
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


@pytest.mark.parametrize("count", [150, pytest.param(1500, marks=pytest.mark.slow)])
def test_raw_requests_end_nothing(count: int, caplog: pytest.LogCaptureFixture) -> None:
    rng, told, link = random.Random(18), Counter[int](), SuperLink()
    upstream = Upstream(f"http://127.0.0.1:{link.port}", hold=2.0, linger=1.5)
    try:
        with caplog.at_level(logging.WARNING), GatewayServer(ListenAddress("127.0.0.1", 0), upstream) as gateway:
            for _ in range(count):
                told.update(statuses(gateway.port, request(rng), ends=rng.random() < 0.7))
            assert post(gateway, PATHS[0]).status_code == 200
    finally:
        link.stop()
    print(f"\n{count} raw requests: {dict(sorted(told.items()))}")
    assert told[400] > count / 10
    assert told[200], "good requests are among them"
    assert not [status for status in told if status >= 500 and status != 501]
    assert {seen.line for seen in link.seen} <= {f"POST {path} HTTP/1.1" for path in PATHS}
    assert not [record for record in caplog.records if record.exc_info], "a traceback"
