"""What a coordinator has asked of this site, on disk: the requests of a day, and those that got metrics.

Both files exist only where ``[allow]`` has the limit. They are written before a request runs or its metrics are sent,
so that a restart of the trainer gives no request back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from ...common.atomic_io import write_atomically
from ...common.config.site_schema import SiteSettings
from ...common.errors import RefusedError, StateError

REQUESTS = "requests.json"  # in the state folder: the day, and the keys of its requests
EVALUATIONS = "evaluations.json"  # in a federation's folder: by round, the keys of the requests that got metrics
Keys = dict[str, list[str]]


def check_requests_of_day(site: SiteSettings, key: str) -> None:
    """Count a request that is about to run. Raises RefusedError at ``allow.max_requests_per_day``.

    The limit holds for all federations together, since a coordinator could name a new one for each request.
    """
    limit, path = site.allow.max_requests_per_day, Path(site.trainer.state) / REQUESTS
    if limit is None:
        return
    day = _today()
    keys = _read(path).get(day, [])
    if key in keys:
        return
    if len(keys) >= limit:
        expected = f"at most {limit} a day (UTC)"
        raise RefusedError("allow.max_requests_per_day", expected, len(keys) + 1, site=site.name)
    _write(path, {day: [*keys, key]})


def may_send_metrics(site: SiteSettings, folder: Path, place: str, key: str) -> bool:
    """Whether the reply to this request may hold metrics, by ``allow.max_evaluations``; if so, this is recorded.

    ``place`` is the round, or the validation of one. A coordinator that asks for it again with another adapter gets an
    update, but no second measurement.
    """
    limit = site.allow.max_evaluations
    if limit is None:
        return True
    path = folder / EVALUATIONS
    rounds = _read(path)
    keys = rounds.get(place, [])
    if key in keys:
        return True
    if len(keys) >= limit:
        return False
    _write(path, {**rounds, place: [*keys, key]})
    return True


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _read(path: Path) -> Keys:
    """The recorded keys. Raises StateError for a damaged file, which could hide requests."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and all(map(_are_texts, found.values())):
        return found
    raise StateError(
        str(path),
        "lists of keys",
        "something else",
        message=f"{path} is damaged, so the limits on requests cannot be checked.",
        hint="Restore the file, or delete it to count from zero.",
    )


def _are_texts(keys: object) -> bool:
    return isinstance(keys, list) and all(isinstance(key, str) for key in keys)


def _write(path: Path, keys: Mapping[str, list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomically(path, json.dumps(keys).encode())
