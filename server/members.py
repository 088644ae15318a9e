"""Who takes part: the sites that were met, judged by what all of them must have in common."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from ..common.errors import RefusedError
from ..common.protocol import Description
from .admission import admit_site
from .chronicle import Chronicle
from .conduct import Conduct, Stopped
from .roll import Present, Roll

GRACE = 30.0  # seconds for sites that are here to introduce themselves once there is a quorum without them
TOLD = ("site", "task", "train", "test", "truncated", "dropped")


class Members:
    """``sites`` are those that fit. Who comes later, or comes back, is judged when it does."""

    def __init__(self, roll: Roll, names: Sequence[str], chronicle: Chronicle, conduct: Conduct) -> None:
        self.roll, self.names, self.chronicle, self.conduct = roll, names, chronicle, conduct
        self.sites: dict[str, Present] = {}
        self._judged: dict[str, Present] = {}
        self._common: dict[str, str] = {}
        self._missing: list[str] | None = None

    def gather(self, quorum: int, timeout: float | None) -> list[Description]:
        """Descriptions, once enough sites have introduced themselves and nobody who is here is still asked."""
        began = time.monotonic()
        limit = GRACE if self.conduct.enduring else timeout or float("inf")
        self.roll.look()
        while self.conduct.enduring and len(self.roll.met) < quorum:
            self._tell(0)
            self._wait(quorum, list(self.roll.met))
            self.roll.look()
        while self.roll.asking and time.monotonic() < began + limit:
            time.sleep(0.1)
            self.roll.look()
        return [self.roll.met[name].description for name in self.names if name in self.roll.met]

    def agree(self, pins: dict[str, str], layout: str, quorum: int, t: int) -> None:
        """From now on sites are judged by these fingerprints and this layout. Raises QuorumError, Stopped."""
        self._common = {**pins, "layout": layout}
        self.meet(t)
        while len(self.sites) < quorum and self.conduct.enduring:
            self._wait(quorum, list(self.sites))
            self.meet(t)
        self.chronicle.need(quorum, list(self.sites), "join")

    def meet(self, t: int) -> None:
        """Takes in the sites that came, or came back, since; waits for none."""
        self.roll.look()
        self.judge(t)

    def trains(self, site: str) -> bool:
        """Whether a site is here and learns; one with no examples to train on is asked at the close only."""
        return site in self.sites and self.sites[site].description.train > 0

    def judge(self, t: int) -> None:
        """Admits to the federation who fits it, and tells who does not."""
        self._tell(t)
        for name in self.names:
            present = self.roll.met.get(name)
            if present is None or present is self._judged.get(name):
                continue
            self._judged[name] = present
            self.sites.pop(name, None)
            try:
                admit_site(present.description, self._common)
            except RefusedError as error:
                self.chronicle.refused(t, error)
                continue
            self.sites[name] = present
            told = dataclasses.asdict(present.description)
            self.chronicle.tell("joined", **{key: told[key] for key in TOLD})

    def _tell(self, t: int) -> None:
        for name, reason in self.roll.failures:
            self.chronicle.failed(t, name, reason)
        for error in self.roll.refusals:
            self.chronicle.refused(t, error)
        self.roll.failures.clear()
        self.roll.refusals.clear()

    def _wait(self, quorum: int, present: list[str]) -> None:
        """A second of patience, told once for each set of missing sites. Raises Stopped."""
        if self.conduct.stop():
            raise Stopped
        missing = [name for name in self.names if name not in present]
        if self._missing != missing:
            self._missing = missing
            self.chronicle.tell("waiting", when="join", quorum=quorum, present=present, missing=missing)
        time.sleep(1.0)
