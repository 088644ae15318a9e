"""Real processes that start at once: forks of a process that has imported everything already.

Importing torch, transformers and PEFT takes longer than most of what a test asks of a process. A fork server imports
them once a test session; each process below is a fork of it, with its own memory, signals and exit code.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["colora.client.trainer_service.server", "colora.client.trainer_service.session", "sklearn.linear_model"]
)


class Forked:
    """``main`` of a module in a process of its own, in the repository's folder.

    ``before`` is code that the process runs first. With ``together`` standard error goes where standard output goes.
    """

    def __init__(self, module: str, arguments: Sequence[object], before: str = "", *, together: bool = False) -> None:
        reading, writing = CONTEXT.Pipe(duplex=False)
        errors = (reading, writing) if together else CONTEXT.Pipe(duplex=False)
        given = [str(argument) for argument in arguments]
        self.process = CONTEXT.Process(target=_run, args=(module, given, before, writing, errors[1]), daemon=True)
        self.process.start()
        for connection in {writing, errors[1]}:
            connection.close()
        self.stdout = os.fdopen(os.dup(reading.fileno()), encoding="utf-8")
        self.stderr = os.fdopen(os.dup(errors[0].fileno()), encoding="utf-8")
        for connection in {reading, errors[0]}:
            connection.close()

    @property
    def pid(self) -> int:
        """The process id."""
        assert self.process.pid is not None
        return self.process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process lives."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        """Return the exit code of the process, which is killed when it has not ended after ``seconds``."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            raise AssertionError(f"process {self.pid} did not end within {seconds:g} s")
        return code

    def close(self) -> None:
        """Close what the process's words come through."""
        self.stdout.close()
        self.stderr.close()


def run(module: str, *arguments: object, seconds: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run ``main`` of a module to its end. It may print a page on each output, not more."""
    forked = Forked(module, arguments)
    code = forked.wait(seconds)
    out, err = forked.stdout.read(), forked.stderr.read()
    forked.close()
    return subprocess.CompletedProcess([module, *map(str, arguments)], code, out, err)


def _run(module: str, arguments: list[str], before: str, *outputs: Connection) -> None:
    for number, output in zip((1, 2), outputs, strict=True):
        os.dup2(output.fileno(), number)
    for output in set(outputs):
        output.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(ROOT)
    exec(before, {})
    sys.exit(importlib.import_module(module).main(arguments))
