"""The gateway as a process of its own: it may die, it may run out of files, and it holds what it is told to hold."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from colora.common.errors import StateError
from colora.server.deployment.gateway.process import GatewayProcess, read_settings, write_settings
from colora.server.deployment.gateway.proxy import Upstream
from colora.server.deployment.gateway.server import ListenAddress
from tests.server.deployment.gateway.conftest import eventually

CALL = "/v1/fleet/get-run"
HERE = ListenAddress("127.0.0.1", 0)


@pytest.fixture
def gateway(upstream: str, tmp_path: Path) -> Iterator[GatewayProcess]:
    with GatewayProcess(HERE, Upstream(upstream), tmp_path / "flower", tmp_path / "gateway.log") as gateway:
        yield gateway


def post(gateway: GatewayProcess) -> str:
    return httpx.post(f"http://{gateway.address}{CALL}", content=b"x", trust_env=False, timeout=20).text


def kill(gateway: GatewayProcess) -> None:
    os.kill(gateway.child.pid or 0, signal.SIGKILL)
    assert eventually(lambda: not gateway.child.running)


def test_a_killed_gateway_is_started_again_and_answers_who_called_meanwhile(gateway: GatewayProcess) -> None:
    assert post(gateway) == "done"
    before, address = gateway.child.pid, gateway.address
    kill(gateway)
    answers: list[str] = []
    caller = threading.Thread(target=lambda: answers.append(post(gateway)))
    caller.start()
    assert eventually(gateway.ensure_running)
    caller.join(20)
    assert answers == ["done"]
    assert (gateway.child.pid != before, gateway.address) == (True, address)
    assert not gateway.ensure_running()


def test_what_is_held_is_held_by_the_next_process_too(gateway: GatewayProcess) -> None:
    gateway.hold()
    kill(gateway)
    assert eventually(gateway.ensure_running)
    answers: list[str] = []
    caller = threading.Thread(target=lambda: answers.append(post(gateway)))
    caller.start()
    caller.join(3)
    assert answers == []
    gateway.release()
    caller.join(10)
    assert answers == ["done"]


def test_it_survives_the_end_of_its_files(gateway: GatewayProcess) -> None:
    """The system takes the files away after the gateway has counted them, so accept itself fails."""
    assert post(gateway) == "done"
    pid = gateway.child.pid or 0
    held = len(os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (held + 20, held + 20))
    host, port = gateway.socket.getsockname()
    with ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(socket.create_connection((host, port), 5))
        assert eventually(lambda: "Too many open files" in gateway.log.read_text())
    assert post(gateway) == "done"
    assert (gateway.child.pid, gateway.child.running, gateway.child.starts) == (pid, True, 1)
    assert gateway.log.read_text().count("Too many open files") < 5


def test_its_log_tells_the_limits(gateway: GatewayProcess) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert eventually(lambda: f"open files: at most {hard}; Limits(connections=" in gateway.log.read_text())


def test_its_end_closes_the_port_and_answers_what_is_held(upstream: str, tmp_path: Path) -> None:
    answers: list[str] = []
    with GatewayProcess(HERE, Upstream(upstream), tmp_path, tmp_path / "gateway.log") as gateway:
        assert post(gateway) == "done"
        gateway.hold()
        caller = threading.Thread(target=lambda: answers.append(post(gateway)))
        caller.start()
        caller.join(0.5)
        began = time.monotonic()
    caller.join(5)
    assert answers == ["the SuperLink is down"]
    assert time.monotonic() - began < 5
    assert gateway.child.ended_with(0), gateway.log.read_text()
    with pytest.raises(httpx.ConnectError):
        post(gateway)


def test_its_settings_are_read_as_they_were_written(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    listen = ListenAddress("127.0.0.1", 0, *certificate)
    upstream = Upstream("https://127.0.0.1:9", certificate[0], keys=frozenset({"LS0t", "LS1t"}))
    write_settings(tmp_path, listen, upstream)
    assert read_settings(tmp_path) == (listen, upstream)


def test_certificates_that_cannot_be_used_are_reported_where_the_command_was_given(
    certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    listen = ListenAddress("127.0.0.1", 0, certificate[0], certificate[0])
    with pytest.raises(StateError, match="cannot be used with the key"):
        GatewayProcess(listen, Upstream("http://127.0.0.1:9"), tmp_path, tmp_path / "gateway.log")


def test_the_file_limit_is_raised_to_what_the_system_allows() -> None:
    code = """if True:
        import resource
        from colora.common.processes.file_limit import raise_file_limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))
        print(raise_file_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
    """
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["300", "300", "300"]
