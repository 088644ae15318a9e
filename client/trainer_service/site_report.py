"""The lines of the trainer's log that ``colora client`` shows on the site's terminal.

They are the site's own: they may quote its rows, and nothing of them is sent.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ...common.dataset import TASKS, SiteDataset
from ...common.protocol.types import PRELIMINARY, VALIDATION_LOSS, TrainReply, TrainRequest
from ..data.label_counts import describe_rows

logger = logging.getLogger("colora.report")
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
SHOWN = re.compile(r"(?:(?:WARNING|ERROR) colora\.\w+|INFO colora\.report): (?P<text>.*)")


END = "has ended after round"  # in the report that a site's last reply of a federation was made


def report_rows(rows: SiteDataset) -> None:
    """Report the numbers of training and test rows by label."""
    logger.info("site %s: %s", rows.site, describe_rows(rows))


def report_reply(request: TrainRequest, reply: TrainReply, *, task: str, steps: int | None, sent: int) -> None:
    """Report a round in which the site took part. ``steps`` is None for a stored reply, ``sent`` is in bytes."""
    if request.kind in PRELIMINARY:
        place = "before round 1"
    else:
        places = {"finalize": "final personalization", "validate": f"validation after round {reply.round - 1}"}
        place = places.get(request.kind, f"round {reply.round}")
    metric = f"personal.{TASKS[task].primary_metric}"
    loss = reply.metrics.get("train.loss", reply.metrics.get(VALIDATION_LOSS))
    numbers = {"loss": loss, metric: reply.metrics.get(metric)}
    results = [f"{name} {value:.4f}" for name, value in numbers.items() if value is not None]
    measuring = f" (of which measuring {reply.measuring:.1f} s)" if reply.measuring else ""
    work = ["stored reply"] if steps is None else [f"{steps} steps", f"{reply.seconds:.1f} s{measuring}"]
    logger.info("%s %s: %s", reply.federation, place, ", ".join([*results, *work, f"{sent} bytes sent"]))


def report_end(federation: str, last: int, folder: Path) -> None:
    """Report that the site's last reply of a federation was made, after round ``last``."""
    logger.info(
        "%s %s %d and the final personalization. The site's model is in %s, for colora export and "
        "colora predict. colora client waits for another federation; Ctrl-C stops it.",
        federation,
        END,
        last,
        folder,
    )
