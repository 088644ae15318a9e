"""What coordinator and site say to each other, as plain data; ``messages.py`` puts it on Flower's wire.

A reply has one field for arrays, ``shared``, and one for numbers by name, ``metrics``; both sides refuse a name that
is not on their closed lists. There is no field that could carry a core, a head, a private adapter or a text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from ..config.schema import digest
from ..dataset import EVAL_MODES, METRICS
from ..errors import RefusedError

PROTOCOL = 1
UPDATE_SCALE = "update.scale"  # metric: the factor by which a site scaled its update before it sent it
METRIC_NAMES = frozenset({"train.loss", UPDATE_SCALE} | {f"{mode}.{name}" for mode in EVAL_MODES for name in METRICS})
Arrays = Mapping[str, np.ndarray]
RequestKind = Literal["train", "finalize"]


@dataclass(frozen=True)
class TrainRequest:
    """One message of the coordinator to one site: the shared adapter of the last round, and what to do with it.

    ``admitted`` is the last round of this site that counted (0: none); the site goes on from its state of then.
    ``plan`` is the settings as one JSON string. ``close`` asks for the final personalisation and the last metrics.
    """

    federation: str
    round: int
    kind: RequestKind
    admitted_round: int
    plan: str
    shared: Arrays
    evaluate: bool

    @cached_property
    def key(self) -> str:
        """The identity of the round: equal keys have equal answers."""
        parts = (self.federation, self.round, self.kind, self.admitted_round, self.evaluate, digest(self.plan))
        return digest("|".join(map(str, (*parts, hash_arrays(self.shared)))))


@dataclass(frozen=True)
class TrainReply:
    """One answer of a site: its shared arrays, what they weigh, and metrics by name (``personal.accuracy``)."""

    site: str
    federation: str
    round: int
    key: str  # of the order that it answers
    shared: Arrays
    terms: int  # loss terms trained on: answer tokens, or labelled texts
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    fresh: bool = False  # the site had no state of the admitted round and started from the shared adapter


@dataclass(frozen=True)
class SiteInfo:
    """What a site says of itself when it joins."""

    site: str
    protocol: int
    model: str  # fingerprints
    tokenizer: str
    chat_template: str
    layout: str  # hash of the shared arrays' names and shapes
    task: str
    train: int  # examples
    test: int
    truncated: int
    dropped: int
    classes: int = 0


def hash_arrays(arrays: Arrays) -> str:
    """SHA-256 over names, types, shapes and bytes, in name order."""
    state = hashlib.sha256()
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        state.update(f"{key}|{array.dtype}|{array.shape}|".encode())
        state.update(array.data)
    return state.hexdigest()


def hash_layout(layout: Mapping[str, tuple[int, ...]]) -> str:
    """SHA-256 over names and shapes, in name order."""
    return digest("\n".join(f"{key}:{tuple(layout[key])}" for key in sorted(layout)))


def check_metrics(metrics: Mapping[str, float], site: str) -> None:
    """Both sides' rule: known metrics by their names, so that no number or text travels as another. RefusedError."""
    extra = sorted(set(metrics) - METRIC_NAMES)
    if extra:
        raise RefusedError("metrics", "known metrics only", f"also {extra[0][:40]!r}", site=site)


def check_arrays(arrays: Arrays, layout: Mapping[str, tuple[int, ...]], site: str) -> None:
    """Both sides' rule: exactly the shared arrays, of their shapes, in fp32. Raises RefusedError."""
    extra, missing = sorted(set(arrays) - set(layout)), sorted(set(layout) - set(arrays))
    if extra:
        raise RefusedError("arrays", "the shared groups only", f"also {extra[0]}", site=site)
    if missing:
        raise RefusedError("arrays", missing[0], "no such array", site=site)
    for key, array in arrays.items():
        if array.dtype != np.float32:
            raise RefusedError(key, "float32", array.dtype, site=site)
        if tuple(array.shape) != tuple(layout[key]):
            raise RefusedError(key, f"shape {tuple(layout[key])}", array.shape, site=site)
