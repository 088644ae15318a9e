"""The status of a site, from its state folder and its services.

As JSON (``colora status site.toml --json``; keys are only added, never removed; times are seconds; unknown is null)::

    {"kind": "site", "version": 1, "folder": the state folder, "site", "coordinator",
     "healthy": bool, "problems": [sentence],
     "federations": [{"federation", "round": of the newest state, "age": since it was written, "task",
                      "metrics": {"personal.accuracy": ...}, "audit": null | the last line of the audit log,
                      "privacy": null | {"epsilon": spent, "delta", "budget": null | number,
                                         "in_all": spent in all federations, "max_epsilon": null | number}}],
     "services": [{"name", "address", "state": "serving" | "not serving" | "down"}],
     "processes": [{"name", "pid", "alive"}]}
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ...common.atomic_io import load_arrays
from ...common.config.loader import load_site
from ...common.config.site_schema import SiteSettings
from ...common.dataset import EVAL_MODES, TASKS
from ...common.errors import ColoraError, StateError
from ...common.foreign_text import sanitize
from ...common.processes.health import (
    ProcessStatus,
    ServiceRecord,
    ServiceStatus,
    connectable_address,
    format_age,
    grpc_health,
    read_services,
    show_services,
)
from ..trainer_service.audit_log import FILE as AUDIT
from ..trainer_service.audit_log import parse_line
from ..trainer_service.client import TrainerClient
from ..training.privacy_budget import LEDGER, PrivacyLedger
from .spent_budget import SpentBudget, spent_budget

TAIL = 1 << 20  # bytes at the end of an audit log, enough for its last line
STATES = "round-*.safetensors"
NO_ARRAYS = "\0"  # a prefix that no array has


@dataclass(frozen=True)
class FederationStatus:
    """A federation of the site: round and metrics of its newest state, the last audit entry, and the spent budget."""

    federation: str
    round: int | None
    age: float | None  # seconds
    audit: dict[str, Any] | None
    task: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    privacy: SpentBudget | None = None

    def metric(self, mode: str) -> float | None:
        """The task's primary metric of the ``base``, ``shared`` or ``personal`` model; None if not measured."""
        return self.metrics.get(f"{mode}.{TASKS[self.task].primary_metric}") if self.task in TASKS else None


@dataclass(frozen=True)
class SiteStatus:
    """The status of a site."""

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
        """Whether all processes run, all services answer, and the last message to a coordinator was no error."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Return the status as a JSON-compatible dictionary."""
        return {**dataclasses.asdict(self), "healthy": self.healthy}


def site_file(path: Path) -> Path | None:
    """Return the site file for a path: the path itself, ``site.toml`` in it, or beside it if it is a state folder."""
    if path.is_file():
        return path
    beside = path.parent / "site.toml"
    if (path / "site.toml").is_file():
        return path / "site.toml"
    is_state = beside.is_file() and Path(load_site(beside).trainer.state) == path.resolve()
    return beside if is_state else None


def site_status(path: Path, now: float | None = None) -> SiteStatus:
    """Read a site's state folder and query its services. ``now`` is in seconds since 1970.

    Raises ConfigError for a bad site file, StateError for an unreadable ``services.json``.
    """
    site, now = load_site(path), time.time() if now is None else now
    state = Path(site.trainer.state)
    record = read_services(state)
    services = tuple(_services(record, site)) if record else ()
    processes = record.processes() if record else ()
    problems = [] if record else ["not running: colora client has not been started for this site"]
    problems += [f"{each.name} at {each.address} is {each.state}" for each in services if each.state != "serving"]
    problems += [f"{each.name} (process {each.pid}) has ended" for each in processes if not each.alive]
    found = [_federation(folder, now, site) for folder in _federations(state)]
    federations = tuple(federation for federation, _ in found)
    problems += [problem for _, problem in found if problem]
    return SiteStatus(
        folder=str(state),
        site=site.name,
        coordinator=site.coordinator.address if site.coordinator else None,
        problems=(*problems, *_last_error(federations, state)),
        federations=federations,
        services=services,
        processes=processes,
    )


def show_site(status: SiteStatus, console: Console) -> None:
    """Print the status as a page of text."""
    coordinator = f", coordinator {status.coordinator}" if status.coordinator else ""
    console.print(
        sanitize(f"site {status.site}{coordinator}; state in {status.folder}"), highlight=False, soft_wrap=True
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("federation", "round", "written", *EVAL_MODES, "last audit entry"):
        table.add_column(name, no_wrap=name != "last audit entry")
    for each in status.federations:
        values = ["" if (value := each.metric(mode)) is None else f"{value:.3f}" for mode in EVAL_MODES]
        cells = [str(each.round or ""), format_age(each.age), *values, sanitize(_describe(each.audit))]
        table.add_row(sanitize(each.federation), *cells)
    if status.federations:
        console.print(table)
    for each in status.federations:
        if each.privacy:
            line = sanitize(f"{each.federation}: privacy budget spent: {each.privacy}")
            console.print(line, highlight=False, soft_wrap=True)
    show_services(status.services, status.processes, status.problems, console)


def _services(record: ServiceRecord, site: SiteSettings) -> list[ServiceStatus]:
    services = []
    for name, address in record.addresses.items():
        if name == "trainer":
            client = TrainerClient(site.name, connectable_address(address), site.trainer.link)
            try:
                state = grpc_health(address, client.channel)
            except ColoraError:  # the certificates are missing, as in the trainer's own container
                state = "down"
            services.append(ServiceStatus(name, address, state))
        elif name.endswith("_health"):
            services.append(ServiceStatus(name.removesuffix("_health"), address, grpc_health(address)))
    return services


def _federations(state: Path) -> list[Path]:
    return sorted(path for path in state.glob("*") if (path / AUDIT).is_file() or any(path.glob(STATES)))


def _last_error(federations: Sequence[FederationStatus], state: Path) -> list[str]:
    """Return a problem if the last message of the trainer to a coordinator was an error, or refused its plan."""
    lines = [line for line in (_last_line(state / AUDIT), *(each.audit for each in federations)) if line]
    last = max(lines, key=lambda line: str(line.get("time")), default=None)
    if last is None or last.get("kind") not in ("error", "refusal"):
        return []
    if last["kind"] == "refusal":
        return [f"{last.get('federation')}: the site refused the coordinator's plan: {last.get('reason')}"]
    where = f"{last.get('federation')}: the site's last answer was an error ({last.get('text')})"
    return [f"{where}; {state / 'logs' / 'trainer.log'} has it in full"]


def _federation(folder: Path, now: float, site: SiteSettings) -> tuple[FederationStatus, str]:
    """Return the status of a federation, and a sentence where its privacy budget cannot be told."""
    states = sorted(path for path in folder.glob(STATES) if path.stem[6:].isdecimal())
    newest = states[-1] if states else None
    number = int(newest.stem[6:]) if newest else None  # after "round-"
    try:
        age = now - newest.stat().st_mtime if newest else None
    except OSError:  # deleted in this moment, after a newer state was written
        age = None
    task, metrics, plan = _measured(states)
    privacy, problem = None, ""
    try:
        privacy = spent_budget(plan, PrivacyLedger(folder.parent / LEDGER), site) if plan else None
    except (ColoraError, ValueError) as error:
        problem = f"{folder.name}: the privacy budget is unknown: {error}"
    status = FederationStatus(folder.name, number, age, _last_line(folder / AUDIT), task, metrics, privacy)
    return status, problem


def _measured(states: Sequence[Path]) -> tuple[str, dict[str, float], str]:
    """Return the task, the newest value of each metric in the states, and the newest plan as JSON.

    A round need not measure all metrics.
    """
    task, metrics, plan = "", {}, ""
    for path in states:
        with contextlib.suppress(StateError, KeyError, TypeError, ValueError):  # damaged, or deleted in this moment
            card = load_arrays(path, prefix=NO_ARRAYS)[1]["card"]
            task, metrics, plan = str(card["task"]), {**metrics, **card["metrics"]}, str(card.get("plan", ""))
    return task, metrics, plan


def _last_line(path: Path) -> dict[str, Any] | None:
    """Return the last complete line that is not damaged, or None if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            complete = file.read().rpartition(b"\n")[0]
    except OSError:
        return None
    return next(filter(None, map(parse_line, reversed(complete.splitlines()))), None)


def _describe(line: dict[str, Any] | None) -> str:
    if line is None:
        return "nothing"
    round_text = f" of round {line['round']}" if "round" in line else ""
    return f"{line.get('kind')}{round_text}, {line.get('bytes')} bytes, {line.get('time')}"
