"""Flower's SuperNode as a site uses it: its command, what its log says, and how a dead one is signed off."""

from __future__ import annotations

import json
import re
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ...common.atomic_io import write_atomically
from ...common.config.site_schema import CoordinatorSettings, SiteSettings
from ...common.flower_compat import TASK_POLL_INTERVAL
from ...common.processes.supervised import Command, SupervisedProcess, free_port
from ..flower_compat import CLIENT_APP, deactivate_node
from ..trainer_service.client import LINK, SITE, TRAINER

POLLING = {TASK_POLL_INTERVAL: "0.25"}  # seconds between a message and its ClientApp
COMMANDS = Path(__file__).with_name("bin")  # ours of Flower's names, which SuperNode's SuperExec finds first
NODE_ID = re.compile(rb"SuperNode ID: (\d+)")
RETRYING, HELD = b"Connection attempt failed", b"[code: 2004]"
REASONS = (  # what SuperNode's log says, and what it means
    (rb"key is not registered", "the coordinator does not know this site's key"),
    (re.escape(HELD), "another client with this key is at work, or one that died is not forgotten yet (a minute)"),
    (rb"CERTIFICATE_VERIFY_FAILED", "the coordinator's certificate is not signed by this site's CA"),
    (rb"WRONG_VERSION_NUMBER|record layer failure", "the coordinator does not speak TLS at this address"),
    (rb"Unauthorized", "the coordinator does not accept this site's key"),
    (rb"already in use", "a port of its own was taken"),
    (rb"does not recognize this SuperNode", "the coordinator has forgotten it"),
)


@dataclass(frozen=True)
class NodeLease:
    """Which process holds the site's place at the coordinator."""

    node: int
    pid: int
    began: float
    host: str
    boot: str


class SuperNode:
    """A ``flower-supernode`` whose ClientApps find the trainer by their environment."""

    def __init__(self, site: SiteSettings, coordinator: CoordinatorSettings) -> None:
        state = Path(site.trainer.state)
        self.site, self.coordinator, self.home = site, coordinator, state / "flower"
        self.log, self.record = state / "logs" / "supernode.log", state / "node.json"
        self.child = SupervisedProcess(self._command())
        self._read_from = 0

    def _command(self) -> Command:
        """With ports that are free now: of the last start's, one may be somebody else's."""
        self.port, self.health_port = free_port(), free_port()
        site, coordinator = self.site, self.coordinator
        arguments = ["--superlink", coordinator.address, "--port", str(self.port)]
        arguments += ["--health-server-address", f"127.0.0.1:{self.health_port}"]
        if coordinator.insecure:
            arguments += ["--insecure"]
        else:
            arguments += ["--root-certificates", coordinator.ca, "--auth-supernode-private-key", coordinator.key]
        where = {TRAINER: site.trainer.listen, LINK: site.trainer.link, SITE: site.name}
        environment = {**POLLING, **where, "FLWR_HOME": str(self.home)}
        command = (sys.executable, str(COMMANDS / "flower-supernode"), *arguments)
        return Command("supernode", command, self.log, environment, COMMANDS)

    def start(self) -> None:
        """Starts it, after signing off the one before where that is surely dead."""
        if (last := self._last()) and last.pid == self.child.pid and _dead(last) and HELD in self.log_text():
            self.record.unlink()  # held, perhaps by another: better a minute's wait than to sign that one off
        node = self.deactivate_stale_node()
        self._read_from = self.log.stat().st_size if self.log.exists() else 0
        self.child.command = self._command()
        self.child.start()
        if node is not None:  # a key's number stays: known before this one is connected, as it may be killed by then
            self._note(node)

    def stop(self, grace: float) -> None:
        """Ends it; one that was connected and ended by itself has signed itself off."""
        self.child.stop(grace)
        if self.child.ended_with(0) and NODE_ID.search(self.log_text()):
            self.record.unlink(missing_ok=True)

    def stuck_reason(self) -> str:
        """Keeps the record of who is there; says why it must be started again although it runs, or nothing."""
        if not self.child.running:
            return ""
        last, found = self._last(), NODE_ID.search(self.log_text())
        if found and (last is None or (last.node, last.pid) != (int(found[1]), self.child.pid)):
            self._note(int(found[1]))
        if self.child.crashed(CLIENT_APP):  # SuperNode would wait for it
            return "a ClientApp was killed"
        return ""

    def log_text(self) -> bytes:
        """What it wrote to its log since it was started."""
        if not self.log.exists():
            return b""
        with self.log.open("rb") as file:
            file.seek(self._read_from)
            return file.read(1 << 20)

    @property
    def connected(self) -> bool:
        """Whether the coordinator has taken it in."""
        return self.child.running and NODE_ID.search(self.log_text()) is not None

    @property
    def trying(self) -> bool:
        """Whether it has not come through to the coordinator and tries again, which it does without an end."""
        return self.child.running and not self.connected and RETRYING in self.log_text()

    def connection_problem(self) -> str:
        """What is in the way, as far as can be seen from here; empty where the coordinator answers as it should."""
        from .checks.credentials import check_coordinator
        from .checks.result import CheckFailed

        try:
            check_coordinator(self.coordinator)
        except CheckFailed as wrong:
            return str(wrong)
        return ""

    def reason(self) -> str:
        """Why it ended, in words."""
        said = self.log_text()
        known = (words for pattern, words in REASONS if re.search(pattern, said))
        return next(known, f"see {self.log}")

    def deactivate_stale_node(self) -> int | None:
        """Tells the coordinator that the recorded SuperNode is gone, so that the next one may come at once.

        Without it the coordinator keeps the place for 60 s. Only for a process of this machine that is surely dead: of
        any other one nobody here can know that. Returns the place's number where it is free now.
        """
        record = self._last()
        if record is None or self.coordinator.insecure or not _dead(record):
            return None
        try:
            _deactivate(self.coordinator, record.node)
        except Exception:  # whatever it is, the coordinator forgets the old one by itself after a while
            return None
        return record.node

    def _note(self, node: int) -> None:
        """Writes down that the process just started holds, or is about to hold, this place."""
        try:
            began = psutil.Process(self.child.pid).create_time()
        except psutil.NoSuchProcess:
            return
        record = NodeLease(node, self.child.pid or 0, began, socket.gethostname(), _boot())
        write_atomically(self.record, json.dumps(asdict(record)).encode(), lasting=False)

    def _last(self) -> NodeLease | None:
        try:
            return NodeLease(**json.loads(self.record.read_text()))
        except (OSError, ValueError, TypeError):
            return None


def _boot() -> str:
    """This start of this machine; empty where it cannot be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _dead(record: NodeLease) -> bool:
    if record.host != socket.gethostname():
        return False
    if record.boot != _boot():
        return True
    try:
        process = psutil.Process(record.pid)
        return process.create_time() != record.began or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _deactivate(coordinator: CoordinatorSettings, node: int) -> None:
    """Flower's own sign-off, signed by the site's key (no public API of Flower's does it)."""
    deactivate_node(coordinator.address, coordinator.ca, Path(coordinator.key), node)
