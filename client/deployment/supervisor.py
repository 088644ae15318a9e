"""``colora client``: runs a site's trainer and SuperNode, and restarts them when they fail."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from ...common.config.loader import load_site
from ...common.config.site_schema import SiteSettings
from ...common.errors import ColoraError, ConfigError, DataError, StateError
from ...common.foreign_text import sanitize
from ...common.models.saved import FILES
from ...common.processes.log_tail import LogTail
from ...common.processes.supervised import Command, Signals, SupervisedProcess, exclusive_lock, write_services
from ...common.prometheus import serve_metrics
from ..data.early_check import check_sources
from ..trainer_service.site_report import END, SHOWN
from .site_metrics import site_metrics
from .supernode import SuperNode

POLL_INTERVAL = 0.4  # seconds
UNIX = "unix:"
BAD_INPUT = 2  # the trainer's exit code for bad input
MAX_BAD_STARTS = 3  # consecutive exits with that code before the command gives up
Component = Literal["trainer", "supernode"]
Print = Callable[[str], None]


def run_site(path: Path, log: Print, component: Component | None = None, metrics_port: int | None = None) -> None:
    """Run a site's two processes, or one of them, until SIGTERM or SIGINT.

    ``metrics_port`` serves the site's metrics for Prometheus, on the loopback interface.

    Raises ConfigError, DataError or StateError for an unusable site file, source, key or state folder, TrainerRefused
    when the trainer cannot start.
    """
    site = load_site(path)
    state = Path(site.trainer.state)
    _check_at_once(site, log, component)
    lock = state / ("client.lock" if component is None else f"client-{component}.lock")
    with exclusive_lock(lock, f"client of site {site.name}"):
        supervisors: list[TrainerSupervisor | NodeSupervisor] = []
        trainer = None if component == "supernode" else TrainerSupervisor(path, site, log)
        if trainer:
            supervisors.append(trainer)
        if component != "trainer":
            supervisors.append(NodeSupervisor(site, log, trainer))
        if component is None or site.trainer.listen.startswith(UNIX):  # both ends of a socket belong to one user
            log("trainer and SuperNode run as one user: code from the coordinator could read this site's files")
        if metrics_port is not None:
            port = serve_metrics(metrics_port, site_metrics(state, lambda: _starts(supervisors)))
            log(f"metrics: http://127.0.0.1:{port}/metrics")
        signals = Signals()
        try:
            while not signals.count:
                changed = [supervisor.ensure_running() for supervisor in supervisors]
                if any(changed):
                    _write_services(state / "services.json", supervisors)
                time.sleep(POLL_INTERVAL)
        finally:
            for supervisor in reversed(supervisors):
                supervisor.stop()


def _starts(supervisors: Sequence[TrainerSupervisor | NodeSupervisor]) -> dict[str, int]:
    """How often each process was started."""
    return {supervisor.child.command.name: supervisor.child.starts for supervisor in supervisors}


def _check_at_once(site: SiteSettings, log: Print, component: Component | None) -> None:
    """Check what needs neither torch nor a network: sources and their columns, key and CA.

    Raises DataError or StateError. A site with a state of an earlier federation may be without its rows, as a transfer
    does not read them: it gets a line on the terminal.
    """
    if component != "supernode":
        try:
            check_sources(site.data, site.name)
        except DataError as error:
            if not any(Path(site.trainer.state).glob(f"*/{FILES}")):
                raise
            log(sanitize(str(error)))
    if component != "trainer" and site.coordinator and not site.coordinator.insecure:
        for key in ("key", "ca"):
            path = Path(getattr(site.coordinator, key))
            try:
                path.read_bytes()
            except OSError as error:
                message = f"coordinator.{key}: {path} cannot be read: {error.strerror}."
                hint = "colora provision writes this file for each site."
                raise StateError(
                    f"coordinator.{key}", "a readable file", path, site=site.name, message=message, hint=hint
                ) from None


class TrainerRefused(ColoraError, RuntimeError):
    """The trainer rejected its site file or cannot use this machine. The text is the last line of its log."""

    def __init__(self, log: Path) -> None:
        line = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2].removeprefix("colora: ")
        message = f"The trainer cannot start: {line}"
        super().__init__("trainer", "a usable site file", line, message=message)


class TrainerSupervisor:
    """Keeps the trainer running."""

    def __init__(self, path: Path, site: SiteSettings, log: Print) -> None:
        log_file = Path(site.trainer.state) / "logs" / "trainer.log"
        command = (sys.executable, "-m", "colora.client.trainer_service.server", str(path.resolve()))
        self.child, self.site, self.log = SupervisedProcess(Command("trainer", command, log_file)), site, log
        self.bad_starts = 0
        self.federation_ended = False  # and no other has begun
        self.reports = LogTail(log_file, SHOWN)

    def ensure_running(self) -> bool:
        """Start the trainer when it is due; return whether it was started. Prints what its log tells the site.

        Raises TrainerRefused after ``MAX_BAD_STARTS`` exits because of bad input.
        """
        for report in self.reports.new():
            self.federation_ended = END in report["text"]
            self.log(sanitize(report["text"]))
        if not self.child.due:
            return False
        self.bad_starts = self.bad_starts + 1 if self.child.ended_with(BAD_INPUT) else 0
        if self.bad_starts == MAX_BAD_STARTS:
            raise TrainerRefused(self.child.command.log)
        if self.child.starts:
            self.log(f"the trainer ended: restarting it (see {self.child.command.log})")
        self.child.start()
        return True

    def stop(self) -> None:
        """Stop the trainer. Its state on disk is consistent at any moment."""
        self.child.stop(grace=5.0)

    def services(self) -> dict[str, object]:
        """Return the trainer's address, for ``services.json``."""
        return {"trainer": self.site.trainer.listen}


class NodeSupervisor:
    """Keeps the SuperNode running, and restarts it when it is stuck.

    Between two federations, of which ``trainer`` tells, a coordinator that cannot be reached is not reported.
    """

    def __init__(self, site: SiteSettings, log: Print, trainer: TrainerSupervisor | None = None) -> None:
        if site.coordinator is None:
            raise ConfigError(
                "coordinator",
                "a table [coordinator] with address, ca and key",
                "none",
                site=site.name,
                message="The site file has no table [coordinator].",
                hint="Add one with address, ca and key.",
            )
        self.node, self.site, self.log = SuperNode(site, site.coordinator), site, log
        self.trainer, self.last_message = trainer, ""
        self.reported_connected = self.checked_connection = False

    @property
    def child(self) -> SupervisedProcess:
        """The SuperNode's process."""
        return self.node.child

    def ensure_running(self) -> bool:
        """Start the SuperNode when it is due; return whether it was started."""
        if self.child.running:
            self._check_running()
            return False
        if not self.child.due:
            return False
        if self.child.starts and not self.child.killed and not self._between_federations:
            self._report(f"no connection to the coordinator: {self.node.exit_reason()}; retrying")
        self.reported_connected = self.checked_connection = False
        self.node.start()
        return True

    def _check_running(self) -> None:
        """Kill a stuck SuperNode; report a new connection or the reason why there is none."""
        if reason := self.node.stuck_reason():
            self._report(f"{reason}: restarting the SuperNode")
            self.child.kill()
        elif self.node.connected and not self.reported_connected:
            self.reported_connected = True
            self._report(f"site {self.site.name} is connected to {self.node.coordinator.address}")
        elif self.node.is_retrying and not self.checked_connection and not self._between_federations:
            self.checked_connection = True
            if problem := self.node.connection_problem():
                self._report(f"cannot reach the coordinator: {problem}; retrying")

    @property
    def _between_federations(self) -> bool:
        """Whether the last federation has ended, after which a coordinator usually stops."""
        return self.trainer is not None and self.trainer.federation_ended

    def stop(self) -> None:
        """Stop the SuperNode, which deactivates it at the coordinator."""
        self.node.stop(grace=10.0)

    def services(self) -> dict[str, object]:
        """Return the address of its health service, for ``services.json``."""
        return {"supernode_health": f"127.0.0.1:{self.node.health_port}"}

    def _report(self, text: str) -> None:
        """Print a message unless it repeats the last one."""
        if text != self.last_message:
            self.last_message = text
            self.log(text)


def _write_services(path: Path, supervisors: list[TrainerSupervisor | NodeSupervisor]) -> None:
    services: dict[str, object] = {}
    for supervisor in supervisors:
        services |= supervisor.services()
    pids = {"client": os.getpid(), **{each.child.command.name: each.child.pid for each in supervisors}}
    write_services(path, {**services, "pids": pids})
