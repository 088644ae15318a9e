"""How a run stands, from its folder and its services; nothing is asked of the run itself.

As JSON (``colora status --json``; keys are only ever added, times are seconds, unknown is null)::

    {"kind": "run", "version": 1, "folder", "federation", "method", "model", "round", "rounds",
     "phase": "joining" | "waiting" | "training" | "closing" | "closed" | "not running",
     "about": words on the phase, "idle": since the last event, "healthy": bool, "problems": [words],
     "checkpoint": null | {"round", "age", "closed"},
     "sites": [{"site", "task", "seen": since it was heard of, "admitted": its last round that counted,
                "metrics": {"personal.accuracy": ...}, "failures": {"3": words}}],
     "services": [{"name", "address", "state": "serving" | "not serving" | "down"}],
     "processes": [{"name", "pid", "alive"}]}
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
from rich import box
from rich.console import Console
from rich.table import Table

from ...common.config.loader import load_recipe
from ...common.dataset import EVAL_MODES
from ...common.errors import StateError
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
    sanitize,
    show_services,
)
from ..reporting.events import Event, read_events
from ..reporting.summary import RunSummary, SiteSummary, summarize
from ..rounds.checkpoint import CheckpointInfo, latest_checkpoint_info

Phase = Literal["joining", "waiting", "training", "closing", "closed", "not running"]
HEARD = ("met", "joined", "reply", "late", "refused")  # events that a site's own message made
AT_WORK = ("round_started", "reply", "round", "failed", "refused", "late")
LONGEST_WAIT = 120.0  # seconds without an event while sites are missing, before that counts as standing still
LONGEST_ROUND = 3600.0  # the same for a round without a deadline


@dataclass(frozen=True)
class SiteProgress:
    """One site as the coordinator knows it. ``seen`` is seconds since it was heard of."""

    site: str
    task: str
    seen: float | None
    admitted: int
    metrics: dict[str, float | None]
    failures: dict[int, str]


@dataclass(frozen=True)
class CheckpointStatus:
    """The newest checkpoint: its round, and seconds since it was written."""

    round: int
    age: float
    closed: bool


@dataclass(frozen=True)
class RunStatus:
    """How a run stands. ``about`` says more of the phase; ``idle`` is seconds since the last event."""

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
    kind: str = "run"
    version: int = 1

    @property
    def healthy(self) -> bool:
        """Closed, or under way with all that it needs."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {**dataclasses.asdict(self), "healthy": self.healthy}


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, or the beginning of one."""
    return (folder / "recipe.toml").is_file()


def newest_run(runs: Path) -> Path:
    """The run below ``runs`` in which something happened last. Raises StateError when there is none."""
    found = [folder for folder in runs.glob("*") if is_run(folder)]
    if not found:
        raise StateError("RUN", "a run folder, or one below runs/", "none")
    return max(found, key=lambda folder: max(p.stat().st_mtime for p in _lively(folder)))


def run_status(folder: Path, now: float | None = None) -> RunStatus:
    """Reads a run folder and asks its services. Raises StateError or ConfigError when that is no run folder."""
    now = time.time() if now is None else now
    recipe = load_recipe(folder / "recipe.toml")
    events, mark = _events(folder), latest_checkpoint_info(folder / "checkpoints")
    board, told = summarize(events), read_services(folder)
    phase, about = _phase(events, board, mark)
    idle = now - events[-1]["time"] if events else None
    processes = told.processes() if told else ()
    services = tuple(_services(told)) if told and phase != "closed" else ()
    if phase not in ("closed", "not running") and _ended(processes, told, idle, recipe.server.timeout):
        phase, about = "not running", f"{phase} when it was last heard of"
    short = phase in ("joining", "waiting") and not board.awaits  # what sites write for a move takes them longer
    limit = LONGEST_WAIT if short else (recipe.server.timeout or LONGEST_ROUND) + LONGEST_WAIT
    problems = list(_problems(phase, about, services, processes))
    if phase not in ("closed", "not running") and (idle or 0) > limit:
        problems.append(f"nothing has happened for {format_age(idle).removesuffix(' ago')}")
    return RunStatus(
        folder=str(folder),
        federation=board.federation or recipe.name,
        method=board.method,
        model=board.model or recipe.model.source,
        round=min(board.round, recipe.rounds),
        rounds=recipe.rounds,
        phase=phase,
        about=about,
        idle=idle,
        problems=tuple(problems),
        checkpoint=CheckpointStatus(mark.round, now - mark.written, mark.closed) if mark else None,
        sites=tuple(_site(site, board, events, mark, now) for site in _roster(folder, board)),
        services=services,
        processes=processes if phase != "closed" else (),
    )


def show_run(status: RunStatus, console: Console) -> None:
    """A page for people."""
    say: Callable[[str], None] = lambda text: console.print(sanitize(text), highlight=False, soft_wrap=True)  # noqa: E731
    say(f"{status.federation}: {status.method or 'not begun'} on {status.model}")
    about = f" ({status.about})" if status.about else ""
    say(f"round {status.round} of {status.rounds}, {status.phase}{about}; last event {format_age(status.idle)}")
    mark = status.checkpoint
    say(f"checkpoint: round {mark.round}, written {format_age(mark.age)}" if mark else "checkpoint: none yet")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("site", no_wrap=True)
    for name in ("seen", "admitted", *EVAL_MODES):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("trouble")
    for site in status.sites:
        row = SiteSummary(site.site, site.task, metrics=site.metrics)
        values = [row.metric(name) for name in EVAL_MODES]
        trouble = [sanitize(f"round {t}: {why}") for t, why in site.failures.items()][-1:]
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        table.add_row(site.site, format_age(site.seen), str(site.admitted or ""), *cells, *trouble)
    console.print(table)
    show_services(status.services, status.processes, status.problems, console)


def _lively(folder: Path) -> list[Path]:
    return [path for path in (folder / "recipe.toml", folder / "events.jsonl") if path.exists()]


def _events(folder: Path) -> list[Event]:
    try:
        return read_events(folder / "events.jsonl")
    except (OSError, ValueError) as error:
        raise StateError(str(folder / "events.jsonl"), "events, one JSON object a line", error) from None


def _roster(folder: Path, board: RunSummary) -> list[str]:
    """The sites in their order, also before anything has happened."""
    try:
        return [str(entry[0]) for entry in json.loads((folder / "roster.json").read_text(encoding="utf-8"))]
    except (OSError, ValueError, LookupError, TypeError):
        return list(board.rows)


def _phase(events: list[Event], board: RunSummary, mark: CheckpointInfo | None) -> tuple[Phase, str]:
    """What the events of the last start say, and words on it."""
    events = [event for event in events if event["event"] != "met"]
    names = [event["event"] for event in events]
    if mark and mark.closed:
        return "closed", ""
    if not names:
        return "joining", "nothing has happened yet"
    begun = max((i for i, name in enumerate(names) if name == "started"), default=0)
    last, now = events[-1], names[begun:]
    if "finished" in now:
        return "closed", ""
    if names[-1] == "stopped":
        return "not running", "stopped: the same command goes on"
    if names[-1] == "broken":
        return ("not running" if last.get("final") else "waiting"), str(last["reason"])
    if names[-1] == "waiting":
        missing = ", ".join(last.get("missing", ())) or str(last.get("reason", ""))
        return "waiting", f"for {missing}" if "missing" in last else missing
    if not set(now) & set(AT_WORK):
        return "joining", ""
    backwards = now[::-1]  # the last round is over, and none was begun after it
    over = "round" in now and "round_started" not in backwards[: backwards.index("round")]
    return ("closing" if over and board.round >= board.rounds else "training"), ""


def _ended(
    processes: Sequence[ProcessStatus], told: ServiceRecord | None, idle: float | None, timeout: float | None
) -> bool:
    """Whether the coordinator is gone. A simulation writes no pids: there only silence tells."""
    server = next((process for process in processes if process.name == "server"), None)
    if told and server:
        return not server.alive
    return (idle or 0) > (timeout or LONGEST_ROUND)


def _services(told: ServiceRecord) -> list[ServiceStatus]:
    found = []
    for name, address in told.addresses.items():
        if name == "gate":
            found.append(ServiceStatus(name, address, _gate_health(address)))
        elif name.endswith("_health"):
            found.append(ServiceStatus(name.removesuffix("_health"), address, grpc_health(address)))
    return found


def _gate_health(address: str) -> HealthState:
    """The gate's own answer. Whose certificate it shows does not matter here: nothing is told to it."""
    for scheme in ("https", "http"):
        try:
            url = f"{scheme}://{connectable_address(address)}/health"
            answer = httpx.get(url, verify=False, trust_env=False, timeout=PATIENCE)
            return "serving" if answer.text == "ok" else "not serving"
        except httpx.HTTPError:
            continue
    return "down"


def _problems(
    phase: Phase, about: str, services: Sequence[ServiceStatus], processes: Sequence[ProcessStatus]
) -> list[str]:
    if phase == "closed":
        return []
    found = [f"the run stands still: {about or phase}"] if phase == "not running" else []
    found += [
        f"{service.name} at {service.address} is {service.state}" for service in services if service.state != "serving"
    ]
    return found + [f"{each.name} (process {each.pid}) is gone" for each in processes if not each.alive]


def _site(site: str, board: RunSummary, events: list[Event], mark: CheckpointInfo | None, now: float) -> SiteProgress:
    row = board.rows.get(site, SiteSummary(site))
    heard = [event["time"] for event in events if event.get("site") == site and event["event"] in HEARD]
    admitted = min(mark.admitted.get(site, 0), board.rounds) if mark else 0
    seen = now - heard[-1] if heard else None
    return SiteProgress(site, row.task, seen, admitted, dict(row.metrics), dict(row.failures))
