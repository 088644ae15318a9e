"""Membership of a federation: which connected sites fit what all sites must have in common."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

from ...common.config.schema import TrainSettings
from ...common.errors import RefusedError
from ...common.protocol.types import ROWS_OF_SITE, SiteInfo
from ..reporting.events import EventRecorder
from .admission import admit_site
from .dispatch import NOTICE
from .registry import ConnectedSite, NodeRegistry
from .run_options import RunOptions, StopRequested

GRACE = 30.0  # seconds to wait for further join replies once the quorum has joined (deployed)


class Membership:
    """The admitted sites, by name in ``sites``. Sites that connect later, or reconnect, are checked when they do."""

    def __init__(
        self,
        registry: NodeRegistry,
        train: TrainSettings,
        names: Sequence[str],
        recorder: EventRecorder,
        options: RunOptions,
    ) -> None:
        self.registry, self.names, self.recorder, self.options = registry, names, recorder, options
        self.train = train
        self.sites: dict[str, ConnectedSite] = {}
        self._checked: dict[str, ConnectedSite] = {}
        self._expected: dict[str, str] = {}
        self._tasks: Mapping[str, str] = {}
        self._missing: list[str] | None = None
        self._missing_since = self._notice = 0.0  # monotonic time, and seconds until the missing sites are told again

    def wait_for_quorum(self, quorum: int, timeout: float | None) -> list[SiteInfo]:
        """Wait until enough sites have joined and no join request is open; return their descriptions.

        A simulation, whose sites answer one after the other, waits ``timeout`` seconds per site at most for open join
        requests, and never for offline sites. Raises StopRequested.
        """
        began, limit = time.monotonic(), GRACE
        if not self.options.deployed:
            limit = max(GRACE, timeout * len(self.names)) if timeout else float("inf")
        self.registry.refresh()
        while self.options.deployed and len(self.registry.connected) < quorum:
            self._report_failures(0)
            self._wait(quorum, list(self.registry.connected))
            self.registry.refresh()
        while self.registry.asking and time.monotonic() < began + limit:
            time.sleep(0.1)
            self.registry.refresh()
        return [self.registry.connected[name].info for name in self.names if name in self.registry.connected]

    def pin(self, pins: dict[str, str], layout: str, quorum: int, t: int) -> None:
        """Check all sites against these fingerprints and this layout from now on.

        Raises QuorumError when too few sites fit (a deployed coordinator waits for more), or StopRequested.
        """
        self._expected = {**pins, "layout": layout}
        self.update(t)
        while len(self.sites) < quorum and self.options.deployed:
            self._wait(quorum, list(self.sites))
            self.update(t)
        self.recorder.require_quorum(quorum, list(self.sites), "join")

    def require_tasks(self, tasks: Mapping[str, str], t: int) -> None:
        """Refuse, now and from now on, each site that claims another task than the one in ``tasks``, by site."""
        self._tasks = tasks
        for name, connected in list(self.sites.items()):
            if not self._fits(connected, t):
                del self.sites[name]

    def update(self, t: int) -> None:
        """Admit sites that connected or reconnected since the last call, without waiting."""
        self.registry.refresh()
        self.admit(t)

    def can_train(self, site: str) -> bool:
        """Whether a site is admitted and has training examples. A site without any only evaluates at the end."""
        return site in self.sites and self.sites[site].info.train > 0

    def admit(self, t: int) -> None:
        """Check the sites that the registry has found, admit those that fit, and record the others as refused."""
        self._report_failures(t)
        for name in self.names:
            connected = self.registry.connected.get(name)
            if connected is None or connected is self._checked.get(name):
                continue
            self._checked[name] = connected
            self.sites.pop(name, None)
            if not self._fits(connected, t):
                continue
            self.sites[name] = connected
            info = dataclasses.asdict(connected.info)
            steps = self.train.steps_per_round(connected.info.train)
            self.recorder.emit("joined", **{key: info[key] for key in ROWS_OF_SITE}, steps=steps)

    def _fits(self, connected: ConnectedSite, t: int) -> bool:
        """Whether a site has what all must have in common. If not, its refusal is recorded."""
        task = self._tasks.get(connected.site)
        try:
            admit_site(connected.info, {**self._expected, **({"task": task} if task else {})})
        except RefusedError as error:
            self.recorder.refused(t, error)
            return False
        return True

    def _report_failures(self, t: int) -> None:
        for name, reason in self.registry.failures:
            self.recorder.failed(t, name, reason)
        for error in self.registry.refusals:
            self.recorder.refused(t, error)
        self.registry.failures.clear()
        self.registry.refusals.clear()

    def _wait(self, quorum: int, present: list[str]) -> None:
        """Sleep for a second; record the missing sites when they change, and again after one, two, four, … minutes.

        Raises StopRequested.
        """
        if self.options.should_stop():
            raise StopRequested
        missing = [name for name in self.names if name not in present]
        who, now = {"quorum": quorum, "present": present, "missing": missing}, time.monotonic()
        if self._missing != missing:
            self._missing, self._missing_since, self._notice = missing, now, NOTICE
            self.recorder.emit("waiting", when="join", **who)
        elif now - self._missing_since > self._notice:
            self._notice *= 2
            self.recorder.emit("waiting", when="join", **who, seconds=round(now - self._missing_since))
        time.sleep(1.0)
