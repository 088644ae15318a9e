"""Supervised processes: what ends them, what is left of them, and who may work alone."""

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
# a parent that starts a child called NAME and never looks after it
CARELESS = "import subprocess, sys, time; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True); time.sleep(60)"


def wait_until(holds: Callable[[], object], seconds: float = 20.0) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.02)


def careless(tmp_path: Path) -> tuple[SupervisedProcess, psutil.Process]:
    """A child that has a child of its own, called ``worker``."""
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
def test_a_grandchild_that_was_killed_is_noticed_and_one_that_ended_is_not(tmp_path: Path) -> None:
    child, process = careless(tmp_path)
    assert not child.crashed("worker")
    process.send_signal(signal.SIGKILL)
    wait_until(lambda: child.crashed("worker"))
    assert not child.has_living("worker")
    child.stop(1)


def test_a_process_that_is_gone_between_two_looks_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child, _ = careless(tmp_path)

    def gone(self: psutil.Process) -> str:
        raise psutil.NoSuchProcess(self.pid)

    monkeypatch.setattr(psutil.Process, "status", gone)
    assert not child.crashed("worker")
    assert not child.has_living("worker")
    child.stop(1)


def test_killing_a_child_takes_its_whole_group(tmp_path: Path) -> None:
    child, process = careless(tmp_path)
    child.kill()
    wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    assert not child.running


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own leash")
def test_a_child_dies_with_its_parent_however_that_dies(tmp_path: Path) -> None:
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


def test_pauses_grow_while_a_child_does_not_last(tmp_path: Path) -> None:
    child = SupervisedProcess(Command("short", (sys.executable, "-c", "raise SystemExit(2)"), tmp_path / "log"))
    pauses = []
    for _ in range(3):
        child.start()
        wait_until(lambda: not child.running)
        assert child.ended_with(2)
        pauses.append(child._due - time.monotonic())
    assert pauses == sorted(pauses)
    assert pauses[-1] > 2 * pauses[0]


def test_one_works_alone_and_the_other_is_told_who(tmp_path: Path) -> None:
    with exclusive_lock(tmp_path / "lock", "client"), pytest.raises(StateError, match=f"process {os.getpid()}"):  # noqa: SIM117
        with exclusive_lock(tmp_path / "lock", "client"):
            pass
    with exclusive_lock(tmp_path / "lock", "client"):
        pass
