"""``colora server``: SuperLink, gate and run, supervised until the federation has ended.

Whatever dies is started again, and a new Flower run of the same federation goes on from the last checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import tomli_w

from ...common.atomic_io import write_atomically
from ...common.config.schema import Recipe, to_dict
from ...common.errors import ColoraError, ConfigError, QuorumError, StateError
from ...common.processes.supervised import Signals, exclusive_lock, listens, write_services
from ..reporting.events import Event, EventLog, EventTail
from ..reporting.run_folder import RunFolder
from ..rounds.run_options import RosterEntry
from .gateway.proxy import Upstream
from .gateway.server import GatewayServer, ListenAddress
from .superlink import Certificates, SuperLink, point_of

PULSE, LOOK = 0.1, 0.5  # seconds between two looks at events, and at processes
LISTENING = 45.0  # seconds in which a SuperLink must listen
SHOWING = 15.0  # seconds in which a run's ServerApp must be there; twice that after each run that showed none
PAUSE = 2.0
STUBBORN = 5  # runs in a row that ended without a new round
logger = logging.getLogger("colora.server")


@dataclass(frozen=True)
class Keys:
    """The coordinator's folder as ``colora provision`` wrote it."""

    certificates: Certificates
    sites: dict[str, bytes]  # OpenSSH public keys by name


@dataclass(frozen=True)
class ServerJob:
    """What a coordinator leads, and where it listens. Without keys there is neither TLS nor any check of sites."""

    recipe: Recipe
    folder: Path
    host: str
    port: int
    keys: Keys | None


def read_keys(folder: Path) -> Keys:
    """Raises StateError when something of the folder is missing."""
    files = {name: folder / name for name in ("ca.crt", "server.crt", "server.key")}
    for path in files.values():
        if not path.is_file():
            raise StateError(f"--keys {folder}", f"{path.name}, as colora provision writes it", "no such file")
    sites = {path.stem: path.read_bytes() for path in sorted((folder / "sites").glob("*.pub"))}
    if not sites:
        raise StateError(f"--keys {folder}", "public keys of sites in sites/NAME.pub", "none")
    return Keys(Certificates(*files.values()), sites)


def roster_of(recipe: Recipe, keys: Keys | None) -> tuple[RosterEntry, ...]:
    """The recipe's sites in its order, each with a key; for a recipe that names none, all that have one."""
    if not recipe.site:
        if keys is None:
            raise ConfigError("site", "[[site]] tables that name the sites, as there are no keys to tell them", "none")
        return tuple(map(RosterEntry, keys.sites))
    for site in recipe.site:
        if keys and site.name not in keys.sites:
            raise StateError("--keys", f"sites/{site.name}.pub for the recipe's site", "no such file", site=site.name)
    return tuple(RosterEntry(site.name, site.from_round) for site in recipe.site)


def run_server(post: ServerJob, listener: Callable[[Event], None]) -> bool:
    """Leads a federation to its end; False when a signal ended it before. Goes on where the folder stands.

    Raises ConfigError or StateError for bad input, QuorumError and others when the run ended for good.
    """
    run = RunFolder(post.folder)
    roster = roster_of(post.recipe, post.keys)
    if run.recipe.exists():
        run.check_same(post.recipe)
    else:
        run.check_new()
    with exclusive_lock(post.folder / "server.lock", "coordinator"):
        initialize_run(run, post.recipe, roster)
        upstream, door = _endpoints(post)
        link = SuperLink(
            post.folder.resolve() / "flower",
            post.folder.resolve(),
            post.folder / "logs" / "superlink.log",
            post.keys.certificates if post.keys else None,
        )
        with GatewayServer(door, upstream(link.url)) as gate:
            gate.hold()
            return Supervisor(run, link, gate, post, listener).run_until_done()


class Supervisor:
    """Keeps one SuperLink and one run going."""

    def __init__(
        self, run: RunFolder, link: SuperLink, gate: GatewayServer, post: ServerJob, listener: Callable[[Event], None]
    ) -> None:
        self.run, self.link, self.gate, self.job, self.listener = run, link, gate, post, listener
        self.events = EventTail(run.path / "events.jsonl")
        self.signals = Signals()
        self.submitted: float | None = None  # when the run under way was handed over
        self.seen = False  # its ServerApp has been seen
        self.failed_runs = 0  # runs in a row that ended without a new round
        self.broken: Event | None = None  # how the run under way ended
        self.pause = 0.0  # until when no new run is started

    def run_until_done(self) -> bool:
        """Until the federation has ended or a signal came and the round is over."""
        self.run.stop.unlink(missing_ok=True)
        looked = 0.0
        try:
            while True:
                for event in self.events.new():
                    self._take(event)
                    if event["event"] in ("finished", "stopped"):
                        return event["event"] == "finished"
                if self._signalled():
                    return False
                if time.monotonic() > looked + LOOK:
                    self._reconcile()
                    looked = time.monotonic()
                time.sleep(PULSE)
        finally:
            self.link.child.stop(grace=5.0)
            self.run.stop.unlink(missing_ok=True)

    def _take(self, event: Event) -> None:
        if event["event"] == "round":
            self.failed_runs = 0
        if event["event"] == "broken":
            self.broken = event
        self.listener(event)

    def _signalled(self) -> bool:
        """Whether to leave now: at once where no round is under way, or at the second signal."""
        if not self.signals.count:
            return False
        self.run.stop.touch()
        return self.signals.count > 1 or not (self.submitted and self.link.child.running)

    def _reconcile(self) -> None:
        """Starts what does not run: the SuperLink first, then a run."""
        if not self.link.child.running:
            self.submitted = None
            if self.link.child.due and not self.signals.count:
                self._start_link()
        elif self.submitted is None:
            if time.monotonic() >= self.pause and not self.signals.count:
                self._submit()
        else:
            self._watch()

    def _start_link(self) -> None:
        if self.link.child.starts:
            self._note("restarted", what="superlink")
        self.link.start()
        self.link.prepare()
        ends = time.monotonic() + LISTENING
        while self.link.child.running and not listens("127.0.0.1", self.link.port) and time.monotonic() < ends:
            time.sleep(PULSE)
        try:
            if self.link.child.running and self.job.keys:
                self.link.register(self.job.keys.sites)
        except httpx.HTTPError as error:
            logger.warning("the SuperLink does not take the sites' keys: %s", error)
            self.link.child.kill()
        if self.link.child.running:
            self.gate.release()
        self._tell_services()

    def _submit(self) -> None:
        """A new Flower run. One that cannot be handed over now is tried again."""
        try:
            self.link.submit()
        except httpx.HTTPError as error:  # the SuperLink is starting, or has died just now
            logger.warning("the run could not be submitted: %s", error)
            self.pause = time.monotonic() + PAUSE
            return
        self.submitted, self.seen, self.broken = time.monotonic(), False, None

    def _watch(self) -> None:
        """Notices that the run under way has ended, with or without a word.

        One whose task Flower gave away without anybody taking it shows no ServerApp for a minute; a new run is
        quicker, and harmless, since one ServerApp at a time leads a run folder.
        """
        alive = self.link.child.has_living("flwr-serverapp")
        self.seen = self.seen or alive
        if alive or (not self.seen and time.monotonic() < (self.submitted or 0) + SHOWING * 2**self.failed_runs):
            return
        for event in self.events.new():
            self._take(event)
        self._ended()

    def _ended(self) -> None:
        """The run is over before its time: for good, or to be followed by another."""
        self.submitted, self.failed_runs = None, self.failed_runs + 1
        died = "its ServerApp died" if self.seen else "its ServerApp never started"
        reason = self.broken["reason"] if self.broken else died
        if (self.broken and self.broken["final"]) or self.failed_runs >= STUBBORN:
            raise RunFailed(reason, self.run.path)
        self.pause = time.monotonic() + (2.0**self.failed_runs if self.broken else 0.0)
        self._note("restarted", what="run", reason=reason)

    def _note(self, event: str, **fields: object) -> None:
        EventLog(self.run.path / "events.jsonl").emit(event, **fields)

    def _tell_services(self) -> None:
        pids = {"server": os.getpid(), "superlink": self.link.child.pid}
        health = f"127.0.0.1:{self.link.health_port}"
        services = {"gate": self.gate.address, "superlink_health": health, "pids": pids}
        write_services(self.run.path / "services.json", services)


class RunFailed(ColoraError, RuntimeError):
    """The federation cannot go on by itself."""

    def __init__(self, reason: str, folder: Path) -> None:
        super().__init__("run", "a federation that goes on", f"{reason} (see {folder / 'logs'} and events.jsonl)")


def initialize_run(run: RunFolder, recipe: Recipe, roster: tuple[RosterEntry, ...]) -> None:
    """Writes roster and recipe where there are none yet, after what can be checked at the coordinator."""
    if run.recipe.exists():
        return
    if recipe.server.quorum and recipe.server.quorum > len(roster):
        raise QuorumError("server.quorum", f"at most the {len(roster)} sites of the roster", recipe.server.quorum)
    write_atomically(run.roster, json.dumps([[member.site, member.from_round] for member in roster]).encode())
    write_atomically(run.recipe, tomli_w.dumps(to_dict(recipe)).encode())


def _endpoints(post: ServerJob) -> tuple[Callable[[str], Upstream], ListenAddress]:
    if post.keys is None:
        return (lambda url: Upstream(url, registration=True)), ListenAddress(post.host, post.port)
    files = post.keys.certificates
    known = frozenset(b64encode(point_of(key, name)).decode() for name, key in post.keys.sites.items())
    door = ListenAddress(post.host, post.port, files.certificate, files.key)
    return (lambda url: Upstream(url, files.ca, keys=known)), door
