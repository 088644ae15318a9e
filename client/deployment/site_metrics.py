"""The metrics of a site for Prometheus, from its audit logs: what has left it, and what it refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from ...common.prometheus import Metric
from ..trainer_service.audit_log import FILE

KINDS = {"reply": "replies", "error": "errors", "refusal": "refusals", "description": "joins"}


def site_metrics(state: Path, starts: Callable[[], dict[str, int]]) -> Callable[[], list[Metric]]:
    """Return a reader of the metrics of the site with this state folder, which takes the new lines at each call.

    ``starts`` returns how often each of the site's processes was started.
    """
    answers = Metric("colora_site_answers", "Answers to the coordinator.", ("federation", "kind"), kind="counter")
    sent = Metric("colora_site_sent_bytes", "Bytes of the answers.", ("federation",), kind="counter")
    last = Metric("colora_site_round", "Round of the last reply.", ("federation",))
    seen = Metric("colora_site_last_answer_timestamp_seconds", "Unix time of the last answer.", ("federation",))
    restarts = Metric("colora_site_restarts", "Restarts of a process.", ("component",), kind="counter")
    offsets: dict[Path, int] = {}

    def read() -> list[Metric]:
        for path in (state / FILE, *state.glob(f"*/{FILE}")):
            for line in _new_lines(path, offsets):
                federation = str(line.get("federation", ""))
                answers.add(1, federation, KINDS[line["kind"]])
                sent.add(line["bytes"], federation)
                seen.values[federation,] = datetime.fromisoformat(line["time"]).timestamp()
                if line["kind"] == "reply":
                    last.values[federation,] = line["round"]
        restarts.values = {(name,): float(max(count - 1, 0)) for name, count in starts().items()}
        return [answers, sent, last, seen, restarts]

    return read


def _new_lines(path: Path, offsets: dict[Path, int]) -> Iterator[dict[str, Any]]:
    """Yield the whole lines since the last call. A log that has become shorter was begun anew."""
    try:
        start = offsets.get(path, 0) if path.stat().st_size >= offsets.get(path, 0) else 0
        with path.open("rb") as file:
            file.seek(start)
            whole, newline, _ = file.read().rpartition(b"\n")
    except OSError:
        return
    offsets[path] = start + len(whole) + len(newline)
    yield from map(json.loads, whole.splitlines())
