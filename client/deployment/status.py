"""How a site stands, from its state folder and its services.

As JSON (``colora status site.toml --json``; keys are only ever added, times are seconds, unknown is null)::

    {"kind": "site", "version": 1, "folder": the state folder, "site", "coordinator",
     "healthy": bool, "problems": [words],
     "federations": [{"federation", "round": of the newest state, "age": since it was written,
                      "audit": null | the last line of the audit log as it stands there}],
     "services": [{"name", "address", "state": "serving" | "not serving" | "down"}],
     "processes": [{"name", "pid", "alive"}]}
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ...common.config.loader import load_site
from ...common.config.site_schema import SiteSettings
from ...common.errors import ColoraError
from ...common.processes.health import (
    ProcessStatus,
    ServiceRecord,
    ServiceStatus,
    connectable_address,
    format_age,
    grpc_health,
    read_services,
    sanitize,
    show_services,
)
from ..trainer_service.audit_log import FILE as AUDIT
from ..trainer_service.client import TrainerClient

TAIL = 1 << 20  # bytes of an audit log that hold its last line
STATES = "round-*.safetensors"


@dataclass(frozen=True)
class FederationStatus:
    """A federation that the site takes part in: the round of its newest state, and the last thing that left."""

    federation: str
    round: int | None
    age: float | None
    audit: dict[str, Any] | None


@dataclass(frozen=True)
class SiteStatus:
    """How a site stands."""

    folder: str
    site: str
    coordinator: str | None
    problems: tuple[str, ...]
    federations: tuple[FederationStatus, ...]
    services: tuple[ServiceStatus, ...]
    processes: tuple[ProcessStatus, ...]
    kind: str = "site"
    version: int = 1

    @property
    def healthy(self) -> bool:
        """Everything that was started is there and serves."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {**dataclasses.asdict(self), "healthy": self.healthy}


def site_file(path: Path) -> Path | None:
    """The site file that a path means: itself, the one in a folder, or the one beside a state folder."""
    if path.is_file():
        return path
    beside = path.parent / "site.toml"
    if (path / "site.toml").is_file():
        return path / "site.toml"
    mine = beside.is_file() and Path(load_site(beside).trainer.state) == path.resolve()
    return beside if mine else None


def site_status(path: Path, now: float | None = None) -> SiteStatus:
    """Reads a site's state folder and asks its services. Raises ConfigError or StateError for bad input."""
    site, now = load_site(path), time.time() if now is None else now
    state = Path(site.trainer.state)
    told = read_services(state)
    services = tuple(_services(told, site)) if told else ()
    processes = told.processes() if told else ()
    problems = [] if told else ["not running: no command has been started for this site"]
    problems += [f"{each.name} at {each.address} is {each.state}" for each in services if each.state != "serving"]
    problems += [f"{each.name} (process {each.pid}) is gone" for each in processes if not each.alive]
    return SiteStatus(
        folder=str(state),
        site=site.name,
        coordinator=site.coordinator.address if site.coordinator else None,
        problems=tuple(problems),
        federations=tuple(_taking(folder, now) for folder in _federations(state)),
        services=services,
        processes=processes,
    )


def show_site(status: SiteStatus, console: Console) -> None:
    """A page for people."""
    where = f", coordinator {status.coordinator}" if status.coordinator else ""
    console.print(f"site {status.site}{where}; state in {status.folder}", highlight=False, markup=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("federation", "round", "written", "last left the site"):
        table.add_column(name, no_wrap=name != "last left the site")
    for each in status.federations:
        table.add_row(each.federation, str(each.round or ""), format_age(each.age), sanitize(_in_words(each.audit)))
    if status.federations:
        console.print(table)
    show_services(status.services, status.processes, status.problems, console)


def _services(told: ServiceRecord, site: SiteSettings) -> list[ServiceStatus]:
    found = []
    for name, address in told.addresses.items():
        if name == "trainer":
            way = TrainerClient(site.name, connectable_address(address), site.trainer.link)
            try:
                state = grpc_health(address, way.channel)
            except ColoraError:  # no certificates for the way to it, as in the SuperNode's container without a trainer
                state = "down"
            found.append(ServiceStatus(name, address, state))
        elif name.endswith("_health"):
            found.append(ServiceStatus(name.removesuffix("_health"), address, grpc_health(address)))
    return found


def _federations(state: Path) -> list[Path]:
    return sorted(path for path in state.glob("*") if (path / AUDIT).is_file() or any(path.glob(STATES)))


def _taking(folder: Path, now: float) -> FederationStatus:
    newest = max(folder.glob(STATES), default=None)
    number = int(newest.stem.removeprefix("round-")) if newest else None
    try:
        age = now - newest.stat().st_mtime if newest else None
    except OSError:  # a newer one has taken its place just now
        age = None
    return FederationStatus(folder.name, number, age, _last_line(folder / AUDIT))


def _last_line(path: Path) -> dict[str, Any] | None:
    """The newest whole line; None where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            whole = file.read().rpartition(b"\n")[0]
        return json.loads(whole.splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return None


def _in_words(line: dict[str, Any] | None) -> str:
    if line is None:
        return "nothing"
    about = f" of round {line['round']}" if "round" in line else ""
    return f"{line.get('kind')}{about}, {line.get('bytes')} bytes, {line.get('time')}"
