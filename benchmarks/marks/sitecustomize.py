"""Notes when functions of other processes begin and end; Python imports this by itself from PYTHONPATH.

``COLORA_MARKS`` names a file that all processes append JSON lines to: time, CPU seconds of the process, pid, name, and
whether it is the end. Only for rounds.py; functions are wrapped when their module is imported, so nothing is imported
that would not be.
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

PROCESS, NOTHING = "process", "pull nothing"  # a ClientApp's whole process; the end of a pull without messages
MARKED: dict[str, dict[str, str]] = {  # module → function in it → name of the mark
    "flwr.superlink.grid.http_grid": {"HttpGrid.push_messages": "push", "HttpGrid.pull_messages": "pull"},
    "flwr.supernode.runtime.run_clientapp": {"pull_task_input": "input", "push_message": "output"},
    "flwr.clientapp.client_app": {"ClientApp.__call__": "app"},
    "flwr.serverapp.strategy.fedavg": {"FedAvg.aggregate_evaluate": "round"},
    "plain.task": {"load_model": "load", "train": "work", "evaluate": "work"},
    "colora.server.rounds.checkpoint": {"Checkpoints.write": "round"},
    "colora.client.training.trainer": {"Trainer.handle": "trainer", "train": "work", "Trainer._measure": "work"},
    "colora.client.training.state_store": {"Store.write": "store"},
}


def note(name: str, *, end: bool) -> None:
    """One line, whole, from whatever process and thread."""
    mark = {"time": time.time(), "cpu": time.process_time(), "pid": os.getpid(), "name": name, "end": end}
    os.write(_file, (json.dumps(mark) + "\n").encode())


def marked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        note(name, end=False)
        found: Any = None
        try:
            found = function(*args, **kwargs)
            return found
        finally:
            note(NOTHING if name == "pull" and not found else name, end=True)

    return run


class Marker(MetaPathFinder):
    """Finds modules as Python does, and wraps what is to be marked once they are loaded."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in MARKED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and spec.loader:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                for where, name in MARKED[fullname].items():
                    *owner, function = where.split(".")
                    holder = functools.reduce(getattr, owner, module)
                    setattr(holder, function, marked(getattr(holder, function), name))

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if path := os.environ.get("COLORA_MARKS"):
    _file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    if any(Path(word).name == "flwr-clientapp" for word in sys.orig_argv[:4]):
        note(PROCESS, end=False)
        atexit.register(note, PROCESS, end=True)
    sys.meta_path.insert(0, Marker())
