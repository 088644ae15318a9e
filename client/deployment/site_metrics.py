"""The metrics of a site for Prometheus, from its audit logs: what has left it, and what it refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ...common.foreign_text import clean
from ...common.processes.log_tail import FileTail
from ...common.prometheus import Metric
from ..trainer_service.audit_log import FILE, parse_line


@dataclass(frozen=True)
class _Answer:
    """What the metrics read of one line of an audit log."""

    federation: str
    kind: str
    size: float  # bytes
    time: float  # Unix time in seconds
    round: float | None  # of a reply


KINDS = {"reply": "replies", "error": "errors", "refusal": "refusals", "description": "joins", "sum": "sums"}


def site_metrics(state: Path, starts: Callable[[], dict[str, int]]) -> Callable[[], list[Metric]]:
    """Return a reader of the metrics of the site with this state folder, which takes the new lines at each call.

    ``starts`` returns how often each of the site's processes was started.
    """
    answers = Metric("colora_site_answers", "Answers to the coordinator.", ("federation", "kind"), kind="counter")
    sent = Metric("colora_site_sent_bytes", "Bytes of the answers.", ("federation",), kind="counter")
    last = Metric("colora_site_round", "Round of the last reply.", ("federation",))
    seen = Metric("colora_site_last_answer_timestamp_seconds", "Unix time of the last answer.", ("federation",))
    restarts = Metric("colora_site_restarts", "Restarts of a process.", ("component",), kind="counter")
    tails: dict[Path, FileTail] = {}

    def read() -> list[Metric]:
        for path in (state / FILE, *state.glob(f"*/{FILE}")):
            for line in tails.setdefault(path, FileTail(path, 0)).new().splitlines():
                answer = _answer(parse_line(line) or {})
                if answer is None:
                    continue
                answers.add(1, answer.federation, KINDS[answer.kind])
                sent.add(answer.size, answer.federation)
                seen.values[answer.federation,] = answer.time
                if answer.round is not None:
                    last.values[answer.federation,] = answer.round
        restarts.values = {(name,): float(max(count - 1, 0)) for name, count in starts().items()}
        return [answers, sent, last, seen, restarts]

    return read


def _answer(line: dict[str, Any]) -> _Answer | None:
    """Return what a line says; None for a damaged one, since one bad line must not end the metrics for good."""
    try:
        number = float(line["round"]) if line["kind"] == "reply" else None
        time = datetime.fromisoformat(line["time"]).timestamp()
        answer = _Answer(clean(line.get("federation", "")), line["kind"], float(line["bytes"]), time, number)
        is_whole = answer.kind in KINDS and all(map(math.isfinite, (answer.size, number or 0.0)))
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return None
    return answer if is_whole else None
