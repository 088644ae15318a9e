"""A coordinator and three sites as real processes on loopback, with TLS and keys, started by colora's commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w
from safetensors import safe_open

from colora.common.event_log import Event
from colora.common.processes.supervised import free_port
from colora.server.deployment.provisioning.provision import provision
from colora.server.reporting.events import read_events

ROOT = Path(__file__).resolve().parents[2]
COLORA = [sys.executable, "-m", "colora"]
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COVERAGE_PROCESS_START": ""}


@dataclass
class Town:
    """A coordinator and its sites: folders and commands. ``tend`` restarts killed commands like a service manager."""

    folder: Path
    recipe: dict[str, Any]
    port: int = field(default_factory=free_port)
    home: Path = ROOT  # where the commands are started
    options: tuple[str, ...] = ()  # of colora server
    out: str = "run"  # the run folder's name
    commands: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    started: list[int] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [site["name"] for site in self.recipe["site"]]

    @property
    def run(self) -> Path:
        return self.folder / self.out

    def build(self) -> Town:
        """Recipe, keys and site files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.toml").write_text(tomli_w.dumps(self.recipe))
        sites = [{"name": name} for name in self.names]
        plan = {"coordinator": {"address": f"127.0.0.1:{self.port}"}, "site": sites}
        (self.folder / "sites.toml").write_text(tomli_w.dumps(plan))
        provision(self.folder / "sites.toml", self.folder / "keys")
        for site in self.recipe["site"]:
            data = {key: site[key] for key in ("source", "test_source")}
            self.write_site(site["name"], data=data, trainer={"threads": 1, "seeds": "recipe"})
        return self

    def write_site(self, name: str, **tables: Any) -> Path:
        path = self.site(name) / "site.toml"
        coordinator = {"address": f"127.0.0.1:{self.port}"}
        path.write_text(tomli_w.dumps({"name": name, "coordinator": coordinator, **tables}))
        return path

    def site(self, name: str) -> Path:
        return self.folder / "keys" / "sites" / name

    def state(self, name: str) -> Path:
        return self.site(name) / "state" / self.recipe["name"]

    # --- processes --------------------------------------------------------------------------------------------------

    def start(self, *names: str) -> None:
        for name in names or ("server", *self.names):
            words = self.server_words() if name == "server" else ["client", str(self.site(name) / "site.toml")]
            with (self.folder / f"{name}.out").open("ab") as out:
                self.commands[name] = subprocess.Popen(
                    [*COLORA, *words], cwd=self.home, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **QUIET}
                )
            self.started.append(self.commands[name].pid)

    def server_words(self) -> list[str]:
        keys = ["--keys", str(self.folder / "keys" / "coordinator")]
        place = ["--host", "127.0.0.1", "--port", str(self.port), "--out", str(self.run)]
        return ["server", str(self.folder / "recipe.toml"), *keys, *place, *self.options]

    def tend(self) -> None:
        """Restart the commands that were killed."""
        for name, command in self.commands.items():
            if command.poll() is not None and command.returncode < 0:
                self.start(name)

    def wait(self, name: str, seconds: float) -> int:
        """Wait until a command exits; meanwhile, restart killed commands."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            self.tend()
            if (code := self.commands[name].poll()) is not None:
                return code
            time.sleep(0.2)
        raise AssertionError(f"{name} did not end within {seconds:g} s:\n{self.said(name)}")

    def stop(self) -> None:
        for command in self.commands.values():
            if command.poll() is None:
                command.send_signal(signal.SIGTERM)
        for command in self.commands.values():
            try:
                command.wait(20)
            except subprocess.TimeoutExpired:
                command.kill()

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text(errors="replace")

    def last_words(self) -> str:
        """Return the output of the commands, and the ends of their processes' logs."""
        told = [f"{name}: {self.said(name)}" for name in self.commands]
        logs = [
            path
            for pattern in ("run/logs/*.log", "keys/sites/*/state/logs/*.log")
            for path in self.folder.glob(pattern)
        ]
        return "\n".join(told + [f"{path}: {path.read_text(errors='replace')[-3000:]}" for path in logs])

    def below(self, name: str, process: str) -> list[psutil.Process]:
        """Return the running child processes of a command with this name."""
        try:
            family = psutil.Process(self.commands[name].pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [p for p in family if is_called(p, process)]

    def orphans(self) -> list[psutil.Process]:
        """Return the running processes whose command line contains this folder or port."""
        marks = (str(self.folder), f"127.0.0.1:{self.port}")
        return [p for p in psutil.process_iter() if any(mark in " ".join(words_of(p)) for mark in marks)]

    # --- results ----------------------------------------------------------------------------------------------

    def events(self, kind: str | None = None) -> list[Event]:
        events = read_events(self.run / "events.jsonl")
        return [event for event in events if kind in (None, event["event"])]

    def wait_for(self, kind: str, seconds: float, **fields: Any) -> Event:
        """Return the first event of a kind with these fields, waiting for it if necessary."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            for event in self.events(kind):
                if all(event.get(key) == value for key, value in fields.items()):
                    return event
            time.sleep(0.1)
        raise AssertionError(f"no {kind} {fields} within {seconds:g} s:\n{self.said('server')}\n{self.events()[-5:]}")

    def outcome(self) -> dict[str, bytes]:
        """Return every array of the last checkpoint and of the sites' last states, as bytes by name."""
        found = tensors(last(self.run / "checkpoints"), "server")
        for name in self.names:
            found |= tensors(last(self.state(name)), name)
        return found


def simulated_outcome(run: Path, names: list[str]) -> dict[str, bytes]:
    """Return the same for a simulation's run folder."""
    found = tensors(last(run / "checkpoints"), "server")
    for name in names:
        found |= tensors(last(run / "sites" / name / "state"), name)
    return found


def last(folder: Path) -> Path:
    return sorted(folder.glob("round-*.safetensors"))[-1]


def tensors(path: Path, owner: str) -> dict[str, bytes]:
    """Return the arrays, and the metadata without durations, which differ between runs."""
    with safe_open(path, "numpy") as file:
        found = {f"{owner}/{path.stem}/{key}": file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118
        notes = json.loads(file.metadata()["colora"].partition("\n")[2])  # after the checksum
    for duration in ("seconds", "measuring"):
        notes.get("reply", {}).pop(duration, None)
    return {**found, f"{owner}/{path.stem}/notes": json.dumps(notes, sort_keys=True).encode()}


def is_called(process: psutil.Process, name: str) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return any(name in word for word in process.cmdline()[:4])
    except psutil.Error:
        return False


def words_of(process: psutil.Process) -> list[str]:
    try:
        return [] if process.status() == psutil.STATUS_ZOMBIE else process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a path short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="town-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def town(place: Path, tiny_recipe: dict) -> Iterator[Town]:
    """Three sites, with a server optimizer and persistent optimizer states, so that every kind of state is in use."""
    tiny_recipe["rounds"] = 3
    tiny_recipe["train"] |= {"final_steps": 2, "persist_optimizer_state": True}
    tiny_recipe["server"] |= {"optimizer": "adam"}
    tiny_recipe["private"] = "multilora"
    town = Town(place / "town", tiny_recipe).build()
    yield town
    town.stop()
    left = town.orphans()
    for process in left:
        process.kill()
