"""A SuperNode exits when one of its threads fails, and is restarted."""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from colora.client.deployment import supernode
from colora.client.deployment.supernode import SuperNode
from colora.client.deployment.supervisor import NodeSupervisor
from colora.common.config.schema import DataSettings
from colora.common.config.site_schema import CoordinatorSettings, SiteSettings, TrainerSettings
from colora.common.processes.supervised import Command, SupervisedProcess, free_port

ENDS = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit())"
CONNECTED = f"{ENDS}; print('SuperNode ID: 7'); time.sleep(60)"
UNCONNECTED = f"{ENDS}; print('starting'); time.sleep(60)"
KEY_IN_USE = "print('[code: 2004] in use')"
THREAD_FAILS = """
import sys, threading, time
from contextlib import contextmanager
from flwr.supernode import start_client_internal as flower
from colora.client.deployment.supernode_main import main

part = sys.argv.pop()

def fail(*_):
    raise RuntimeError("HTTP 500")

@contextmanager
def connection(**_):
    '''As in Flower: an error after the connection is logged, and the main thread returns.'''
    try:
        if part == "heart":
            threading.Thread(target=fail, daemon=True).start()
            time.sleep(600)
        yield (7, *[fail] * 7)
    except Exception as error:
        print(error)

flower._init_connection = connection
main()
"""


def supervisor_of(place: Path, messages: list[str], *, insecure: bool = True) -> NodeSupervisor:
    coordinator = CoordinatorSettings("127.0.0.1:1", ca="ca", key="key", insecure=insecure)
    trainer = TrainerSettings(state=str(place / "state"))
    return NodeSupervisor(
        SiteSettings("ada", DataSettings("rows.jsonl"), trainer=trainer, coordinator=coordinator), messages.append
    )


@pytest.fixture
def deactivated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The node ids that were deactivated."""
    nodes: list[int] = []
    monkeypatch.setattr(supernode, "_deactivate", lambda coordinator, node: nodes.append(node))
    return nodes


def node_running(place: Path, *programs: str) -> SuperNode:
    node, words = supervisor_of(place, [], insecure=False).node, iter(programs)
    stock = node.child.command
    node._command = lambda: replace(stock, arguments=(sys.executable, "-u", "-c", next(words)))  # type: ignore[method-assign]
    return node


def test_the_node_id_is_recorded_when_the_process_starts(tmp_path: Path, deactivated: list[int]) -> None:
    """The next SuperNode can deactivate the node even if the last one was killed before it was connected."""
    node = node_running(tmp_path, CONNECTED, UNCONNECTED, UNCONNECTED, CONNECTED)
    node.start()
    wait_until(lambda: node.stuck_reason() == "" and node.lease_file.exists())
    for killed in (1, 2):
        node.child.kill()
        node.start()
        assert deactivated == [7] * killed
        assert json.loads(node.lease_file.read_text()).items() >= {"node": 7, "pid": node.child.pid}.items()
    wait_until(lambda: b"starting" in node.log_text())
    node.stop(5.0)
    assert node.lease_file.exists(), "it was never connected, so it deactivated nothing"
    node.start()
    wait_until(lambda: node.connected)
    node.stop(5.0)
    assert not node.lease_file.exists(), "it deactivated itself"


def test_the_node_of_another_machine_is_not_deactivated(tmp_path: Path, deactivated: list[int]) -> None:
    node = node_running(tmp_path, *[KEY_IN_USE] * 2)
    lease = {"node": 7, "pid": 1, "began": 0.0, "host": "another", "boot": "x"}
    node.lease_file.parent.mkdir(parents=True)
    node.lease_file.write_text(json.dumps(lease))
    for _ in range(2):
        node.start()
        wait_until(lambda: not node.child.running)
    assert deactivated == []
    assert json.loads(node.lease_file.read_text()) == lease


def test_a_node_whose_key_is_still_in_use_is_deactivated_only_once(tmp_path: Path, deactivated: list[int]) -> None:
    node = node_running(tmp_path, *[KEY_IN_USE] * 2)
    lease = {"node": 7, "pid": 1, "began": 0.0, "host": socket.gethostname(), "boot": "x"}  # this host, dead
    node.lease_file.parent.mkdir(parents=True)
    node.lease_file.write_text(json.dumps(lease))
    for _ in range(2):
        node.start()
        wait_until(lambda: not node.child.running)
    assert deactivated == [7]
    assert not node.lease_file.exists()


def wait_until(met: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not met():
        assert time.monotonic() < ends
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["main", "heart"])
def test_it_ends_when_a_part_of_it_has_ended(part: str, tmp_path: Path) -> None:
    words = ["--insecure", "--superlink", "127.0.0.1:1", "--port", str(free_port()), part]
    child = SupervisedProcess(Command("node", (sys.executable, "-c", THREAD_FAILS, *words), tmp_path / "log"))
    child.start()
    try:
        assert child.process
        assert child.process.wait(60) == 1
    finally:
        child.kill()
    assert "HTTP 500" in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1], ids=["runtime API", "health"])
def test_without_its_port_it_is_started_again_at_others(which: int, tmp_path: Path) -> None:
    messages: list[str] = []
    supervisor = supervisor_of(tmp_path, messages)
    stock, ports = supervisor.node._command, []
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def command():
            made = stock()
            ports.append((supervisor.node.port, supervisor.node.health_port))
            if len(ports) > 1:
                return made
            taken = str(other.getsockname()[1])
            words = [re.sub(rf"\b{ports[0][which]}$", taken, word) for word in made.arguments]
            return replace(made, arguments=tuple(words))

        supervisor.node._command = command  # type: ignore[method-assign]
        try:
            ends = time.monotonic() + 60
            while not supervisor.node.is_retrying and time.monotonic() < ends:
                supervisor.ensure_running()
                time.sleep(0.05)
            assert supervisor.node.is_retrying, supervisor.node.log_text().decode()
        finally:
            supervisor.stop()
    assert len(set(ports)) == len(ports) == 2
    assert "no connection to the coordinator: one of its ports was in use; retrying" in messages
