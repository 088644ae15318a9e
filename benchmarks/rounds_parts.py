"""Compute the seconds of each round, and of its parts, from the marks of all processes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

EMPTY_PULL = "pull nothing"


@dataclass(frozen=True)
class Span:
    """A marked function call in a process: begin and end in seconds since 1970, and CPU seconds."""

    pid: int
    name: str
    begin: float
    end: float
    cpu: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class Round:
    """Seconds of one round.

    ``work`` is the optimizer steps and evaluation of the slowest site, ``parts`` the rest along the slower site, and
    ``cpu`` the CPU seconds of all ClientApp processes and trainers without ``work``.
    """

    seconds: float
    work: float
    cpu: float
    parts: dict[str, float]

    @property
    def beyond(self) -> float:
        return self.seconds - self.work


def read_rounds(path: Path, rounds: int) -> list[Round]:
    """Return all rounds but the first, which waits for sites and compiles byte code."""
    spans = _spans(path)
    ends = [span.end for span in spans if span.name == "round"][:rounds]
    if len(ends) < rounds:
        raise SystemExit(f"only {len(ends)} of {rounds} rounds ended")
    return [_round(spans, begin, end) for begin, end in pairwise(ends)]


def _spans(path: Path) -> list[Span]:
    begun: dict[tuple[int, str], dict] = {}
    spans = []
    for mark in sorted(map(json.loads, path.read_text().splitlines()), key=lambda mark: mark["time"]):
        pid, name = mark["pid"], mark["name"]
        if mark["end"]:
            first = begun.pop((pid, "pull" if name == EMPTY_PULL else name))
            spans.append(Span(pid, name, first["time"], mark["time"], mark["cpu"] - first["cpu"]))
        else:
            begun[pid, name] = mark
    return sorted(spans, key=lambda span: span.end)


def _round(all_spans: Sequence[Span], begin: float, end: float) -> Round:
    spans = [s for s in all_spans if begin <= s.begin < end and (s.end <= end or s.name == "process")]
    work, before, parts = 0.0, begin, defaultdict[str, float](float)
    for phase in _phases(spans):
        own: dict[int, float] = defaultdict(float)
        for span in phase:
            own[span.pid] += span.seconds if span.name == "work" else 0.0
        work += max(own.values())
        pushed = min(span.begin for span in phase if span.name == "push")
        pulled = max(span.end for span in phase if span.name == "pull")
        parts["coordinator: aggregation, checkpoint, requests"] += pushed - before
        for name, seconds in _path(phase, pushed, pulled).items():
            parts[name] += seconds
        before = pulled
    parts["coordinator: aggregation, checkpoint, requests"] += end - before
    cpu = {name: sum(span.cpu for span in spans if span.name == name) for name in ("process", "trainer", "work")}
    return Round(end - begin, work, cpu["process"] + cpu["trainer"] - cpu["work"], dict(parts))


def _phases(spans: Sequence[Span]) -> list[list[Span]]:
    """Split spans into phases, from first request to last reply; a push after a pull begins the next phase."""
    ordered = sorted(spans, key=lambda span: span.begin)
    starts = []
    last = "pull"
    for span in ordered:
        if span.name in ("push", "pull"):
            if span.name == "push" and last == "pull":
                starts.append(span.begin)
            last = span.name
    borders = [*starts, float("inf")]
    return [[s for s in ordered if a <= s.begin < b and s.name != "round"] for a, b in pairwise(borders)]


def _path(phase: Sequence[Span], pushed: float, pulled: float) -> dict[str, float]:
    """Return the seconds of each step of a request through the site that replied last."""
    by_pid: dict[int, dict[str, Span]] = defaultdict(dict)
    for span in phase:
        by_pid[span.pid][span.name] = span
    pid, app = max(((p, s) for p, s in by_pid.items() if "output" in s), key=lambda item: item[1]["output"].end)
    inside = [s for s in phase if app["app"].begin <= s.begin and s.end <= app["app"].end]
    trainers = [s for s in inside if s.name == "trainer"]  # colora only: the trainer that answered this app
    trainer = max(trainers, key=lambda span: span.end) if trainers else None
    worker = trainer.pid if trainer else pid

    def spent(name: str) -> float:
        return sum(s.seconds for s in inside if s.name == name and s.pid == worker)

    parts = {
        "request: pushed, fetched by the SuperNode, process started": app["process"].begin - pushed,
        "app: Python and Flower imported": app["input"].begin - app["process"].begin,
        "app: request read": app["input"].seconds,
        "app: unpacked, its own imports": app["app"].begin - app["input"].end,
        "app: model loaded": spent("load"),
    }
    rest = app["app"].seconds - spent("load")
    if trainer:
        parts["app: to the trainer and back"] = rest - trainer.seconds
        parts["trainer: state written"] = spent("store")
        parts["trainer: values in and out, hashes"] = trainer.seconds - spent("work") - spent("store")
    else:
        parts["app: rows, arrays in and out"] = rest - spent("work")
    parts["app: reply written"] = app["output"].seconds
    parts["reply: pushed by the SuperNode, fetched by the coordinator"] = pulled - app["output"].end
    return parts
