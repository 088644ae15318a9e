"""Status of a run, from the files of its run folder and the health checks of its services.

``colora status --json`` prints one object. Later versions only add keys. Times are in seconds; unknown values are
null::

    {"kind": "run", "version": 1, "folder", "federation", "method", "model", "round", "rounds",
     "phase": "joining" | "waiting" | "training" | "finalizing" | "finished" | "not running",
     "about": details of the phase, "idle": since the last event, "healthy": bool, "problems": [text],
     "checkpoint": null | {"round", "age", "finalized"},
     "sites": [{"site", "task", "seen": since its last message, "admitted": its last admitted round,
                "metrics": {"personal.accuracy": ...}, "failures": {"3": text}}],
     "privacy": null | {"epsilon": the largest that a site has spent, or null, "delta", "budget": null | number},
     "site_privacy": the same for [server.privacy],
     "services": [{"name", "address", "state": "serving" | "not serving" | "down"}],
     "processes": [{"name", "pid", "alive"}]}
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich import box
from rich.console import Console
from rich.table import Table

from ...common.config.loader import load_recipe
from ...common.config.schema import PrivacySettings, SitePrivacySettings
from ...common.dataset import EVAL_MODES
from ...common.errors import StateError
from ...common.event_log import Event
from ...common.foreign_text import sanitize
from ...common.processes.health import (
    PATIENCE,
    HealthState,
    ProcessStatus,
    ServiceRecord,
    ServiceStatus,
    connectable_address,
    format_age,
    grpc_health,
    read_services,
    show_services,
)
from ...common.protocol.types import EPSILON
from ..reporting.events import parse_lines
from ..reporting.run_folder import RunFolder
from ..reporting.summary import RunSummary, SiteSummary, summarize
from ..rounds.checkpoint import CheckpointInfo, latest_checkpoint_info
from .run_phase import Phase, last_change, phase_of
from .run_problems import LONGEST_ROUND, longest_idle, process_problems, site_problems

SITE_EVENTS = ("site_ready", "joined", "reply", "late", "refused")  # events caused by a site's message


@dataclass(frozen=True)
class SiteProgress:
    """One site as the coordinator knows it. ``seen``: seconds since its last message; ``admitted``: a round."""

    site: str
    task: str
    seen: float | None
    admitted: int
    metrics: dict[str, float | None]
    failures: dict[int, str]


@dataclass(frozen=True)
class CheckpointStatus:
    """The newest checkpoint. ``age``: seconds since it was written."""

    round: int
    age: float
    finalized: bool


@dataclass(frozen=True)
class PrivacyStatus:
    """``epsilon``: the largest that has been spent of a site's budget at ``delta``; None before the first round."""

    epsilon: float | None
    delta: float
    budget: float | None

    def __str__(self) -> str:
        of_budget = "" if self.budget is None else f" of {self.budget:g}"
        spent = "nothing" if self.epsilon is None else f"at most ε = {self.epsilon:.3g}"
        return f"{spent}{of_budget} at δ = {self.delta:g}"


@dataclass(frozen=True)
class RunStatus:
    """The status of a run. ``about`` has details of the phase; ``idle`` is in seconds since the last event."""

    folder: str
    federation: str
    method: str
    model: str
    round: int
    rounds: int
    phase: Phase
    about: str
    idle: float | None
    problems: tuple[str, ...]
    checkpoint: CheckpointStatus | None
    sites: tuple[SiteProgress, ...]
    services: tuple[ServiceStatus, ...]
    processes: tuple[ProcessStatus, ...]
    privacy: PrivacyStatus | None = None
    site_privacy: PrivacyStatus | None = None
    kind: str = "run"
    version: int = 1

    @property
    def healthy(self) -> bool:
        """Whether there are no problems. A finished run is healthy."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        return {**dataclasses.asdict(self), "healthy": self.healthy}


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, started or only prepared."""
    return (folder / "recipe.toml").is_file()


def newest_run(runs: Path) -> Path:
    """Return the run in ``runs`` that changed last. Raises StateError if there is none."""
    folders = [folder for folder in runs.glob("*") if is_run(folder)]
    if not folders:
        message, hint = f"There is no run in {runs}/.", "Name a run folder or a site.toml."
        raise StateError("RUN", "a run folder", "none", message=message, hint=hint)
    return max(folders, key=lambda folder: max(p.stat().st_mtime for p in _changing_files(folder)))


def run_status(folder: Path, now: float | None = None) -> RunStatus:
    """Read a run folder and check its services. Raises StateError or ConfigError if it is not a run folder."""
    now = time.time() if now is None else now
    recipe = load_recipe(folder / "recipe.toml")
    (events, skipped), (checkpoint, damaged) = _events(folder), latest_checkpoint_info(folder / "checkpoints")
    summary, record = summarize(events), read_services(folder)
    phase, about = phase_of(events, summary, checkpoint)
    idle = now - last_change(events) if events else None
    processes = record.processes() if record and phase != "finished" else ()
    services = tuple(_services(record)) if record and phase != "finished" else ()
    if phase not in ("finished", "not running") and _coordinator_gone(processes, idle, recipe.server.timeout):
        phase, about = "not running", f"it was last {phase}"
    problems = [skipped] if skipped else []
    problems += [f"checkpoints/{name} is damaged" for name in damaged]
    if phase != "finished":
        problems = process_problems(phase, about, services, processes) + problems
        problems += site_problems(events, _roster(folder, summary), now)
    if phase not in ("finished", "not running") and (idle or 0) > longest_idle(phase, summary, recipe.server.timeout):
        problems.append(f"no event for {format_age(idle).removesuffix(' ago')}")
    return RunStatus(
        folder=str(folder),
        federation=summary.federation or recipe.name,
        method=summary.method,
        model=summary.model or recipe.model.source,
        round=min(summary.round, recipe.rounds),
        rounds=recipe.rounds,
        phase=phase,
        about=about,
        idle=idle,
        problems=tuple(problems),
        checkpoint=_checkpoint_status(checkpoint, now),
        sites=tuple(_site(site, summary, events, checkpoint, now) for site in _roster(folder, summary)),
        services=services,
        processes=processes,
        privacy=_privacy(recipe.privacy, summary),
        site_privacy=_site_privacy(recipe.server.privacy, summary),
    )


def show_run(status: RunStatus, console: Console) -> None:
    """Print a status for people."""
    about = f" ({status.about})" if status.about else ""
    checkpoint = status.checkpoint
    lines = (
        f"{status.federation}: {status.method or 'not started'} on {status.model}",
        f"round {status.round} of {status.rounds}, {status.phase}{about}; last event: {format_age(status.idle)}",
        f"checkpoint: round {checkpoint.round}, {format_age(checkpoint.age)}" if checkpoint else "checkpoint: none yet",
    )
    for line in lines:
        console.print(sanitize(line), highlight=False, soft_wrap=True)
    if status.privacy:
        console.print(f"privacy budget for examples spent: {status.privacy}", highlight=False, soft_wrap=True)
    if status.site_privacy:
        console.print(f"privacy budget for sites spent: {status.site_privacy}", highlight=False, soft_wrap=True)
    console.print(_site_table(status.sites))
    show_services(status.services, status.processes, status.problems, console)


def _site_table(sites: Sequence[SiteProgress]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("site", no_wrap=True)
    measured = {site.site: _measured(site) for site in sites}
    shown = [name for name in ("ε", *EVAL_MODES) if any(values[name] is not None for values in measured.values())]
    for name in ("last message", "last round", *shown):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("last failure")
    for site in sites:
        failure = [sanitize(f"round {t}: {reason}") for t, reason in site.failures.items()][-1:]
        cells = ["" if (value := measured[site.site][name]) is None else f"{value:.3f}" for name in shown]
        table.add_row(sanitize(site.site), format_age(site.seen), str(site.admitted or ""), *cells, *failure)
    return table


def _measured(site: SiteProgress) -> dict[str, float | None]:
    """The site's primary metric by mode, and the ε that it has spent; with privacy it may send nothing but the ε."""
    summary = SiteSummary(site.site, site.task, metrics=site.metrics)
    return {"ε": site.metrics.get(EPSILON), **{mode: summary.metric(mode) for mode in EVAL_MODES}}


def _changing_files(folder: Path) -> list[Path]:
    return [path for path in (folder / "recipe.toml", folder / "events.jsonl") if path.exists()]


def _events(folder: Path) -> tuple[list[Event], str]:
    try:
        return parse_lines(folder / "events.jsonl")
    except OSError as error:
        path = folder / "events.jsonl"
        message = f"{path} cannot be read: {error}."
        raise StateError(str(path), "one JSON object per line", error, message=message) from None


def _roster(folder: Path, summary: RunSummary) -> list[str]:
    """The names of the sites in order, from the roster, which exists before the first event."""
    try:
        return [site for site, _ in RunFolder(folder).read_roster()]
    except StateError:
        return list(summary.rows)


def _coordinator_gone(processes: Sequence[ProcessStatus], idle: float | None, timeout: float | None) -> bool:
    """Whether the coordinator has exited. A simulation writes no pids, so a long time without events decides."""
    server = next((process for process in processes if process.name == "server"), None)
    return not server.alive if server else (idle or 0) > (timeout or LONGEST_ROUND)


def _services(record: ServiceRecord) -> list[ServiceStatus]:
    services = []
    for name, address in record.addresses.items():
        if name == "gateway":
            services.append(ServiceStatus(name, address, _gateway_health(address)))
        elif name.endswith("_health"):
            services.append(ServiceStatus(name.removesuffix("_health"), address, grpc_health(address)))
    return services


def _gateway_health(address: str) -> HealthState:
    """Call the gateway's health endpoint. Its certificate is not verified, since nothing confidential is sent."""
    for scheme in ("https", "http"):
        try:
            url = f"{scheme}://{connectable_address(address)}/health"
            response = httpx.get(url, verify=False, trust_env=False, timeout=PATIENCE)
            return "serving" if response.text == "ok" else "not serving"
        except httpx.HTTPError:
            continue
    return "down"


def _checkpoint_status(info: CheckpointInfo | None, now: float) -> CheckpointStatus | None:
    return CheckpointStatus(info.round, now - info.written, info.finalized) if info else None


def _privacy(settings: PrivacySettings, summary: RunSummary) -> PrivacyStatus | None:
    if not settings.enabled:
        return None
    spent = [epsilon for row in summary.rows.values() if (epsilon := row.metrics.get(EPSILON)) is not None]
    return PrivacyStatus(max(spent, default=None), settings.delta, settings.epsilon)


def _site_privacy(settings: SitePrivacySettings | None, summary: RunSummary) -> PrivacyStatus | None:
    if settings is None:
        return None
    spent = summary.noised["epsilon"] if summary.noised else None
    return PrivacyStatus(spent, settings.delta, settings.epsilon)


def _site(
    site: str, summary: RunSummary, events: list[Event], checkpoint: CheckpointInfo | None, now: float
) -> SiteProgress:
    row = summary.rows.get(site, SiteSummary(site))
    times = [event["time"] for event in events if event.get("site") == site and event["event"] in SITE_EVENTS]
    admitted = min(checkpoint.admitted.get(site, 0), summary.rounds) if checkpoint else 0
    seen = now - times[-1] if times else None
    return SiteProgress(site, row.task, seen, admitted, dict(row.metrics), dict(row.failures))
