"""From the marks of all processes to the seconds of each round, and to where they go."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

NEVER = "pull nothing"


@dataclass(frozen=True)
class Span:
    """Something that a process did: seconds of the clock, and of CPU."""

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
    """``work``: optimiser steps and evaluation of the slowest site. ``parts``: the rest, along the slower site.

    ``cpu``: CPU seconds of all ClientApp processes and trainers, without ``work``.
    """

    seconds: float
    work: float
    cpu: float
    parts: dict[str, float]

    @property
    def beyond(self) -> float:
        return self.seconds - self.work


def read_rounds(path: Path, rounds: int) -> list[Round]:
    """The rounds after the first, which waits for sites and compiles byte code."""
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
            first = begun.pop((pid, "pull" if name == NEVER else name))
            spans.append(Span(pid, name, first["time"], mark["time"], mark["cpu"] - first["cpu"]))
        else:
            begun[pid, name] = mark
    return sorted(spans, key=lambda span: span.end)


def _round(everything: Sequence[Span], begin: float, end: float) -> Round:
    spans = [s for s in everything if begin <= s.begin < end and (s.end <= end or s.name == "process")]
    work, before, parts = 0.0, begin, defaultdict[str, float](float)
    for phase in _phases(spans):
        own: dict[int, float] = defaultdict(float)
        for span in phase:
            own[span.pid] += span.seconds if span.name == "work" else 0.0
        work += max(own.values())
        asked = min(span.begin for span in phase if span.name == "push")
        answered = max(span.end for span in phase if span.name == "pull")
        parts["coordinator: aggregation, checkpoint, orders"] += asked - before
        for name, seconds in _way(phase, asked, answered).items():
            parts[name] += seconds
        before = answered
    parts["coordinator: aggregation, checkpoint, orders"] += end - before
    spent = {name: sum(span.cpu for span in spans if span.name == name) for name in ("process", "trainer", "work")}
    return Round(end - begin, work, spent["process"] + spent["trainer"] - spent["work"], dict(parts))


def _phases(spans: Sequence[Span]) -> list[list[Span]]:
    """From the first order to the last answer; a push after an answer opens the next phase."""
    order = sorted(spans, key=lambda span: span.begin)
    starts = []
    last = "pull"
    for span in order:
        if span.name in ("push", "pull"):
            if span.name == "push" and last == "pull":
                starts.append(span.begin)
            last = span.name
    borders = [*starts, float("inf")]
    return [[s for s in order if a <= s.begin < b and s.name != "round"] for a, b in pairwise(borders)]


def _way(phase: Sequence[Span], asked: float, answered: float) -> dict[str, float]:
    """The way of an order through the site that answered last."""
    by_pid: dict[int, dict[str, Span]] = defaultdict(dict)
    for span in phase:
        by_pid[span.pid][span.name] = span
    pid, app = max(((p, s) for p, s in by_pid.items() if "output" in s), key=lambda item: item[1]["output"].end)
    inside = [s for s in phase if app["app"].begin <= s.begin and s.end <= app["app"].end]
    trainers = [s for s in inside if s.name == "trainer"]  # ours: the one that answered this app
    trainer = max(trainers, key=lambda span: span.end) if trainers else None
    at = trainer.pid if trainer else pid

    def spent(name: str) -> float:
        return sum(s.seconds for s in inside if s.name == name and s.pid == at)

    found = {
        "order: pushed, fetched by the SuperNode, process started": app["process"].begin - asked,
        "app: Python and Flower imported": app["input"].begin - app["process"].begin,
        "app: order read": app["input"].seconds,
        "app: unpacked, its own imports": app["app"].begin - app["input"].end,
        "app: model loaded": spent("load"),
    }
    rest = app["app"].seconds - spent("load")
    if trainer:
        found["app: to the trainer and back"] = rest - trainer.seconds
        found["trainer: state written"] = spent("store")
        found["trainer: values in and out, hashes"] = trainer.seconds - spent("work") - spent("store")
    else:
        found["app: rows, arrays in and out"] = rest - spent("work")
    found["app: reply written"] = app["output"].seconds
    found["reply: pushed by the SuperNode, fetched by the coordinator"] = answered - app["output"].end
    return found
