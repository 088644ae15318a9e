"""Processes that one command supervises: they die with it, leave no orphans, and come back after growing pauses."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import IO

import psutil

from ..atomic_io import write_atomically
from ..errors import StateError

LAUNCHER = Path(__file__).with_name("die_with_parent.py")
FIRST_PAUSE, LONGEST_PAUSE, SETTLED = 0.5, 30.0, 60.0  # seconds


@dataclass(frozen=True)
class Command:
    """What to run: its name in logs, its arguments, what it needs in its environment, and the file it writes to.

    Commands that it starts by name are looked for in ``commands`` first.
    """

    name: str
    arguments: tuple[str, ...]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    commands: Path | None = None


class SupervisedProcess:
    """A process in a group of its own. Its starter must outlive it in the thread that started it."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self.killed = False  # by its keeper, since the last start
        self._pause, self._due, self._began = FIRST_PAUSE, 0.0, 0.0

    @property
    def pid(self) -> int | None:
        """Its pid; None before the first start."""
        return self.process.pid if self.process else None

    @property
    def running(self) -> bool:
        """Whether it runs; a process that ended is reaped here."""
        return self.process is not None and self.process.poll() is None

    def ended_with(self, code: int) -> bool:
        """Whether its last start has ended with this exit code."""
        return self.process is not None and self.process.poll() == code

    @property
    def due(self) -> bool:
        """Whether it does not run and its pause is over."""
        return not self.running and time.monotonic() >= self._due

    def start(self) -> None:
        """Starts it anew; what was left of its group goes first. Its next pause is longer if it does not last."""
        self.kill()
        self.command.log.parent.mkdir(parents=True, exist_ok=True)
        with self.command.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), *self.command.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PATH": _path(self.command.commands), **self.command.environment},
                start_new_session=True,
            )
        now = time.monotonic()
        self._pause = FIRST_PAUSE if now - self._began > SETTLED else min(2 * self._pause, LONGEST_PAUSE)
        self._began, self._due, self.starts, self.killed = now, now + self._pause, self.starts + 1, False

    def kill(self) -> None:
        """Kills the whole group, also what an ended leader left behind, and reaps the leader."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.killed = True

    def stop(self, grace: float) -> None:
        """Asks it to end, waits ``grace`` seconds, then kills what is left of its group."""
        if self.running and self.process:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        self.kill()

    def crashed(self, name: str) -> bool:
        """Whether a process called ``name`` below it ended by a signal and nobody has noticed (Linux only).

        Flower's SuperExec starts a process for each message and does not look after it, so it stays a zombie, with
        its exit status, until the next one.
        """
        return any(_exit_status(process) in _SIGNALLED for process in self._below(name) if _is_zombie(process))

    def has_living(self, name: str) -> bool:
        """Whether a process called ``name`` lives below it."""
        return any(_is_zombie(process) is False for process in self._below(name))

    def _below(self, name: str) -> list[psutil.Process]:
        try:
            found = psutil.Process(self.pid).children(recursive=True) if self.running else []
        except psutil.NoSuchProcess:
            return []
        return [process for process in found if _called(process, name)]


_SIGNALLED = range(1, 128)  # a wait status whose low bits are a signal's number


def _is_zombie(process: psutil.Process) -> bool | None:
    """None for a process that is gone by now."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None


def _exit_status(process: psutil.Process) -> int:
    """The wait status of a zombie; 0 where it cannot be read."""
    try:
        return int(Path(f"/proc/{process.pid}/stat").read_text().rsplit(" ", 1)[1])
    except (OSError, ValueError, IndexError):
        return 0


def _called(process: psutil.Process, name: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.name() == name[:15] or any(Path(word).name == name for word in process.cmdline()[:3])
    return False


@contextlib.contextmanager
def exclusive_lock(path: Path, what: str) -> Iterator[IO[str]]:
    """Holds a lock file for as long as this process lives. Raises StateError when another one holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise StateError(str(path), f"no other {what} at work here", f"process {file.read() or '?'}") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file


def _path(commands: Path | None) -> str:
    """Where commands are looked for: Flower's start one another by name, also when nobody activated this Python."""
    first = [str(commands.resolve())] if commands else []
    return os.pathsep.join([*first, str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def program(name: str) -> str:
    """A command that came with this Python's packages. Raises StateError when it is not there."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else which(name)
    if found is None:
        raise StateError(name, "a command on the path", "nothing")
    return found


def free_port() -> int:
    """A TCP port on loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(host: str, port: int) -> bool:
    """Whether somebody accepts connections there."""
    try:
        with socket.create_connection((host, port), timeout=0.5):
            return True
    except OSError:
        return False


def write_services(path: Path, services: Mapping[str, object]) -> None:
    """Writes where the services are, for ``colora status``."""
    write_atomically(path, json.dumps(dict(services), indent=1).encode(), lasting=False)


class Signals:
    """SIGTERM and SIGINT ask to end; a second one insists."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)

    def _take(self, number: int, frame: object) -> None:
        self.count += 1
