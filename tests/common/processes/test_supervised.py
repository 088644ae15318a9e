"""Supervised processes: how they end, that no orphans remain, and that a lock excludes a second process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from colora.common.errors import StateError
from colora.common.processes.supervised import Command, SupervisedProcess, exclusive_lock

SLEEP = "import time; time.sleep(60)"
# a parent that starts a child and never reaps it
CARELESS = "import subprocess, sys, time; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True); time.sleep(60)"


def wait_until(holds: Callable[[], object], seconds: float = 20.0) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.02)


def start_careless_parent(tmp_path: Path) -> tuple[SupervisedProcess, psutil.Process]:
    """Start a child that starts a child called ``worker`` and never reaps it."""
    worker = tmp_path / "worker"
    worker.symlink_to("/bin/sleep")
    log = tmp_path / "log.txt"
    child = SupervisedProcess(Command("parent", (sys.executable, "-c", CARELESS, str(worker), "60"), log))
    child.start()
    wait_until(lambda: log.exists() and log.read_text().strip())
    process = psutil.Process(int(log.read_text()))
    wait_until(lambda: child.has_living("worker"))
    return child, process


@pytest.mark.skipif(sys.platform != "linux", reason="zombies are read from /proc")
def test_a_killed_grandchild_is_detected(tmp_path: Path) -> None:
    child, process = start_careless_parent(tmp_path)
    assert not child.crashed("worker")
    process.send_signal(signal.SIGKILL)
    wait_until(lambda: child.crashed("worker"))
    assert not child.has_living("worker")
    child.stop(1)


def test_a_process_that_disappears_during_a_check_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child, _ = start_careless_parent(tmp_path)

    def gone(self: psutil.Process) -> str:
        raise psutil.NoSuchProcess(self.pid)

    monkeypatch.setattr(psutil.Process, "status", gone)
    assert not child.crashed("worker")
    assert not child.has_living("worker")
    child.stop(1)


def test_killing_a_child_kills_its_process_group(tmp_path: Path) -> None:
    child, process = start_careless_parent(tmp_path)
    child.kill()
    wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    assert not child.running


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux only")
def test_a_child_dies_when_its_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from colora.common.processes.supervised import SupervisedProcess, Command\n"
        f"c = SupervisedProcess(Command('x', (sys.executable, '-c', {SLEEP!r}), Path(sys.argv[1])))\n"
        "c.start(); print(c.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_pauses_grow_while_a_child_keeps_failing(tmp_path: Path) -> None:
    child = SupervisedProcess(Command("short", (sys.executable, "-c", "raise SystemExit(2)"), tmp_path / "log"))
    pauses = []
    for _ in range(3):
        child.start()
        wait_until(lambda: not child.running)
        assert child.ended_with(2)
        pauses.append(child._due - time.monotonic())
    assert pauses == sorted(pauses)
    assert pauses[-1] > 2 * pauses[0]


def test_a_lock_excludes_a_second_process_and_names_its_holder(tmp_path: Path) -> None:
    message = rf"Another client already runs here \(process {os.getpid()} holds"
    with exclusive_lock(tmp_path / "lock", "client"), pytest.raises(StateError, match=message):
        exclusive_lock(tmp_path / "lock", "client").__enter__()
    with exclusive_lock(tmp_path / "lock", "client"):
        pass
