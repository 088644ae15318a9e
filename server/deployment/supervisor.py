"""``colora server``: supervises gateway, SuperLink and ServerApp until the federation has ended.

A failed process is restarted. A new Flower run of the same federation continues from the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from ...common.atomic_io import write_atomically
from ...common.config.privacy_rules import check_site_count
from ...common.config.schema import Recipe
from ...common.errors import ColoraError, ConfigError, QuorumError, StateError
from ...common.event_log import Event, EventLog, notify
from ...common.processes.file_limit import raise_file_limit
from ...common.processes.supervised import Signals, exclusive_lock, listens, write_services
from ...common.secure_aggregation.identity import coordinator_roster
from ..reporting.events import EventTail
from ..reporting.run_folder import RunFolder
from ..reporting.tracking import track
from ..rounds.run_options import RosterEntry
from .gateway.process import GatewayProcess
from .gateway.server import ListenAddress
from .gateway.upstream import Upstream
from .provisioning.provision import ROSTER
from .superlink import Certificates, SuperLink, point_of

EVENT_INTERVAL, PROCESS_INTERVAL = 0.1, 0.5  # seconds between two checks of the events, and of the processes
LISTEN_TIMEOUT = 45.0  # seconds for a SuperLink to listen on its port
SERVERAPP_TIMEOUT = 15.0  # seconds for a run's ServerApp to start; doubled for each failed run in a row
SUBMIT_PAUSE = 2.0  # seconds before a run that could not be submitted is submitted again
MAX_FAILED_RUNS = 5  # runs in a row without a new round, after which the supervisor gives up
logger = logging.getLogger("colora.server")


@dataclass(frozen=True)
class Keys:
    """The coordinator's certificates and the sites' public keys, from the folder that ``colora provision`` wrote."""

    certificates: Certificates
    sites: dict[str, bytes]  # OpenSSH public keys by name
    roster: Path | None = None  # the sites' public keys for secure aggregation


@dataclass(frozen=True)
class ServerJob:
    """A federation to run, and the address to listen on. Without keys there is no TLS and no authentication."""

    recipe: Recipe
    folder: Path
    host: str
    port: int
    keys: Keys | None


def read_keys(folder: Path) -> Keys:
    """Read the coordinator's folder. Raises StateError if a file is missing or damaged."""
    files = {name: folder / name for name in ("ca.crt", "server.crt", "server.key")}
    hint = "Use the folder `coordinator` that colora provision wrote."
    for path in files.values():
        if not path.is_file():
            message = f"--keys {folder} has no file {path.name}."
            raise StateError(f"--keys {folder}", path.name, "no such file", message=message, hint=hint)
    sites = {path.stem: path.read_bytes() for path in sorted((folder / "sites").glob("*.pub"))}
    if not sites:
        message = f"--keys {folder} has no public keys of sites."
        raise StateError(f"--keys {folder}", "public keys sites/NAME.pub", "none", message=message, hint=hint)
    roster = folder / ROSTER
    return Keys(Certificates(*files.values()), sites, roster if coordinator_roster(roster) else None)


def roster_of(recipe: Recipe, keys: Keys | None) -> tuple[RosterEntry, ...]:
    """The recipe's sites in order; all sites that have a key if the recipe names none.

    Raises ConfigError if neither names sites, and StateError for a site without a key.
    """
    if not recipe.site:
        if keys is None:
            raise ConfigError(
                "site",
                "[[site]] tables that name the sites",
                "none",
                message="The recipe names no sites, and without --keys there are no keys to take names from.",
                hint="Add a [[site]] table with a name for each site.",
            )
        return tuple(map(RosterEntry, keys.sites))
    for site in recipe.site:
        if keys and site.name not in keys.sites:
            raise StateError(
                "--keys",
                f"sites/{site.name}.pub",
                "no such file",
                site=site.name,
                message=f"The recipe names this site, but --keys has no sites/{site.name}.pub.",
                hint="Add the site with colora provision --add, or remove it from the recipe.",
            )
    return tuple(RosterEntry(site.name, site.from_round) for site in recipe.site)


def run_server(job: ServerJob, listener: Callable[[Event], None]) -> bool:
    """Run a federation to its end, from the last checkpoint if there is one; False if a signal stopped it.

    Raises ConfigError or StateError for bad input, QuorumError if the quorum exceeds the roster, and RunFailed if the
    run cannot continue.
    """
    run = RunFolder(job.folder)
    roster = roster_of(job.recipe, job.keys)
    if job.keys:  # a key outside the roster is a stranger's
        known = {entry.site: job.keys.sites[entry.site] for entry in roster}
        job = dataclasses.replace(job, keys=dataclasses.replace(job.keys, sites=known))
    if not run.recipe.exists():
        run.check_new()
    with exclusive_lock(job.folder / "server.lock", "coordinator"):
        if run.recipe.exists():
            run.resume(job.recipe, listener)
        initialize_run(run, job.recipe, roster)
        if job.keys and job.keys.roster:
            write_atomically(run.public_keys, job.keys.roster.read_bytes())
        upstream, address = _endpoints(job)
        link = SuperLink(
            job.folder.resolve() / "flower",
            job.folder.resolve(),
            job.folder / "logs" / "superlink.log",
            job.keys.certificates if job.keys else None,
        )
        logger.info("open files: at most %d", raise_file_limit())
        gateway = GatewayProcess(address, upstream(link.url), link.home, job.folder / "logs" / "gateway.log")
        gateway.hold()
        with track(job.recipe, job.folder), gateway:
            return Supervisor(run, link, gateway, job, listener).run_until_done()


class Supervisor:
    """Keeps one gateway, one SuperLink and one Flower run alive."""

    def __init__(
        self,
        run: RunFolder,
        link: SuperLink,
        gateway: GatewayProcess,
        job: ServerJob,
        listener: Callable[[Event], None],
    ) -> None:
        self.run, self.link, self.gateway, self.job, self.listener = run, link, gateway, job, listener
        self.events = EventTail(run.path / "events.jsonl")
        self.signals = Signals()
        self.link_began = True  # whether the last SuperLink ran until it listened
        self.submitted: float | None = None  # monotonic time at which the current run was submitted
        self.seen = False  # whether its ServerApp has been seen
        self.failed_runs = 0  # runs in a row that ended without a new round
        self.failure: Event | None = None  # the current run's event `run_failed`
        self.next_submit = 0.0  # monotonic time before which no run is submitted

    def run_until_done(self) -> bool:
        """Run until the federation has ended (True), or a signal came and the current round is over (False)."""
        self.run.stop.unlink(missing_ok=True)
        checked = 0.0
        try:
            while True:
                for event in self.events.new():
                    self._take(event)
                    if event["event"] in ("finished", "stopped"):
                        return event["event"] == "finished"
                if self._signalled():
                    return False
                if time.monotonic() > checked + PROCESS_INTERVAL:
                    self._reconcile()
                    checked = time.monotonic()
                time.sleep(EVENT_INTERVAL)
        finally:
            self.link.child.stop(grace=5.0)
            self.run.stop.unlink(missing_ok=True)

    def _take(self, event: Event) -> None:
        if event["event"] == "round":
            self.failed_runs = 0
        if event["event"] == "run_failed":
            self.failure = event
        notify(self.listener, event)

    def _signalled(self) -> bool:
        """Whether to exit now. The first signal lets the current round finish; the second does not."""
        if not self.signals.count:
            return False
        self.run.stop.touch()
        return self.signals.count > 1 or not (self.submitted and self.link.child.running)

    def _reconcile(self) -> None:
        """Start gateway and SuperLink if they are down, else submit a run if there is none, else check the run."""
        if self.gateway.ensure_running():
            logger.warning("the gateway ended and was started again; see %s", self.gateway.log)
            self._emit("restarted", what="gateway")
            self._write_services()
        if not self.link.child.running:
            self.submitted = None
            if self.link.child.due and not self.signals.count:
                self._start_link()
        elif self.submitted is None:
            if time.monotonic() >= self.next_submit and not self.signals.count:
                self._submit()
        else:
            self._check_run()

    def _start_link(self) -> None:
        if self.link.child.starts:
            reason = None if self.link_began else f"it ended before it listened; see {self.link.child.command.log}"
            self._emit("restarted", what="superlink", reason=reason)
        self.link.start()
        self.link.prepare()
        deadline = time.monotonic() + LISTEN_TIMEOUT
        while self.link.child.running and not listens("127.0.0.1", self.link.port) and time.monotonic() < deadline:
            time.sleep(EVENT_INTERVAL)
        self.link_began = self.link.child.running
        try:
            if self.link.child.running and self.job.keys:
                self.link.register(self.job.keys.sites)
        except httpx.HTTPError as error:
            logger.warning("the SuperLink did not accept the sites' keys and is restarted: %s", error)
            self.link.child.kill()
        if self.link.child.running:
            self.gateway.release()
        self._write_services()

    def _submit(self) -> None:
        """Submit a new Flower run. If that fails, it is tried again after a pause."""
        try:
            self.link.submit()
        except httpx.HTTPError as error:  # the SuperLink is still starting, or has just died
            logger.warning("the run could not be submitted and is retried: %s", error)
            self.next_submit = time.monotonic() + SUBMIT_PAUSE
            return
        self.submitted, self.seen, self.failure = time.monotonic(), False, None

    def _check_run(self) -> None:
        """Detect that the current run has ended, whether or not its ServerApp recorded an event.

        Flower can lose a run's task before any process takes it; the ServerApp then takes a minute to start. A new run
        is faster and safe, because the run folder's lock admits one ServerApp at a time.
        """
        alive = self.link.child.has_living("flwr-serverapp")
        self.seen = self.seen or alive
        timeout = SERVERAPP_TIMEOUT * 2**self.failed_runs
        if alive or (not self.seen and time.monotonic() < (self.submitted or 0) + timeout):
            return
        for event in self.events.new():
            self._take(event)
        self._run_ended()

    def _run_ended(self) -> None:
        """Schedule another run after one that ended early. Raises RunFailed if another one cannot help."""
        self.submitted, self.failed_runs = None, self.failed_runs + 1
        death = "its ServerApp died" if self.seen else "its ServerApp did not start"
        reason = self.failure["reason"] if self.failure else death
        if (self.failure and self.failure["final"]) or self.failed_runs >= MAX_FAILED_RUNS:
            raise RunFailed(reason, self.run.path)
        self.next_submit = time.monotonic() + (2.0**self.failed_runs if self.failure else 0.0)
        self._emit("restarted", what="run", reason=reason)

    def _emit(self, event: str, **fields: object) -> None:
        EventLog(self.run.path / "events.jsonl").emit(event, **fields)

    def _write_services(self) -> None:
        pids = {"server": os.getpid(), "gateway": self.gateway.child.pid, "superlink": self.link.child.pid}
        health = f"127.0.0.1:{self.link.health_port}"
        services = {"gateway": self.gateway.address, "superlink_health": health, "pids": pids}
        write_services(self.run.path / "services.json", services)


class RunFailed(ColoraError, RuntimeError):
    """The federation cannot continue without a change."""

    def __init__(self, reason: str, folder: Path) -> None:
        super().__init__(
            "run",
            "a federation that can continue",
            reason,
            message=f"The run failed: {reason}",
            hint=f"See {folder / 'logs'} and {folder / 'events.jsonl'}; the same command continues the run.",
        )


def initialize_run(run: RunFolder, recipe: Recipe, roster: tuple[RosterEntry, ...]) -> None:
    """Write roster and recipe unless they exist. Raises QuorumError and ConfigError for too few sites."""
    if run.recipe.exists():
        return
    if recipe.server.quorum and recipe.server.quorum > len(roster):
        raise QuorumError(
            "server.quorum",
            f"at most {len(roster)}",
            recipe.server.quorum,
            message=f"server.quorum is {recipe.server.quorum}, but the roster has {len(roster)} sites.",
            hint="Lower server.quorum, or add sites.",
        )
    check_site_count(recipe.privacy, len(roster))
    write_atomically(run.roster, json.dumps([[entry.site, entry.from_round] for entry in roster]).encode())
    run.write_recipe(recipe)


def _endpoints(job: ServerJob) -> tuple[Callable[[str], Upstream], ListenAddress]:
    """The gateway's upstream, given the SuperLink's URL, and its address."""
    if job.keys is None:
        return (lambda url: Upstream(url, registration=True)), ListenAddress(job.host, job.port)
    files = job.keys.certificates
    keys = frozenset(b64encode(point_of(key, name)).decode() for name, key in job.keys.sites.items())
    address = ListenAddress(job.host, job.port, files.certificate, files.key)
    return (lambda url: Upstream(url, files.ca, keys=keys)), address
