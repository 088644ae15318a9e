"""The event log of a federation at a site: what the site's report and its trackers are made from.

It has the names and fields of the coordinator's log, for this site alone. A metric is as the site measured it, also
where ``[allow]`` withholds or rounds it. The log never leaves the site.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ...common.config.schema import Plan, to_dict
from ...common.event_log import EventLog
from ...common.foreign_text import clean
from ...common.protocol.types import PRELIMINARY, SiteInfo, TrainReply, TrainRequest
from ...common.versions import installed_versions

FILE = "events.jsonl"
ROWS = ("site", "task", "train", "test", "truncated", "dropped")
logger = logging.getLogger("colora.trainer")


class SiteEvents:
    """Appends to the ``events.jsonl`` of one federation. An event that cannot be written is logged, and work goes on.

    One thread at a time may use it.
    """

    def __init__(self, folder: Path, site: str, plan: Plan) -> None:
        self.path, self.site, self.plan = folder / FILE, site, plan

    def joined(self, info: SiteInfo) -> None:
        """The site has described itself, as it does whenever a coordinator starts or continues."""
        plan = self.plan
        self._emit(
            "started",
            federation=plan.name,
            method=plan.method.name,
            model=plan.model.source,
            rounds=plan.rounds,
            site=self.site,
            sites=[self.site],
            learning_rates=plan.train.learning_rates,
            settings=to_dict(plan),
            versions=installed_versions(),
        )
        steps = plan.train.steps_per_round(info.train)
        self._emit("joined", **{name: getattr(info, name) for name in ROWS}, steps=steps)

    def asked(self, request: TrainRequest) -> None:
        """A request has begun."""
        if request.kind == "finalize":
            self._emit("finalizing", round=request.round - 1, sites=[self.site], prepares=self.plan.transfer.prepare)
        elif request.kind == "train":
            self._emit("round_started", round=request.round, sites=[self.site])

    def replied(self, request: TrainRequest, reply: TrainReply, bytes_up: int) -> None:
        """A reply is about to be sent. ``bytes_up`` is its size, and ``reply`` has all its metrics."""
        t = 0 if request.kind in PRELIMINARY else request.round  # as in the coordinator's log
        self._emit(
            "reply",
            round=t,
            site=self.site,
            kind=request.kind,
            metrics=dict(reply.metrics),
            terms=reply.terms,
            fresh=reply.fresh,
            bytes_down=sum(array.nbytes for array in request.shared.values()),
            bytes_up=bytes_up,
            seconds=reply.seconds,
            measuring=reply.measuring,
        )
        if request.kind == "train":
            self._emit("round", round=t, admitted=[self.site], weights={}, residual=None, seconds=reply.seconds)
        elif request.kind == "finalize":
            self._emit("finalized", round=t - 1, sites=[self.site])
            self._emit("finished", seconds=0.0)

    def failed(self, t: int, reason: str) -> None:
        """The site answered with an error, in round ``t``. ``reason`` is the error in full."""
        self._emit("failed", round=t, site=self.site, reason=clean(reason), silent=False)

    def _emit(self, event: str, **fields: Any) -> None:
        try:
            EventLog(self.path).emit(event, **fields)
        except OSError as error:
            logger.warning("cannot write %s: %s", self.path, error.strerror or error)
