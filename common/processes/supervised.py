"""Supervised child processes: they die with their parent, leave no orphans, and restart after growing pauses."""

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
# Seconds between restarts, doubled up to LONGEST_PAUSE. SETTLED seconds of running reset them.
FIRST_PAUSE, LONGEST_PAUSE, SETTLED = 0.5, 30.0, 60.0


@dataclass(frozen=True)
class Command:
    """A command line: its name in logs, arguments, additional environment variables, and log file.

    ``commands`` is a folder that comes first in its PATH. ``files`` are descriptors that it inherits.
    """

    name: str
    arguments: tuple[str, ...]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    commands: Path | None = None
    files: tuple[int, ...] = ()


class SupervisedProcess:
    """A child process in its own process group. The thread that starts it must outlive it."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self.killed = False  # by kill(), since the last start
        self._pause, self._due, self._started = FIRST_PAUSE, 0.0, 0.0

    @property
    def pid(self) -> int | None:
        """The pid; None before the first start."""
        return self.process.pid if self.process else None

    @property
    def running(self) -> bool:
        """Whether the process runs. A process that has ended is reaped here."""
        return self.process is not None and self.process.poll() is None

    def ended_with(self, code: int) -> bool:
        """Whether the process has ended with this exit code."""
        return self.process is not None and self.process.poll() == code

    @property
    def due(self) -> bool:
        """Whether the process does not run and the pause before its restart is over."""
        return not self.running and time.monotonic() >= self._due

    def start(self) -> None:
        """Kill what is left of the process group and start the process.

        The pause before the next restart doubles, unless this process ran for ``SETTLED`` seconds.
        """
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
                pass_fds=self.command.files,
            )
        now = time.monotonic()
        self._pause = FIRST_PAUSE if now - self._started > SETTLED else min(2 * self._pause, LONGEST_PAUSE)
        self._started, self._due, self.starts, self.killed = now, now + self._pause, self.starts + 1, False

    def kill(self) -> None:
        """Kill the whole process group, even if its leader has ended, and reap the leader."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.killed = True

    def stop(self, grace: float) -> None:
        """Send SIGTERM, wait up to ``grace`` seconds, and kill what is left of the process group."""
        if self.running and self.process:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        self.kill()

    def crashed(self, name: str) -> bool:
        """Whether a descendant called ``name`` was ended by a signal and has not been reaped (Linux only).

        Flower's SuperExec starts a process for each message and reaps it only when it starts the next one. Until then
        the process is a zombie with its exit status.
        """
        return any(_exit_status(process) in _SIGNALLED for process in self._below(name) if _is_zombie(process))

    def has_living(self, name: str) -> bool:
        """Whether a descendant called ``name`` is alive."""
        return any(_is_zombie(process) is False for process in self._below(name))

    def _below(self, name: str) -> list[psutil.Process]:
        try:
            descendants = psutil.Process(self.pid).children(recursive=True) if self.running else []
        except psutil.NoSuchProcess:
            return []
        return [process for process in descendants if _is_named(process, name)]


_SIGNALLED = range(1, 128)  # wait statuses of processes that a signal ended: the low bits are its number


def _is_zombie(process: psutil.Process) -> bool | None:
    """Return whether a process is a zombie; None for one that no longer exists."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None


def _exit_status(process: psutil.Process) -> int:
    """Return the wait status of a zombie; 0 if it cannot be read."""
    try:
        return int(Path(f"/proc/{process.pid}/stat").read_text().rsplit(" ", 1)[1])
    except (OSError, ValueError, IndexError):
        return 0


def _is_named(process: psutil.Process, name: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.name() == name[:15] or any(Path(word).name == name for word in process.cmdline()[:3])
    return False


@contextlib.contextmanager
def exclusive_lock(path: Path, what: str) -> Iterator[IO[str]]:
    """Hold a lock file. Raises StateError if another process holds it; ``what`` names the kind of process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = f"process {file.read() or '?'}"
            raise StateError(
                str(path),
                f"no other {what}",
                holder,
                message=f"Another {what} already runs here ({holder} holds {path}).",
                hint="Stop it first.",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file


def _path(commands: Path | None) -> str:
    """Return a PATH with this Python's folder, since Flower's commands start one another by name."""
    first = [str(commands.resolve())] if commands else []
    return os.pathsep.join([*first, str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def program(name: str) -> str:
    """Return the path of a command, of this Python environment first. Raises StateError if there is none."""
    installed = Path(sys.executable).parent / name
    path = str(installed) if installed.exists() else which(name)
    if path is None:
        message = f"The command {name} was not found."
        raise StateError(name, "a command on the PATH", "nothing", message=message, hint="Install colora again.")
    return path


def free_port() -> int:
    """Return a free TCP port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(host: str, port: int) -> bool:
    """Return whether something accepts connections at an address."""
    try:
        with socket.create_connection((host, port), timeout=0.5):
            return True
    except OSError:
        return False


def write_services(path: Path, services: Mapping[str, object]) -> None:
    """Write addresses and pids of services, for ``colora status``."""
    write_atomically(path, json.dumps(dict(services), indent=1).encode(), lasting=False)


class Signals:
    """Count SIGTERM and SIGINT: the first asks for a graceful end, the second for an immediate one."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._count)

    def _count(self, number: int, frame: object) -> None:
        self.count += 1
