"""Whether what a command has started is there: ``services.json`` as the commands write it, pids, health services."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.markup import escape

from ..errors import StateError

FILE = "services.json"
PATIENCE = 2.0  # seconds for one answer
CLOCK = 2.0  # seconds that a file's time and a process's may be apart
HealthState = Literal["serving", "not serving", "down"]


@dataclass(frozen=True)
class ServiceStatus:
    """Something that listens, and what it said of itself just now."""

    name: str
    address: str
    state: HealthState


@dataclass(frozen=True)
class ProcessStatus:
    """Something that a command has started."""

    name: str
    pid: int | None
    alive: bool


@dataclass(frozen=True)
class ServiceRecord:
    """What ``services.json`` says: addresses by name and pids by name, as of ``written`` (seconds since 1970)."""

    addresses: Mapping[str, str]
    pids: Mapping[str, int | None]
    written: float

    def processes(self) -> tuple[ProcessStatus, ...]:
        """The pids, looked at. A process that began after the file was written has inherited a dead one's number."""
        return tuple(ProcessStatus(name, pid, _alive(pid, self.written)) for name, pid in self.pids.items())


def read_services(folder: Path) -> ServiceRecord | None:
    """None where no command has written one. Raises StateError when it cannot be read."""
    path = folder / FILE
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        pids = {str(name): pid for name, pid in raw.pop("pids", {}).items()}
        return ServiceRecord({name: str(address) for name, address in raw.items()}, pids, path.stat().st_mtime)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise StateError(str(path), "the services of a command", error) from None


def grpc_health(address: str, channel: Callable[[], grpc.Channel] | None = None) -> HealthState:
    """What the gRPC health service there says, by ``channel`` where plain gRPC to the address is not the way."""
    try:
        with (
            channel or (lambda: grpc.insecure_channel(connectable_address(address), [("grpc.enable_http_proxy", 0)]))
        )() as way:
            stub: Any = health_pb2_grpc.HealthStub(way)
            said = stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE).status
    except grpc.RpcError:
        return "down"
    return "serving" if said == health_pb2.HealthCheckResponse.SERVING else "not serving"


def connectable_address(address: str) -> str:
    """How this machine reaches what listens at an address: one that means all interfaces is no goal."""
    for everywhere in ("0.0.0.0:", "[::]:"):
        if address.startswith(everywhere):
            return f"127.0.0.1:{address.removeprefix(everywhere)}"
    return address


def format_age(seconds: float | None) -> str:
    """A time that has passed, in words short enough for a table."""
    if seconds is None:
        return "never"
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{max(0, seconds) / unit:.0f} {name} ago"
    return f"{seconds / 86400:.0f} days ago"


def sanitize(text: str) -> str:
    """Text of others for a terminal: no markup and no control characters that would steer it."""
    return escape("".join(letter if letter.isprintable() else " " for letter in text))


def show_services(
    services: Sequence[ServiceStatus], processes: Sequence[ProcessStatus], problems: Sequence[str], console: Console
) -> None:
    """One line each for services, processes and every problem."""
    parts = [f"{s.name} {s.state} at {s.address}" for s in services]
    pids = [f"{p.name} {p.pid or ''} {'alive' if p.alive else 'gone'}" for p in processes]
    for name, told in (("services", parts), ("processes", pids)):
        if told:
            console.print(f"{name}: {', '.join(told)}", highlight=False, markup=False, soft_wrap=True)
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
