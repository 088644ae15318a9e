"""Which plans a coordinator has sent that a person should look at: unusual ones, and refused ones.

The trainer writes both into its audit logs (``client/trainer_service/audit_log.py``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ....common.foreign_text import clean
from ...trainer_service.audit_log import FILE, parse_line

MAX_FEDERATIONS, MAX_TEXT = 5, 400  # shown
QUIET = "none that is unusual, none refused"


def check_plans(state: Path) -> str:
    """Describe the plans outside the ordinary limits of ``colora provision``, and the refusals."""
    unusual = list(_unusual(state))
    parts = [f"LOOK at {clean(name)}: {'; '.join(found)}" for name, found in unusual[:MAX_FEDERATIONS]]
    if len(unusual) > MAX_FEDERATIONS:
        parts.append(f"and {len(unusual) - MAX_FEDERATIONS} more federations")
    refusals = [line for line in _lines(state / FILE) if line.get("kind") == "refusal"]
    if refusals:
        last = refusals[-1]
        reason, when = clean(last.get("reason", ""), MAX_TEXT), clean(last.get("time", ""))
        parts.append(f"{len(refusals)} refused, the last at {when}: {reason}")
    return ". ".join(parts) if parts else QUIET


def _unusual(state: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the federations whose last plan was unusual, and what was unusual."""
    for path in sorted(state.glob(f"*/{FILE}")):
        last = deque(_lines(path), maxlen=1)
        found = last[0].get("unusual", []) if last else []
        if isinstance(found, list) and found:
            yield path.parent.name, [clean(each, MAX_TEXT) for each in found]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of an audit log; a line that a kill has torn is skipped."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if found := parse_line(line):
                yield found
