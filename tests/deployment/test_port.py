"""The coordinator's port under idle and half-sent connections, while three sites train, with TLS and keys."""

from __future__ import annotations

import datetime
import re
import resource
import select
import socket
import ssl
import statistics
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from colora.common.processes.health import read_services
from colora.server.flower_compat import public_key_bytes

from .conftest import Town

pytestmark = [pytest.mark.slow, pytest.mark.endurance]

HALF_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
HALF_HEADER = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: gateway\r\nflwr-public-key: "
SWEEP = 2.0  # seconds after which the connections that were closed are opened again
CALM, CROWDED, PHASES, ROUNDS = 30.0, 60.0, 2, 4  # least seconds, how often, and least rounds in a phase


class Crowd(threading.Thread):
    """Keeps connections open from one address: idle ones, half-sent handshakes, and half-sent headers under TLS."""

    def __init__(self, port: int, idle: int, half: int) -> None:
        super().__init__(daemon=True)
        self.port, self.ended, self.opened, self.failed = port, threading.Event(), 0, 0
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.tls.check_hostname, self.tls.verify_mode = False, ssl.CERT_NONE
        makers = [self._idle] * idle + [self._half_hello] * (half // 2) + [self._half_header] * (half - half // 2)
        self.places: list[tuple[Callable[[], socket.socket], socket.socket | None]] = [(each, None) for each in makers]

    def run(self) -> None:
        while not self.ended.is_set():
            for place, (make, connection) in enumerate(self.places):
                if self.ended.is_set():
                    break
                if connection is None or is_closed(connection):
                    self.places[place] = (make, self._open(make))
            self.ended.wait(SWEEP)
        for _, connection in self.places:
            if connection:
                connection.close()

    def _open(self, make: Callable[[], socket.socket]) -> socket.socket | None:
        try:
            self.opened += 1
            return make()
        except OSError:
            self.failed += 1
            return None

    def _idle(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 2)

    def _half_hello(self) -> socket.socket:
        connection = self._idle()
        connection.sendall(HALF_HELLO)
        return connection

    def _half_header(self) -> socket.socket:
        connection = self.tls.wrap_socket(self._idle(), server_hostname="gateway")
        connection.sendall(HALF_HEADER)
        return connection


def is_closed(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    if not poll.poll(0):
        return False
    connection.setblocking(False)
    try:
        closed = connection.recv(4096) == b""
    except (BlockingIOError, ssl.SSLWantReadError):
        return False
    except OSError:
        closed = True
    if closed:
        connection.close()
    return closed


@contextmanager
def crowded(port: int, idle: int, half: int) -> Iterator[Crowd]:
    crowd = Crowd(port, idle, half)
    crowd.start()
    try:
        yield crowd
    finally:
        crowd.ended.set()
        crowd.join(30)


def signed(site: Path) -> dict[str, str]:
    """The headers with which a SuperNode signs a request now."""
    private = load_ssh_private_key((site / "site.key").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    signed_at = datetime.datetime.now(datetime.UTC).isoformat()
    signature = b64encode(private.sign(signed_at.encode(), ec.ECDSA(hashes.SHA256()))).decode()
    public = b64encode(public_key_bytes(private.public_key())).decode()
    return {"flwr-public-key": public, "flwr-timestamp": signed_at, "flwr-signature": signature}


def statuses(town: Town, site: str, seconds: float) -> Counter[str]:
    """Call the coordinator with a site's key, on a kept connection and on new ones, and count the answers.

    This lasts for a number of seconds and for ``ROUNDS`` whole rounds at least.
    """
    found = Counter[str]()
    trust, url = ssl.create_default_context(cafile=town.site(site) / "ca.crt"), f"https://127.0.0.1:{town.port}"
    with httpx.Client(verify=trust, trust_env=False, timeout=10) as kept:
        began, ends = time.time(), time.monotonic() + 300
        while time.time() < began + seconds or len(seconds_of_rounds(town, [(began, time.time())])) < ROUNDS:
            assert time.monotonic() < ends, town.last_words()
            with httpx.Client(verify=trust, trust_env=False, timeout=10) as new:
                for name, client in (("kept", kept), ("new", new)):
                    try:
                        answer = client.post(f"{url}/v1/fleet/get-run", headers=signed(town.site(site)))
                        found[f"{name} {answer.status_code}"] += 1
                    except httpx.TransportError as error:
                        found[f"{name} {type(error).__name__}"] += 1
            time.sleep(0.5)
    return found


def seconds_of_rounds(town: Town, phases: list[tuple[float, float]]) -> list[float]:
    """Return the seconds of the rounds that lay within one of these phases (beginning, end)."""
    ended = [(event["time"], event["seconds"]) for event in town.events("round")]
    return [s for at, s in ended if any(at - s >= began and at <= end for began, end in phases)]


def test_idle_and_half_sent_connections_slow_no_round(place: Path, tiny_recipe: dict) -> None:
    """1,100 idle and 200 half-sent connections from the sites' own address, opened again whenever they are closed.

    Calm and crowded phases alternate, so that other work on the machine slows both.
    """
    tiny_recipe["rounds"] = 500
    town, answers, opened = Town(place / "town", tiny_recipe).build(), Counter[str](), 0
    calm_phases: list[tuple[float, float]] = []
    busy_phases: list[tuple[float, float]] = []
    try:
        town.start()
        town.wait_for("round", 300, round=3)
        for _ in range(PHASES):
            began = time.time()
            statuses(town, "ada", CALM)
            calm_phases.append((began, time.time()))
            began = time.time()
            with crowded(town.port, 1100, 200) as crowd:
                answers += statuses(town, "ada", CROWDED)
            busy_phases.append((began, time.time()))
            opened += crowd.opened
        calm, busy = seconds_of_rounds(town, calm_phases), seconds_of_rounds(town, busy_phases)
        print()
        for name, rounds in (("calm", calm), ("crowded", busy)):
            print(f"{name}: {len(rounds)} rounds, median {statistics.median(rounds):.2f} s, max {max(rounds):.2f} s")
        print(f"opened {opened} connections; answers to a site: {dict(answers)}")
        assert statistics.median(busy) <= 1.3 * statistics.median(calm)
        assert not [answer for answer in answers if "503" in answer]
        assert not [answer for answer in answers if answer.startswith("kept") and "Error" in answer]
        logs = [path.read_text(errors="replace") for path in place.rglob("state/logs/*.log")]
        assert logs
        assert not [log for log in logs if re.search(r"['\s]503['\s]", log)]  # a status, not a part of a hash
        assert opened > 2 * 1300 * PHASES, "the gateway closed nothing"
        assert town.events("restarted") == []
    finally:
        town.stop()


def test_a_coordinator_with_few_files_survives_more_connections_than_files(place: Path, tiny_recipe: dict) -> None:
    """420 idle connections against a limit of 400 open files, for each of the coordinator's processes."""
    tiny_recipe["rounds"] = 8
    town = Town(place / "town", tiny_recipe).build()
    try:
        town.start("server")
        server = town.commands["server"].pid
        resource.prlimit(server, resource.RLIMIT_NOFILE, (400, 400))  # before it has started a process
        town.start(*town.names)
        town.wait_for("round", 300, round=1)
        with crowded(town.port, 420, 0) as crowd:
            assert town.wait("server", 300) == 0, town.last_words()
        assert town.commands["server"].pid == server
        assert "open files: at most 400;" in (town.run / "logs" / "gateway.log").read_text()
        assert town.events("restarted") == []
        assert max(event["round"] for event in town.events("round")) == 8
        assert crowd.opened > 420
        print(f"\nopened {crowd.opened}; rounds of {[event['seconds'] for event in town.events('round')]} s")
    finally:
        town.stop()


def test_a_killed_gateway_costs_no_run(place: Path, tiny_recipe: dict) -> None:
    tiny_recipe["rounds"] = 8
    town = Town(place / "town", tiny_recipe).build()
    try:
        town.start()
        for kill in range(2):
            town.wait_for("round", 300, round=1 + 2 * kill)
            (gateway,) = town.below("server", "colora.server.deployment.gateway.process")
            services = read_services(town.run)
            assert services
            assert services.pids["gateway"] == gateway.pid
            gateway.kill()
        assert town.wait("server", 300) == 0
        told = town.events("restarted")
        assert [event["what"] for event in told] == ["gateway"] * 2, told
        assert max(event["round"] for event in town.events("round")) == 8
    finally:
        town.stop()
