"""``colora client``: a site's trainer and its SuperNode, kept alive until somebody stops them."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ...common.config.loader import load_site
from ...common.config.site_schema import SiteSettings
from ...common.errors import ColoraError, ConfigError
from ...common.processes.health import sanitize
from ...common.processes.supervised import Command, Signals, SupervisedProcess, exclusive_lock, write_services
from .supernode import SuperNode

PULSE = 0.4  # seconds
MOST = 1 << 20  # bytes of a log at a time
UNIX = "unix:"
BAD_INPUT, REFUSALS = 2, 3  # the trainer's exit code for bad input, and how often it may say so
Component = Literal["trainer", "node"]
Print = Callable[[str], None]


def run_site(path: Path, log: Print, component: Component | None = None) -> None:
    """Runs a site's two processes, or one of them, until SIGTERM or SIGINT. Raises ConfigError, StateError."""
    site = load_site(path)
    state = Path(site.trainer.state)
    with exclusive_lock(
        state / ("client.lock" if component is None else f"client-{component}.lock"), f"client of site {site.name}"
    ):
        keepers: list[TrainerSupervisor | NodeSupervisor] = []
        if component != "node":
            keepers.append(TrainerSupervisor(path, site, log))
        if component != "trainer":
            keepers.append(NodeSupervisor(site, log))
        if component is None or site.trainer.listen.startswith(UNIX):  # a socket's two ends are one user's
            log("trainer and SuperNode run as one user: code that the coordinator ships could read this site's files")
        signals = Signals()
        try:
            while not signals.count:
                changed = [keeper.ensure_running() for keeper in keepers]
                if any(changed):
                    _tell(state / "services.json", keepers)
                time.sleep(PULSE)
        finally:
            for keeper in reversed(keepers):
                keeper.stop()


class TrainerRefused(ColoraError, RuntimeError):
    """The trainer ended with what is wrong as its last word."""

    def __init__(self, log: Path) -> None:
        words = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        super().__init__("trainer", "a site file that it can work with", words.removeprefix("colora: "))


class TrainerSupervisor:
    """The resident trainer: started again whenever it is gone."""

    def __init__(self, path: Path, site: SiteSettings, say: Print) -> None:
        log = Path(site.trainer.state) / "logs" / "trainer.log"
        command = (sys.executable, "-m", "colora.client.trainer_service.server", str(path.resolve()))
        self.child, self.site, self.say = SupervisedProcess(Command("trainer", command, log)), site, say
        self.refused = 0
        self.refusals = LogTail(log, re.compile(rf"site {re.escape(site.name)}: .*\ballow\.[a-z_]+.*"))

    def ensure_running(self) -> bool:
        """Starts it where it is due; True when it did. Says what the site's [allow] has refused."""
        for refusal in self.refusals.new():
            self.say(sanitize(f"refused: {refusal}"))
        if not self.child.due:
            return False
        self.refused = self.refused + 1 if self.child.ended_with(BAD_INPUT) else 0
        if self.refused == REFUSALS:
            raise TrainerRefused(self.child.command.log)
        if self.child.starts:
            self.say(f"the trainer ended: starting it again (see {self.child.command.log})")
        self.child.start()
        return True

    def stop(self) -> None:
        """Ends it; its state is safe at any moment."""
        self.child.stop(grace=5.0)

    def services(self) -> dict[str, object]:
        """Where it listens."""
        return {"trainer": self.site.trainer.listen}


class LogTail:
    """What is said anew in a growing file, from now on: the parts of its lines that match, and none twice in a row."""

    def __init__(self, path: Path, pattern: re.Pattern[str]) -> None:
        self.path, self.pattern = path, pattern
        self.place = path.stat().st_size if path.exists() else 0
        self.last = ""

    def new(self) -> list[str]:
        """Since the last time; whole lines only."""
        if not self.path.exists() or self.path.stat().st_size <= self.place:
            return []
        with self.path.open("rb") as file:
            file.seek(self.place)
            text, end, _ = file.read(MOST).rpartition(b"\n")
        self.place += len(text) + len(end)
        found = []
        for line in text.decode(errors="replace").splitlines():
            match = self.pattern.search(line)
            if match and match[0] != self.last:
                self.last = match[0]
                found.append(match[0])
        return found


class NodeSupervisor:
    """The SuperNode: started again whenever it is gone, or waits for what does not come."""

    def __init__(self, site: SiteSettings, say: Print) -> None:
        if site.coordinator is None:
            raise ConfigError("coordinator", "a table [coordinator] with address, ca and key", "none", site=site.name)
        self.node, self.site, self.say = SuperNode(site, site.coordinator), site, say
        self.told = ""
        self.connected = self.looked = False

    @property
    def child(self) -> SupervisedProcess:
        """Its process."""
        return self.node.child

    def ensure_running(self) -> bool:
        """Starts it where it is due; True when it did."""
        if self.child.running:
            if why := self.node.stuck_reason():
                self._tell(f"{why}: starting the SuperNode again")
                self.child.kill()
            elif self.node.connected and not self.connected:
                self.connected = True
                self._tell(f"site {self.site.name} is connected to {self.node.coordinator.address}")
            elif self.node.trying and not self.looked:
                self.looked = True
                if obstacle := self.node.connection_problem():
                    self._tell(f"no way to the coordinator: {obstacle}; trying again")
            return False
        if self.child.due:
            if self.child.starts and not self.child.killed:
                self._tell(f"the SuperNode ended: {self.node.reason()}; trying again")
            self.connected = self.looked = False
            self.node.start()
            return True
        return False

    def stop(self) -> None:
        """Ends it, which signs it off at the coordinator."""
        self.node.stop(grace=10.0)

    def services(self) -> dict[str, object]:
        """Where its health service listens."""
        return {"node_health": f"127.0.0.1:{self.node.health_port}"}

    def _tell(self, text: str) -> None:
        """Says what is new, and a standing trouble once."""
        if text != self.told:
            self.told = text
            self.say(text)


def _tell(path: Path, keepers: list[TrainerSupervisor | NodeSupervisor]) -> None:
    services: dict[str, object] = {}
    for keeper in keepers:
        services |= keeper.services()
    pids = {"client": os.getpid(), **{keeper.child.command.name: keeper.child.pid for keeper in keepers}}
    write_services(path, {**services, "pids": pids})
