"""Experiment trackers: TensorBoard, Weights & Biases, MLflow and trackio, through accelerate's trackers.

A tracker runs in a thread of its own and asks for the rows that it has not logged yet, so it never delays a round. If
it raises, it ends and the run is told. What it has logged is in ``FOLDER/NAME.json``, so a resumed run repeats no row.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .atomic_io import write_atomically
from .errors import ConfigError
from .foreign_text import clean

INTERVAL = 1.0  # seconds between two looks for new rows
BUFFERED = "wandb"  # keeps the last rows in memory until it is closed, so what a killed process logged is lost
MLFLOW_FILE = "/mlflow.db"
CLOSING = 30.0  # seconds that a tracker may take to log the last rows and to close


@dataclass(frozen=True)
class TrackedRow:
    """Metrics of one step. ``key`` is unique within a run; steps do not decrease from row to row."""

    key: str
    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker stores: the run's name, the project it belongs to, and its configuration.

    ``folder`` receives the files of trackers that write to disk. ``rows`` begins a reader, whose calls return the rows
    of the run from its first, each once. ``failed`` is called with the name of a tracker that has ended, and why.
    """

    name: str
    project: str
    folder: Path
    rows: Callable[[], Callable[[], Iterable[TrackedRow]]]
    configuration: Mapping[str, Any]
    failed: Callable[[str, str], None]


class Trackers:
    """A context manager that feeds rows to the named trackers until it is left."""

    def __init__(self, names: Sequence[str], run: TrackedRun) -> None:
        """Raises ConfigError if the package of a tracker is not installed."""
        check_installed(names)
        self._threads = [_TrackerThread(name, run) for name in names]

    def __enter__(self) -> Trackers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for thread in self._threads:
            thread.closing.set()
        for thread in self._threads:
            thread.join(CLOSING)
            if thread.is_alive():
                thread.tracked.failed(thread.library, f"it was still busy after {CLOSING:g} s")


def check_installed(names: Sequence[str]) -> None:
    """Raise ConfigError if the package of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            message, hint = f"The tracker {name} needs the package {name}.", f"Install it: pip install {name}"
            raise ConfigError("tracking.trackers", "an installed package", name, message=message, hint=hint)


class _TrackerThread(threading.Thread):
    def __init__(self, name: str, run: TrackedRun) -> None:
        super().__init__(name=name, daemon=True)
        self.library, self.tracked, self.closing = name, run, threading.Event()
        self.path = run.folder / f"{name}.json"

    def run(self) -> None:
        try:
            self._follow()
        except Exception as error:  # of any kind: a library, its server or the disk
            self.tracked.failed(self.library, clean(f"{type(error).__name__}: {error}"))

    def _follow(self) -> None:
        state = _read_state(self.path)
        if self.library == BUFFERED:
            del state["logged"][state["closed"] :]
            _remove_sessions(self.tracked.folder, keep=state["sessions"])
        tracker, state["id"] = _start(self.library, self.tracked, state["id"])
        self._write(state)
        if not state["logged"]:
            tracker.store_init_configuration(_flat(self.tracked.configuration))
        read, logged, last = self.tracked.rows(), set(state["logged"]), False
        while not last:
            last = self.closing.wait(INTERVAL)
            for row in read():
                if row.key not in logged:
                    tracker.log(dict(row.metrics), step=row.step)
                    logged.add(row.key)
                    state["logged"].append(row.key)
                    self._write(state)
        tracker.finish()
        state["closed"], state["sessions"] = len(state["logged"]), sorted(_sessions(self.tracked.folder))
        self._write(state)

    def _write(self, state: Mapping[str, Any]) -> None:
        write_atomically(self.path, json.dumps(state).encode(), lasting=False)


def _sessions(folder: Path) -> dict[str, Path]:
    """The offline sessions of Weights & Biases in a folder, by name."""
    return {path.name: path for path in (folder / BUFFERED).glob("offline-run-*")}


def _remove_sessions(folder: Path, *, keep: Sequence[str]) -> None:
    """Remove the sessions that were not closed: they lack rows, and all of their rows are logged again."""
    for name, path in _sessions(folder).items():
        if name not in keep:
            shutil.rmtree(path, ignore_errors=True)


def _start(name: str, run: TrackedRun, identity: str) -> tuple[Any, str]:
    """Start a tracker; return it and the library's name of the run, with which it is continued."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    run.folder.mkdir(parents=True, exist_ok=True)
    tracker = LOGGER_TYPE_TO_CLASS[name](**_OPTIONS[name](run, identity))
    if hasattr(tracker, "start"):  # older versions of accelerate start in the constructor
        tracker.start()
    return tracker, _IDENTITY[name](tracker.tracker)


def _tensorboard(run: TrackedRun, identity: str) -> dict[str, Any]:
    return {"run_name": "tensorboard", "logging_dir": run.folder}


def _wandb(run: TrackedRun, identity: str) -> dict[str, Any]:
    os.environ.setdefault("WANDB_SILENT", "true")
    where = {"dir": str(run.folder), "mode": os.environ.get("WANDB_MODE", "offline")}
    return {"run_name": run.project, "name": run.name, "id": identity or None, "resume": "allow", **where}


def _mlflow(run: TrackedRun, identity: str) -> dict[str, Any]:
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    uri = os.environ.get("MLFLOW_TRACKING_URI", MLFLOW_FILE)
    if uri.endswith(MLFLOW_FILE):  # not set by the user, but here, by an earlier run of this process
        import mlflow  # type: ignore[import-not-found]

        mlflow.set_tracking_uri(f"sqlite:///{run.folder.resolve()}{MLFLOW_FILE}")
    return {"experiment_name": run.project, "run_name": run.name, "run_id": identity or None}


def _trackio(run: TrackedRun, identity: str) -> dict[str, Any]:
    return {"run_name": run.project, "name": run.name, "resume": "allow"}


_OPTIONS: Mapping[str, Callable[[TrackedRun, str], dict[str, Any]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
_IDENTITY: Mapping[str, Callable[[Any], str]] = {  # from the library's run, with what it is continued
    "tensorboard": lambda writer: "",
    "wandb": lambda run: run.id,
    "mlflow": lambda run: run.info.run_id,
    "trackio": lambda run: "",  # by its name
}


def _read_state(path: Path) -> dict[str, Any]:
    """Return the library's name of the run, the keys of the rows that it has, and what was there at the last close.

    ``closed`` is the number of these rows, and ``sessions`` the names of W&B's folders. All are empty for a new run.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        names = {key: [str(name) for name in state.get(key, ())] for key in ("logged", "sessions")}
        return {"id": str(state["id"]), "closed": int(state.get("closed", 0)), **names}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return {"id": "", "closed": 0, "logged": [], "sessions": []}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings with dotted keys. Lists become text."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat
