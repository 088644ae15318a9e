"""The fields that readers rely on in each kind of event, and their types. A line without them is not an event."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from ...common.event_log import in_range

Check = Callable[[Any], bool]


def _number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and in_range(value)  # the log has null for any other


def _count(value: Any) -> bool:
    return isinstance(value, int) and _number(value) and value >= 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _lists_of_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_names, value))


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _values(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _table(value: Any) -> bool:
    return isinstance(value, dict)


def _tests(value: Any) -> bool:
    """Tests of a division: two groups and a p-value each."""
    return isinstance(value, list) and all(
        isinstance(test, dict)
        and _lists_of_names(test.get("groups"))
        and len(test["groups"]) == 2
        and _number(test.get("p_value"))
        for test in value
    )


_ROUND, _SITE, _SITES, _REASON = {"round": _count}, {"site": _text}, {"sites": _names}, {"reason": _text}
_ROWS = dict.fromkeys(("train", "test", "truncated", "dropped"), _count)
REQUIRED: Mapping[str, Mapping[str, Check]] = {
    "started": {"federation": _text, "method": _text, "model": _text, "rounds": _count, **_SITES},
    "extended": {"rounds": _count, "before": _count, "inexact": _optional(_text)},
    "resumed": _ROUND,
    "transfer_started": {"source_federation": _text, **_SITES},
    "site_ready": _SITE,
    "joined": {**_SITE, "task": _text, **_ROWS},
    "agreed": {"weights": _text},
    "grouped": {"groups": _lists_of_names, "cosines": _values(_values(_optional(_number)))},
    "round_started": {**_ROUND, **_SITES},
    "reply": {
        **_ROUND,
        **_SITE,
        "metrics": _values(_optional(_number)),
        **dict.fromkeys(("bytes_down", "bytes_up"), _count),
        "seconds": _number,
    },
    "failed": {**_ROUND, "site": _optional(_text), "reason": _optional(_text)},
    "refused": {**_ROUND, "site": _optional(_text), **_REASON},
    "clipped": {**_ROUND, **_SITE, "norm": _optional(_number), "bound": _optional(_number)},
    "distant": {**_ROUND, **_SITE},
    "secure_sum": {
        **_ROUND,
        **_SITES,
        "dropped": _names,
        "threshold": _count,
        **dict.fromkeys(("bytes_up", "bytes_down"), _values(_count)),
    },
    "noised": {
        **_ROUND,
        "sites": _count,
        "clipped": _values(_optional(_number)),
        **dict.fromkeys(("bound", "noise", "epsilon", "delta"), _number),
        "budget": _optional(_number),
    },
    "budget_spent": _ROUND,
    "late": {**_ROUND, **_SITE, **_REASON},
    "round": {**_ROUND, "admitted": _names, "weights": _values(_number), "seconds": _number},
    "validated": {**_ROUND, "losses": _values(_optional(_number)), "loss": _optional(_number), "best": _count},
    "selected": {**_ROUND, "kept": _count, "early": lambda value: isinstance(value, bool)},
    "finalizing": {**_ROUND, **_SITES, "prepares": lambda value: isinstance(value, bool)},
    "finalized": {**_ROUND, **_SITES},
    "compared": {**_SITE, "gain": _optional(_number), "standard_error": _optional(_number)},
    "finished": {"seconds": _number},
    "run_failed": {**_REASON, "final": lambda value: isinstance(value, bool)},
    "restarted": {"what": _text},
    "tracker_failed": {"tracker": _text, **_REASON},
}
OPTIONAL: Mapping[str, Mapping[str, Check]] = {  # where present
    "resumed": {"damaged": _names},
    "started": {"learning_rates": _values(_optional(_number)), "settings": _table, "versions": _values(_text), **_SITE},
    "joined": {"steps": _count, "rank": _count},
    "grouped": {"tests": _tests},
    "reply": {"measuring": _number, "kind": _text, "whole": lambda value: isinstance(value, bool)},
    "round": {"residual": _optional(_number)},
    "waiting": {
        "when": _text,
        "round": _count,
        "missing": _names,
        "offline": _names,
        "present": _names,
        "quorum": _count,
        "seconds": _number,
        "reason": _text,
    },
    "failed": {"silent": lambda value: isinstance(value, bool)},
    "restarted": {"reason": _optional(_text)},
}


def _says_for_what(event: Mapping[str, Any]) -> bool:
    """Whether a waiting event names the sites and the quorum that it waits for, or else a reason."""
    return event.keys() >= {"missing", "present", "quorum"} or ("reason" in event and "offline" not in event)


def is_event(value: Any) -> bool:
    """Whether a parsed line is an event: a name, a finite time, and the fields of its kind."""
    if not isinstance(value, dict) or not _text(value.get("event")) or not _number(value.get("time")):
        return False
    required, optional = (table.get(value["event"], {}) for table in (REQUIRED, OPTIONAL))
    if value["event"] == "waiting" and not _says_for_what(value):
        return False
    return all(name in value and check(value[name]) for name, check in required.items()) and all(
        check(value[name]) for name, check in optional.items() if name in value
    )


def parse_event(line: bytes) -> dict[str, Any] | None:
    """Return the event in a line of an event log; None if the line is not an event."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if is_event(value) else None
