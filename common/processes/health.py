"""Health of the processes and services that a command has started.

``services.json`` lists their addresses and pids; pids are checked with psutil and addresses with gRPC health checks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console

from ..foreign_text import sanitize
from ..json_files import read_json

FILE = "services.json"
MAX_PID = 2**31 - 1
WRITTEN_AGAIN = "Delete it: the next start of colora writes it again."
PATIENCE = 2.0  # timeout of one health check in seconds
CLOCK = 2.0  # tolerance between the time of a file and the start time of a process, in seconds
HealthState = Literal["serving", "not serving", "down"]


@dataclass(frozen=True)
class ServiceStatus:
    """A service and the result of its health check."""

    name: str
    address: str
    state: HealthState


@dataclass(frozen=True)
class ProcessStatus:
    """A process that a command has started."""

    name: str
    pid: int | None
    alive: bool


@dataclass(frozen=True)
class ServiceRecord:
    """Content of ``services.json``: addresses and pids by name. ``written`` is its time in seconds since 1970."""

    addresses: Mapping[str, str]
    pids: Mapping[str, int | None]
    written: float

    def processes(self) -> tuple[ProcessStatus, ...]:
        """Check the pids. A process that started after the file was written has reused the pid of a dead one."""
        return tuple(ProcessStatus(name, pid, _alive(pid, self.written)) for name, pid in self.pids.items())


def read_services(folder: Path) -> ServiceRecord | None:
    """Read ``services.json`` in a folder; None without such a file. Raises StateError if it cannot be read."""
    path = folder / FILE
    try:
        if not path.exists():
            return None
        raw = read_json(path, _is_record, "an address for each service and a pid for each process", WRITTEN_AGAIN)
        pids = raw.pop("pids", {})
        return ServiceRecord(raw, pids, path.stat().st_mtime)
    except FileNotFoundError:  # deleted in this moment
        return None


def _is_record(raw: Any) -> bool:
    if not isinstance(raw, dict) or not isinstance(pids := raw.get("pids", {}), dict):
        return False
    addresses = (address for name, address in raw.items() if name != "pids")
    return all(isinstance(address, str) for address in addresses) and all(map(_is_pid, pids.values()))


def _is_pid(pid: Any) -> bool:
    return pid is None or (type(pid) is int and 0 <= pid <= MAX_PID)


def grpc_health(address: str, channel: Callable[[], grpc.Channel] | None = None) -> HealthState:
    """Ask the gRPC health service at an address. ``channel`` opens the channel where plain gRPC does not work."""

    def plain() -> grpc.Channel:
        return grpc.insecure_channel(connectable_address(address), [("grpc.enable_http_proxy", 0)])

    try:
        with (channel or plain)() as opened:
            stub: Any = health_pb2_grpc.HealthStub(opened)
            status = stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE).status
    except grpc.RpcError:
        return "down"
    return "serving" if status == health_pb2.HealthCheckResponse.SERVING else "not serving"


def connectable_address(address: str) -> str:
    """Return the address at which this machine reaches a listener: loopback for one that listens on all interfaces."""
    for wildcard in ("0.0.0.0:", "[::]:"):
        if address.startswith(wildcard):
            return f"127.0.0.1:{address.removeprefix(wildcard)}"
    return address


def format_age(seconds: float | None) -> str:
    """Format an elapsed time for a table, as in "5 min ago"; None is "never"."""
    if seconds is None:
        return "never"
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{max(0, seconds) / unit:.0f} {name} ago"
    return f"{seconds / 86400:.0f} days ago"


def show_services(
    services: Sequence[ServiceStatus], processes: Sequence[ProcessStatus], problems: Sequence[str], console: Console
) -> None:
    """Print one line for the services, one for the processes, and one for each problem."""
    addresses = [f"{s.name} {s.state} at {s.address}" for s in services]
    pids = [f"{p.name} {p.pid or ''} {'alive' if p.alive else 'gone'}" for p in processes]
    for name, entries in (("services", addresses), ("processes", pids)):
        if entries:
            console.print(sanitize(f"{name}: {', '.join(entries)}"), highlight=False, soft_wrap=True)
    for problem in problems:
        console.print(sanitize(f"! {problem}"), style="red", highlight=False, soft_wrap=True)


def _alive(pid: int | None, written: float) -> bool:
    try:
        process = psutil.Process(pid) if pid else None
        if process is None or process.status() == psutil.STATUS_ZOMBIE:
            return False
        return process.create_time() <= written + CLOCK
    except psutil.Error:
        return False
