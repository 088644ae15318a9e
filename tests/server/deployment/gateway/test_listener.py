"""The open port under idle, slow and numerous connections, and while accept fails. Real sockets, with TLS."""

from __future__ import annotations

import errno
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from colora.server.deployment.gateway import body, listener
from colora.server.deployment.gateway.connections import Limits
from colora.server.deployment.gateway.proxy import Upstream
from colora.server.deployment.gateway.server import GatewayServer, ListenAddress, bind
from tests.server.deployment.gateway.conftest import eventually

CALL = "/v1/fleet/get-run"
HALF_HEADER = f"POST {CALL} HTTP/1.1\r\nHost: gateway\r\n".encode()
SHORT = Limits(handshake=0.5, header=0.6, idle=0.7)
LATEST = 4.0  # seconds after which everything that waits for SHORT has been closed


class Gate:
    """A gateway with TLS, and connections to it that the test keeps open."""

    def __init__(self, gateway: GatewayServer, certificate: Path, stack: ExitStack) -> None:
        self.gateway, self.stack = gateway, stack
        self.trust = ssl.create_default_context(cafile=certificate)

    def connect(self, sent: bytes = b"", host: str = "127.0.0.1") -> socket.socket:
        """A TCP connection from an address of loopback on which these bytes were sent."""
        made = socket.create_connection((self.gateway.host, self.gateway.port), 5, source_address=(host, 0))
        made.sendall(sent)
        return self.stack.enter_context(made)

    def connect_tls(self, sent: bytes = b"", host: str = "127.0.0.1") -> ssl.SSLSocket:
        made = self.stack.enter_context(self.trust.wrap_socket(self.connect(host=host), server_hostname="127.0.0.1"))
        made.sendall(sent)
        return made

    def client(self) -> httpx.Client:
        """A client that keeps its connection."""
        url = f"https://{self.gateway.address}"
        return self.stack.enter_context(httpx.Client(base_url=url, verify=self.trust, trust_env=False, timeout=5))

    @property
    def open(self) -> int:
        table = self.gateway.server.listener.table
        return table.known + table.strangers


@pytest.fixture
def gate_with(certificate: tuple[Path, Path], upstream: str) -> Iterator[Callable[..., Gate]]:
    with ExitStack() as stack:

        def build(limits: Limits, listening: socket.socket | None = None, **more: object) -> Gate:
            address = ListenAddress("127.0.0.1", 0, *certificate)
            gateway = GatewayServer(address, Upstream(upstream, **more), limits, listening)  # type: ignore[arg-type]
            return Gate(stack.enter_context(gateway), certificate[0], stack)

        yield build


def is_open(connection: socket.socket) -> bool:
    """Whether the other side has not closed a connection, after all that it sent has been read."""
    connection.settimeout(0.02)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return True
    except OSError:
        pass
    return False


@contextmanager
def lasting(shortest: float, longest: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert shortest < time.monotonic() - began < longest


# --- time limits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01", b"\x16"], ids=["idle", "half a hello", "a byte"])
def test_a_handshake_that_does_not_end_is_ended(gate_with: Callable[..., Gate], sent: bytes) -> None:
    gate = gate_with(SHORT)
    connection = gate.connect(sent)
    with lasting(SHORT.handshake - 0.1, LATEST):
        assert connection.recv(100) == b""
    assert eventually(lambda: gate.open == 0)


@pytest.mark.parametrize("sent", [b"", b"P", HALF_HEADER], ids=["idle", "a byte", "half a header"])
def test_a_header_that_does_not_come_is_not_waited_for(gate_with: Callable[..., Gate], sent: bytes) -> None:
    gate = gate_with(SHORT)
    connection = gate.connect_tls(sent)
    with lasting(SHORT.header - 0.1, LATEST):
        assert not connection.recv(100)
    assert eventually(lambda: gate.open == 0)


def test_a_header_that_comes_byte_by_byte_gets_no_more_time(gate_with: Callable[..., Gate]) -> None:
    connection = gate_with(SHORT).connect_tls(HALF_HEADER)
    with lasting(SHORT.header - 0.1, LATEST):
        while is_open(connection):
            connection.sendall(b"x")


@pytest.mark.parametrize("sent", [b"", HALF_HEADER], ids=["idle", "half a header"])
def test_a_connection_is_not_kept_after_a_response_for_long(gate_with: Callable[..., Gate], sent: bytes) -> None:
    connection = gate_with(SHORT).connect_tls(b"GET /health HTTP/1.1\r\nHost: gateway\r\n\r\n")
    assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    connection.sendall(sent)
    with lasting(SHORT.idle - 0.2, LATEST):
        while is_open(connection):
            pass


def test_the_time_for_a_response_is_not_limited(gate_with: Callable[..., Gate], tmp_path: Path) -> None:
    """A request is held for longer than any of the limits above."""
    hold = tmp_path / "hold"
    hold.touch()
    gate = gate_with(SHORT, held_by=hold)
    request = HALF_HEADER + b"Content-Length: 1\r\n\r\nx"
    connection = gate.connect_tls(request)
    time.sleep(2 * SHORT.idle)
    hold.unlink()
    assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_body_that_comes_byte_by_byte_is_refused(
    gate_with: Callable[..., Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "READ_TIMEOUT", 0.6)
    connection = gate_with(SHORT).connect_tls(HALF_HEADER + b"Content-Length: 1000\r\n\r\n")
    began = time.monotonic()
    while not select.select([connection], [], [], 0.05)[0]:
        connection.sendall(b"x")
        assert time.monotonic() < began + LATEST
    assert connection.recv(4096).startswith(b"HTTP/1.1 408")


# --- numbers --------------------------------------------------------------------------------------------------------

FEW = Limits(connections=24, strangers=12, per_address=4, per_key=3)


def test_an_address_keeps_its_newest_strangers_and_is_still_served(gate_with: Callable[..., Gate]) -> None:
    gate = gate_with(FEW)
    others = [gate.connect(host="127.0.0.2") for _ in range(2)]
    crowd = [gate.connect() for _ in range(10)]
    assert eventually(lambda: [is_open(each) for each in crowd] == [False] * 6 + [True] * 4)
    assert gate.open == FEW.per_address + 2
    assert gate.client().get("/health").text == "ok"
    assert all(is_open(each) for each in others)


def test_in_all_there_is_room_for_known_sites(gate_with: Callable[..., Gate], keys: tuple) -> None:
    """Strangers of twelve addresses come and come; a known site's connection stays, and another site's gets in."""
    gate = gate_with(FEW, keys=frozenset(key.public for key in keys))
    sites = [gate.client(), gate.client()]
    table = gate.gateway.server.listener.table
    assert sites[0].post(CALL, headers=keys[0].headers(), content=b"x").text == "done"
    assert (table.known, table.strangers) == (1, 0)
    for wave in range(3):
        for n in range(40):
            gate.connect(host=f"127.0.0.{2 + n % 12}")
        assert eventually(lambda: table.strangers == FEW.strangers)
        for site, key in zip(sites, keys, strict=True):
            assert site.post(CALL, headers=key.headers(), content=b"x").text == "done"
        assert table.known == 2, wave  # the same two connections, or a request would have come as a stranger's
    assert table.strangers <= FEW.strangers


def test_a_site_at_the_address_of_the_crowd_is_served(gate_with: Callable[..., Gate], keys: tuple) -> None:
    gate = gate_with(FEW, keys=frozenset({keys[0].public}))
    for _ in range(5):
        for _ in range(20):
            gate.connect()
        assert gate.client().post(CALL, headers=keys[0].headers(), content=b"x").text == "done"


def test_a_caller_without_a_valid_signature_stays_a_stranger(gate_with: Callable[..., Gate], keys: tuple) -> None:
    gate = gate_with(FEW, keys=frozenset({keys[0].public}))
    for headers in ({}, keys[1].headers(), keys[0].headers() | {"flwr-signature": "AAAA"}):
        assert gate.client().post(CALL, headers=headers, content=b"x").status_code in (400, 401)
    assert gate.gateway.server.listener.table.known == 0


# --- accept fails ---------------------------------------------------------------------------------------------------


class Failing(socket.socket):
    """A listening socket whose accept fails with these errors first."""

    errors: list[int]

    def accept(self):
        if self.errors:
            number = self.errors.pop(0)
            raise OSError(number, "accept fails") if number else ValueError("accept fails")
        return super().accept()


def test_the_port_survives_what_accept_may_raise(
    gate_with: Callable[..., Gate], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listener, "ACCEPT_PAUSE", 0.1)
    failing = Failing(fileno=bind(ListenAddress("127.0.0.1", 0)).detach())
    failing.errors = [errno.ECONNABORTED, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ECONNABORTED]
    with lasting(0.3, 10):  # three pauses, and none for a caller that was gone
        gate = gate_with(FEW, failing)
        assert gate.client().get("/health").text == "ok"
    assert failing.errors == []
    assert [record.message for record in caplog.records if record.name == "colora.gateway"] == [
        "cannot accept connections, trying again every 0.1 s: [Errno 24] accept fails"
    ]


def test_a_gateway_that_can_accept_no_more_is_not_alive(
    gate_with: Callable[..., Gate], caplog: pytest.LogCaptureFixture
) -> None:
    """Its process then ends, and is started again."""
    failing = Failing(fileno=bind(ListenAddress("127.0.0.1", 0)).detach())
    failing.errors = []
    gate = gate_with(FEW, failing)
    assert gate.client().get("/health").text == "ok"
    assert gate.gateway.alive
    failing.errors = [0]  # a fault of the program
    gate.connect()
    gate.connect()
    assert eventually(lambda: not gate.gateway.alive)
    assert "ValueError('accept fails')" in caplog.text
