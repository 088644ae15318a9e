"""The event log of a federation at a site: what the site's report and its trackers are made from.

It has the names and fields of the coordinator's log, for this site alone. A metric is as the site measured it, also
where ``[allow]`` withholds or rounds it. The trainer never sends the log.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from ...common.config.schema import Plan, to_dict
from ...common.event_log import EventLog
from ...common.foreign_text import clean
from ...common.protocol.limits import measured
from ...common.protocol.types import PRELIMINARY, ROWS_OF_SITE, SiteInfo, TrainReply, TrainRequest
from ...common.versions import installed_versions

FILE = "events.jsonl"
MAX_REASON = 1000  # characters of an error
logger = logging.getLogger("colora.trainer")


def _never_raises(record: Callable[..., None]) -> Callable[..., None]:
    """Log an error of any kind instead of raising it: a record that cannot be written must not cost a reply."""

    @wraps(record)
    def recorded(self: SiteEvents, *arguments: Any) -> None:
        try:
            record(self, *arguments)
        except Exception as error:
            logger.warning("cannot write %s: %s", self.path, clean(error))

    return recorded


class SiteEvents:
    """Appends to the ``events.jsonl`` of one federation, which only this user can read.

    No method raises. One thread at a time may use it.
    """

    def __init__(self, folder: Path, site: str, plan: Plan) -> None:
        self.path, self.site, self.plan = folder / FILE, site, plan

    @_never_raises
    def joined(self, info: SiteInfo, is_new: bool = True) -> None:
        """Record that the site has described itself, as it does whenever a coordinator starts or continues.

        The settings are left out if the plan is not new: they are the coordinator's text, which may be long.
        """
        plan = self.plan
        settings = {"settings": to_dict(plan)} if is_new else {}
        self._emit(
            "started",
            federation=plan.name,
            method=plan.method.name,
            model=plan.model.source,
            rounds=plan.rounds,
            site=self.site,
            sites=[self.site],
            learning_rates=plan.train.learning_rates,
            **settings,
            versions=installed_versions(),
        )
        steps = plan.train.steps_per_round(info.train)
        self._emit("joined", **{name: getattr(info, name) for name in ROWS_OF_SITE}, steps=steps)

    @_never_raises
    def began(self, request: TrainRequest) -> None:
        """Record that work on a request begins."""
        if request.kind == "finalize":
            self._emit("finalizing", round=request.round - 1, sites=[self.site], prepares=self.plan.transfer.prepare)
        elif request.kind == "train":
            self._emit("round_started", round=request.round, sites=[self.site])

    @_never_raises
    def replied(self, request: TrainRequest, reply: TrainReply, bytes_up: int) -> None:
        """Record a reply that is about to be sent. ``bytes_up`` is its size, and ``reply`` has all its metrics."""
        number = 0 if request.kind in PRELIMINARY else request.round  # as in the coordinator's log
        self._emit(
            "reply",
            round=number,
            site=self.site,
            kind=request.kind,
            metrics=measured(reply.metrics),
            terms=reply.terms,
            fresh=reply.fresh,
            bytes_down=sum(array.nbytes for array in request.shared.values()),
            bytes_up=bytes_up,
            seconds=reply.seconds,
            measuring=reply.measuring,
        )
        if request.kind == "train":
            self._emit("round", round=number, admitted=[self.site], weights={}, residual=None, seconds=reply.seconds)
        elif request.kind == "finalize":
            self._emit("finalized", round=number - 1, sites=[self.site])
            self._emit("finished", seconds=0.0)

    @_never_raises
    def failed(self, number: int, reason: str) -> None:
        """Record that the answer to a request of this round is an error. ``reason`` is the error in full."""
        self._emit("failed", round=number, site=self.site, reason=clean(reason, MAX_REASON), silent=False)

    def _emit(self, event: str, **fields: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        EventLog(self.path).emit(event, **fields)
