"""Flower's SuperNode at a site: its command line, the messages in its log, and its registration at the coordinator."""

from __future__ import annotations

import json
import re
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import psutil

from ...common.atomic_io import write_atomically
from ...common.config.site_schema import CoordinatorSettings, SiteSettings
from ...common.flower_compat import TASK_POLL_INTERVAL
from ...common.json_files import parse_json
from ...common.processes.supervised import Command, SupervisedProcess, free_port
from ..flower_compat import CLIENT_APP, deactivate_node
from ..trainer_service.client import LINK, SITE, TRAINER

POLLING = {TASK_POLL_INTERVAL: "0.25"}  # seconds; how often SuperExec looks for a message to start a ClientApp for
COMMANDS = Path(__file__).with_name("bin")  # replacements for Flower's commands; first on the SuperNode's PATH
MAX_LOG_READ = 1 << 20  # bytes
NODE_ID = re.compile(rb"SuperNode ID: (\d+)")
RETRYING, KEY_IN_USE = b"Connection attempt failed", b"[code: 2004]"
REASONS = (  # a pattern in the SuperNode's log, and what it means
    (rb"key is not registered", "the coordinator does not know this site's key"),
    (
        re.escape(KEY_IN_USE),
        "another client uses this key, or the coordinator has not yet dropped a client that died (up to a minute)",
    ),
    (rb"CERTIFICATE_VERIFY_FAILED", "the coordinator's certificate is not signed by this site's CA"),
    (rb"WRONG_VERSION_NUMBER|record layer failure", "the coordinator does not use TLS at this address"),
    (rb"Unauthorized", "the coordinator does not accept this site's key"),
    (rb"already in use", "one of its ports was in use"),
    (rb"does not recognize this SuperNode", "the coordinator no longer knows this SuperNode"),
)


@dataclass(frozen=True)
class NodeLease:
    """The process that is registered at the coordinator as this site."""

    node: int  # Flower's node id
    pid: int
    began: float  # creation time of the process, seconds since 1970
    host: str
    boot: str  # the machine's boot id


class SuperNode:
    """A ``flower-supernode`` process. Its ClientApps find the trainer through environment variables."""

    def __init__(self, site: SiteSettings, coordinator: CoordinatorSettings) -> None:
        state = Path(site.trainer.state)
        self.site, self.coordinator, self.home = site, coordinator, state / "flower"
        self.log, self.lease_file = state / "logs" / "supernode.log", state / "node.json"
        self.child = SupervisedProcess(self._command())
        self._log_start = 0  # where the log of the current process begins, in bytes

    def _command(self) -> Command:
        """Build the command with two free ports, new for every start because another process may have taken them."""
        self.port, self.health_port = free_port(), free_port()
        site, coordinator = self.site, self.coordinator
        arguments = ["--superlink", coordinator.address, "--port", str(self.port)]
        arguments += ["--health-server-address", f"127.0.0.1:{self.health_port}"]
        if coordinator.insecure:
            arguments += ["--insecure"]
        else:
            arguments += ["--root-certificates", coordinator.ca, "--auth-supernode-private-key", coordinator.key]
        trainer = {TRAINER: site.trainer.listen, LINK: site.trainer.link, SITE: site.name}
        environment = {**POLLING, **trainer, "FLWR_HOME": str(self.home)}
        command = (sys.executable, str(COMMANDS / "flower-supernode"), *arguments)
        return Command("supernode", command, self.log, environment, COMMANDS)

    def start(self) -> None:
        """Start the process. A dead process that is still registered is deactivated first."""
        lease = self._read_lease()
        if lease and lease.pid == self.child.pid and _is_dead(lease) and KEY_IN_USE in self.log_text():
            # the key is in use, possibly by another client: wait for the coordinator's timeout, deactivate nothing
            self.lease_file.unlink()
        node = self.deactivate_stale_node()
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self.child.command = self._command()
        self.child.start()
        if node is not None:  # a key keeps its node id; written now, as this process may die before it connects
            self._write_lease(node)

    def stop(self, grace: float) -> None:
        """Stop the process within ``grace`` seconds. One that exits by itself deactivates its node."""
        self.child.stop(grace)
        if self.child.ended_with(0) and NODE_ID.search(self.log_text()):
            self.lease_file.unlink(missing_ok=True)

    def stuck_reason(self) -> str:
        """Update the lease; return why the running process must be restarted, or an empty string."""
        if not self.child.running:
            return ""
        lease, connection = self._read_lease(), NODE_ID.search(self.log_text())
        if connection and (lease is None or (lease.node, lease.pid) != (int(connection[1]), self.child.pid)):
            self._write_lease(int(connection[1]))
        if self.child.crashed(CLIENT_APP):  # the SuperNode would wait for it
            return "a ClientApp was killed"
        return ""

    def log_text(self) -> bytes:
        """Return what the current process has written to its log."""
        if not self.log.exists():
            return b""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read(MAX_LOG_READ)

    @property
    def connected(self) -> bool:
        """Whether the coordinator has accepted the connection."""
        return self.child.running and NODE_ID.search(self.log_text()) is not None

    @property
    def is_retrying(self) -> bool:
        """Whether it cannot reach the coordinator and keeps trying."""
        return self.child.running and not self.connected and RETRYING in self.log_text()

    def connection_problem(self) -> str:
        """Return why the coordinator cannot be reached, as far as this side can see, or an empty string."""
        from .checks.credentials import check_coordinator
        from .checks.result import CheckFailed

        try:
            check_coordinator(self.coordinator)
        except CheckFailed as failure:
            return str(failure)
        return ""

    def exit_reason(self) -> str:
        """Return why the process ended, by its log, or by what the coordinator answers now."""
        log = self.log_text()
        known = (meaning for pattern, meaning in REASONS if re.search(pattern, log))
        return next(known, "") or self.connection_problem() or f"see {self.log}"

    def deactivate_stale_node(self) -> int | None:
        """Deactivate the recorded node at the coordinator, so that a new SuperNode can connect at once.

        Without this the coordinator keeps the node for 60 s. Only a process of this machine that is known to be dead
        is deactivated. Returns the node id when that succeeded.
        """
        lease = self._read_lease()
        if lease is None or self.coordinator.insecure or not _is_dead(lease):
            return None
        try:
            _deactivate(self.coordinator, lease.node)
        except Exception:  # of any kind: the coordinator drops the node by itself later
            return None
        return lease.node

    def _write_lease(self, node: int) -> None:
        """Record that the current process holds, or will soon hold, this node id."""
        try:
            began = psutil.Process(self.child.pid).create_time()
        except psutil.NoSuchProcess:
            return
        lease = NodeLease(node, self.child.pid or 0, began, socket.gethostname(), _boot_id())
        write_atomically(self.lease_file, json.dumps(asdict(lease)).encode(), lasting=False)

    def _read_lease(self) -> NodeLease | None:
        try:
            return NodeLease(**parse_json(self.lease_file.read_bytes(), _is_lease))
        except (OSError, ValueError):
            return None


def _is_lease(value: Any) -> bool:
    """Whether parsed JSON has the fields of a ``NodeLease``, with their types."""
    hints = get_type_hints(NodeLease)
    return isinstance(value, dict) and value.keys() == hints.keys() and all(type(value[k]) is hints[k] for k in hints)


def _boot_id() -> str:
    """Return the id of the machine's current boot, or an empty string where it is unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _is_dead(lease: NodeLease) -> bool:
    """Whether the process is known to be dead. A process of another machine is not."""
    if lease.host != socket.gethostname():
        return False
    if lease.boot != _boot_id():
        return True
    try:
        process = psutil.Process(lease.pid)
        return process.create_time() != lease.began or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _deactivate(coordinator: CoordinatorSettings, node: int) -> None:
    deactivate_node(coordinator.address, coordinator.ca, Path(coordinator.key), node)
