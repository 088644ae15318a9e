"""The metrics of a site for Prometheus, from its audit logs: what has left it, and what it refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from ...common.processes.log_tail import FileTail
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
    tails: dict[Path, FileTail] = {}

    def read() -> list[Metric]:
        for path in (state / FILE, *state.glob(f"*/{FILE}")):
            for line in map(json.loads, tails.setdefault(path, FileTail(path, 0)).new().splitlines()):
                federation = str(line.get("federation", ""))
                answers.add(1, federation, KINDS[line["kind"]])
                sent.add(line["bytes"], federation)
                seen.values[federation,] = datetime.fromisoformat(line["time"]).timestamp()
                if line["kind"] == "reply":
                    last.values[federation,] = line["round"]
        restarts.values = {(name,): float(max(count - 1, 0)) for name, count in starts().items()}
        return [answers, sent, last, seen, restarts]

    return read
