"""A SuperNode of which a part has ended ends as a whole, and is started again."""

from __future__ import annotations

import re
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from colora.client.launch import NodeKeeper
from colora.common.processes import Child, Command, free_port
from colora.common.settings import DataSettings
from colora.common.site import CoordinatorSettings, SiteSettings, TrainerSettings

PART_FAILS = """
import sys, threading, time
from contextlib import contextmanager
from flwr.supernode import start_client_internal as flower
from colora.client.node import main

part = sys.argv.pop()

def fail(*_):
    raise RuntimeError("HTTP 500")

@contextmanager
def connection(**_):
    '''As Flower's own: what fails after the connection is logged, and the main thread goes home.'''
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


@pytest.mark.slow
@pytest.mark.parametrize("part", ["main", "heart"])
def test_it_ends_when_a_part_of_it_has_ended(part: str, tmp_path: Path) -> None:
    words = ["--insecure", "--superlink", "127.0.0.1:1", "--port", str(free_port()), part]
    child = Child(Command("node", (sys.executable, "-c", PART_FAILS, *words), tmp_path / "log"))
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
    said: list[str] = []
    site = SiteSettings(
        "ada",
        DataSettings("rows.jsonl"),
        trainer=TrainerSettings(state=str(tmp_path / "state")),
        coordinator=CoordinatorSettings("127.0.0.1:1", insecure=True),
    )
    keeper = NodeKeeper(site, said.append)
    stock, ports = keeper.node._command, []
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def command():
            made = stock()
            ports.append((keeper.node.port, keeper.node.health_port))
            if len(ports) > 1:
                return made
            taken = str(other.getsockname()[1])
            words = [re.sub(rf"\b{ports[0][which]}$", taken, word) for word in made.arguments]
            return replace(made, arguments=tuple(words))

        keeper.node._command = command  # type: ignore[method-assign]
        try:
            ends = time.monotonic() + 60
            while not keeper.node.trying and time.monotonic() < ends:
                keeper.keep()
                time.sleep(0.05)
            assert keeper.node.trying, keeper.node.said().decode()
        finally:
            keeper.stop()
    assert len(set(ports)) == len(ports) == 2
    assert "the SuperNode ended: a port of its own was taken; trying again" in said
