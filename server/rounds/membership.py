"""Who takes part: the sites that were met, judged by what all of them must have in common."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from ...common.errors import RefusedError
from ...common.protocol.types import SiteInfo
from ..reporting.events import EventRecorder
from .admission import admit_site
from .registry import ConnectedSite, NodeRegistry
from .run_options import RunOptions, StopRequested

GRACE = 30.0  # seconds for sites that are here to introduce themselves once there is a quorum without them
TOLD = ("site", "task", "train", "test", "truncated", "dropped")


class Membership:
    """``sites`` are those that fit. Who comes later, or comes back, is judged when it does."""

    def __init__(self, roll: NodeRegistry, names: Sequence[str], chronicle: EventRecorder, conduct: RunOptions) -> None:
        self.registry, self.names, self.chronicle, self.conduct = roll, names, chronicle, conduct
        self.sites: dict[str, ConnectedSite] = {}
        self._judged: dict[str, ConnectedSite] = {}
        self._common: dict[str, str] = {}
        self._missing: list[str] | None = None

    def wait_for_quorum(self, quorum: int, timeout: float | None) -> list[SiteInfo]:
        """Descriptions, once enough sites have introduced themselves and nobody who is here is still asked."""
        began = time.monotonic()
        limit = GRACE if self.conduct.deployed else timeout or float("inf")
        self.registry.refresh()
        while self.conduct.deployed and len(self.registry.connected) < quorum:
            self._tell(0)
            self._wait(quorum, list(self.registry.connected))
            self.registry.refresh()
        while self.registry.asking and time.monotonic() < began + limit:
            time.sleep(0.1)
            self.registry.refresh()
        return [self.registry.connected[name].info for name in self.names if name in self.registry.connected]

    def pin(self, pins: dict[str, str], layout: str, quorum: int, t: int) -> None:
        """From now on sites are judged by these fingerprints and this layout. Raises QuorumError, Stopped."""
        self._common = {**pins, "layout": layout}
        self.update(t)
        while len(self.sites) < quorum and self.conduct.deployed:
            self._wait(quorum, list(self.sites))
            self.update(t)
        self.chronicle.require_quorum(quorum, list(self.sites), "join")

    def update(self, t: int) -> None:
        """Takes in the sites that came, or came back, since; waits for none."""
        self.registry.refresh()
        self.admit(t)

    def can_train(self, site: str) -> bool:
        """Whether a site is here and learns; one with no examples to train on is asked at the close only."""
        return site in self.sites and self.sites[site].info.train > 0

    def admit(self, t: int) -> None:
        """Admits to the federation who fits it, and tells who does not."""
        self._tell(t)
        for name in self.names:
            present = self.registry.connected.get(name)
            if present is None or present is self._judged.get(name):
                continue
            self._judged[name] = present
            self.sites.pop(name, None)
            try:
                admit_site(present.info, self._common)
            except RefusedError as error:
                self.chronicle.refused(t, error)
                continue
            self.sites[name] = present
            told = dataclasses.asdict(present.info)
            self.chronicle.emit("joined", **{key: told[key] for key in TOLD})

    def _tell(self, t: int) -> None:
        for name, reason in self.registry.failures:
            self.chronicle.failed(t, name, reason)
        for error in self.registry.refusals:
            self.chronicle.refused(t, error)
        self.registry.failures.clear()
        self.registry.refusals.clear()

    def _wait(self, quorum: int, present: list[str]) -> None:
        """A second of patience, told once for each set of missing sites. Raises Stopped."""
        if self.conduct.should_stop():
            raise StopRequested
        missing = [name for name in self.names if name not in present]
        if self._missing != missing:
            self._missing = missing
            self.chronicle.emit("waiting", when="join", quorum=quorum, present=present, missing=missing)
        time.sleep(1.0)
