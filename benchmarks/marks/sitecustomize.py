"""Record when functions in other processes begin and end. Python imports this module from PYTHONPATH at start-up.

All processes append JSON lines to the file that ``COLORA_MARKS`` names: time, CPU seconds of the process, pid, name,
and whether the function ended. Functions are wrapped when their module is imported, so no module is imported early.
Only rounds.py uses this.
"""

from __future__ import annotations

import atexit
import functools
import importlib.machinery
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

PROCESS, EMPTY_PULL = "process", "pull nothing"  # a whole ClientApp process; the end of a pull without messages
MARKED: dict[str, dict[str, str]] = {  # module → function in it → name of the mark
    "flwr.superlink.grid.http_grid": {"HttpGrid.push_messages": "push", "HttpGrid.pull_messages": "pull"},
    "flwr.supernode.runtime.run_clientapp": {"pull_task_input": "input", "push_message": "output"},
    "flwr.clientapp.client_app": {"ClientApp.__call__": "app"},
    "flwr.serverapp.strategy.fedavg": {"FedAvg.aggregate_evaluate": "round"},
    "plain.task": {"load_model": "load", "train": "work", "evaluate": "work"},
    "colora.server.rounds.replies": {"ReplyCollector.take": "pull"},
    "colora.server.rounds.checkpoint": {"Checkpoints.write": "round"},
    "colora.client.training.trainer": {"Trainer.handle": "trainer", "train": "work"},
    "colora.client.training.measuring": {"Measurer._measure": "work"},
    "colora.client.training.state_store": {"StateStore.write": "store"},
}


def note(name: str, *, end: bool) -> None:
    """Append one line. A single ``os.write`` keeps lines of several processes and threads apart."""
    mark = {"time": time.time(), "cpu": time.process_time(), "pid": os.getpid(), "name": name, "end": end}
    os.write(_file, (json.dumps(mark) + "\n").encode())


def marked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        note(name, end=False)
        result: Any = None
        try:
            result = function(*args, **kwargs)
            return result
        finally:
            note(EMPTY_PULL if name == "pull" and not result else name, end=True)

    return run


class Marker(MetaPathFinder):
    """A module finder that wraps the marked functions of a module after it is loaded."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in MARKED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and spec.loader:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                for path, name in MARKED[fullname].items():
                    *parents, function = path.split(".")
                    owner = functools.reduce(getattr, parents, module)
                    setattr(owner, function, marked(getattr(owner, function), name))

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if path := os.environ.get("COLORA_MARKS"):
    _file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    if any(Path(word).name == "flwr-clientapp" for word in sys.orig_argv[:4]):
        note(PROCESS, end=False)
        atexit.register(note, PROCESS, end=True)
    sys.meta_path.insert(0, Marker())
