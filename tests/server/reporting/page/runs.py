"""Event logs of made-up runs, whose numbers a test can work out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from colora.server.reporting.page.build import build_page
from colora.server.reporting.page.fold import make_history, read_history
from colora.server.reporting.page.history import History

Event = dict[str, Any]
UP, DOWN, WORK = 1000, 3000, 2.0  # cost of every reply


def started(sites: list[str], rounds: int, **more: Any) -> Event:
    settings = {"name": "demo", "rounds": rounds, "train": {"lr": 0.005}}
    fields = {"federation": "demo", "method": "colora", "model": "m", "rounds": rounds, "sites": sites}
    versions = {"colora": "0.1.0", "flwr": "1.42.0"}
    return {"event": "started", **fields, "settings": settings, "versions": versions, "recipe": "abc", **more}


def joined(site: str, task: str = "classification", **more: Any) -> Event:
    return {
        "event": "joined",
        "site": site,
        "task": task,
        "train": 8,
        "test": 100,
        "truncated": 2,
        "dropped": 1,
        **more,
    }


def reply(site: str, t: int, metrics: dict[str, float | None], **more: Any) -> Event:
    cost = {"bytes_up": UP, "bytes_down": DOWN, "seconds": WORK, "measuring": 0.5}
    return {"event": "reply", "round": t, "site": site, "kind": "train", "metrics": metrics, **cost, **more}


def ended(t: int, sites: Iterable[str], **more: Any) -> Event:
    sites = list(sites)
    weights = dict.fromkeys(sites, 8.0)
    return {
        "event": "round",
        "round": t,
        "admitted": sites,
        "weights": weights,
        "residual": 0.1,
        "seconds": 5.0,
        **more,
    }


def timed(events: Iterable[Event], start: float = 1.8e9) -> list[Event]:
    """The events, one second apart."""
    return [{"time": start + i, **event} for i, event in enumerate(events)]


def run(results: dict[str, tuple[float, float]], rounds: int = 3, metric: str = "accuracy", **task: Any) -> list[Event]:
    """A finished run: site → (alone, personal). In round t a site measures t % less than at the end."""
    sites = list(results)
    events = [
        started(sites, rounds),
        *(joined(site, **task) for site in sites),
        {"event": "agreed", "weights": "tokens"},
    ]
    for t in range(1, rounds + 1):
        events.append({"event": "round_started", "round": t, "sites": sites})
        for site, (alone, personal) in results.items():
            measured = {"base": alone / 2, "shared": personal - 0.02, "personal": personal * (100 - t) / 100}
            metrics = {f"{mode}.{metric}": value for mode, value in measured.items()}
            events.append(reply(site, t, {**metrics, "train.loss": 1 / t}))
        events.append(ended(t, sites))
    events.append({"event": "finalizing", "round": rounds, "sites": sites, "prepares": False})
    for site, (_, personal) in results.items():
        metrics = {f"shared.{metric}": personal - 0.02, f"personal.{metric}": personal}
        events.append(reply(site, rounds + 1, metrics, kind="finalize"))
    return timed(
        [*events, {"event": "finalized", "round": rounds, "sites": sites}, {"event": "finished", "seconds": 60.0}]
    )


def baseline(
    results: dict[str, tuple[float, float]], errors: dict[str, float], rounds: int = 3, metric: str = "accuracy"
) -> list[Event]:
    """The baseline of such a run, with the standard errors of some gains."""
    events: list[Event] = [started(list(results), rounds, method="local")]
    for site, (alone, _) in results.items():
        events += [reply(site, t, {"train.loss": 0.5 / t}) for t in range(1, rounds + 1)]
        events.append(reply(site, rounds + 1, {f"personal.{metric}": alone}, kind="finalize"))
    events.append({"event": "finished", "seconds": 40.0})
    for site, error in errors.items():
        alone, personal = results[site]
        gained = alone - personal if metric == "relative_error" else personal - alone
        events.append({"event": "compared", "site": site, "gain": gained, "standard_error": error, "rows": 100})
    return timed(events, 1.8e9 + 1000)


def write(folder: Path, events: Iterable[Event], alone: Iterable[Event] = ()) -> Path:
    """Write a run folder and its baseline."""
    for path, log in ((folder, list(events)), (folder / "baseline", list(alone))):
        if log:
            path.mkdir(parents=True, exist_ok=True)
            (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in log), encoding="utf-8")
    return folder


def history_of(events: Iterable[Event], alone: Iterable[Event] = ()) -> History:
    return make_history([*events, *({**event, "baseline": True} for event in alone)])


def page_of(*folders: Path) -> str:
    return build_page([read_history(folder, folder.name) for folder in folders])
