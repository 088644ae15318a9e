"""Requests and replies between coordinator and sites as plain data. ``flower_messages.py`` encodes them for Flower.

A reply has one field for arrays, ``shared``, and one for named numbers, ``metrics``. Both sides refuse array and metric
names that they do not expect. No field can carry a core, a head, a private adapter or a text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from ..dataset import EVAL_MODES, METRICS
from ..digest import digest
from ..errors import RefusedError

PROTOCOL = 5  # version of these types; a site with another one is refused
UPDATE_SCALE = "update.scale"  # metric: the factor by which a site scaled its update before it sent it
OF_UPDATE = frozenset((UPDATE_SCALE,))  # metrics that are computed from an update; not sent with secure aggregation
BENEFIT = "train.benefit"  # metric: loss with the shared adapter ÷ loss without it; in [0, MAX_BENEFIT]
MAX_BENEFIT = 10.0
EPSILON = "privacy.epsilon"  # metric: the privacy budget that the site has spent in this federation
OVERFLOWS = "train.overflows"  # metric: attempts at an optimizer step whose fp16 gradients overflowed; absent for none
VALIDATION_LOSS = "validation.loss"  # metric: mean loss of the personal model on the site's validation rows
FALLBACK_DIFFERENCE = "fallback.difference"  # metric: validation loss of the collaborative − of the local model
FALLBACK_ERROR = "fallback.standard_error"  # metric: of this difference, over validation rows
FALLBACK_KEPT = "fallback.kept_local"  # metric: 1 if the site kept its local model, else 0
FALLBACK = frozenset((FALLBACK_DIFFERENCE, FALLBACK_ERROR, FALLBACK_KEPT))
METRIC_NAMES = frozenset(
    {"train.loss", UPDATE_SCALE, BENEFIT, EPSILON, OVERFLOWS, VALIDATION_LOSS}
    | FALLBACK
    | {f"{mode}.{name}" for mode in EVAL_MODES for name in METRICS}
)
Arrays = Mapping[str, np.ndarray]
RequestKind = Literal["trial", "initialize", "train", "validate", "finalize"]
SumStep = Literal["share", "mask", "open"]  # of a secure sum, in this order
PRELIMINARY = ("trial", "initialize")  # requests before round 1, of which a site stores nothing
WITHOUT_ARRAYS = ("validate", "finalize")  # requests whose replies hold metrics only


ROWS_OF_SITE = ("site", "task", "train", "test", "truncated", "dropped", "rank")  # of SiteInfo, in the event ``joined``


@dataclass(frozen=True)
class TrainRequest:
    """A request of the coordinator to one site: the shared adapter of the previous round, and what to do with it.

    ``admitted_round`` is the last round in which this site's reply was admitted (0: none); the site continues from its
    state of that round. ``plan`` is the plan as JSON. Before round 1, ``trial`` asks for an update to compare with
    those of other sites, and ``initialize`` for a step of the spectral start; a site stores nothing of either.
    ``validate`` asks for the loss on the site's validation rows after ``round - 1`` rounds; nothing is stored.
    ``finalize`` asks for the final steps and the final metrics.
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
        """Identity of the request: requests with equal keys get equal replies."""
        parts = (self.federation, self.round, self.kind, self.admitted_round, self.evaluate, digest(self.plan))
        return digest("|".join(map(str, (*parts, self.reference))))

    @cached_property
    def reference(self) -> str:
        """Hash of the shared arrays, from which the site trains."""
        return hash_arrays(self.shared)


@dataclass(frozen=True)
class TrainReply:
    """A site's reply: its shared arrays, their weight, and metrics by name (``personal.accuracy``)."""

    site: str
    federation: str
    round: int
    key: str  # of the request
    shared: Arrays
    terms: int  # loss terms trained on: answer tokens or labelled texts
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    measuring: float = 0.0  # of ``seconds``: those in which models were measured, not trained
    fresh: bool = False  # the site had no state of the admitted round and began from the shared adapter


@dataclass(frozen=True)
class SumRequest:
    """A request for a step of a secure sum, after the site has replied to the train request of the same round.

    All fields but ``step`` and ``body`` are those of the train request; ``reference`` is the hash of its arrays. The
    bodies are described in ``common/secure_aggregation/bodies.py``.
    """

    federation: str
    round: int
    step: SumStep
    admitted_round: int
    plan: str
    evaluate: bool
    reference: str
    body: bytes = field(repr=False)

    @property
    def key(self) -> str:
        """The key of the train request."""
        parts = (self.federation, self.round, "train", self.admitted_round, self.evaluate, digest(self.plan))
        return digest("|".join(map(str, (*parts, self.reference))))


@dataclass(frozen=True)
class SumReply:
    """A site's reply to it: JSON, or for the step ``mask`` the masked vector as uint32, little-endian."""

    site: str
    federation: str
    round: int
    step: SumStep
    key: str
    body: bytes = field(repr=False)


@dataclass(frozen=True)
class SiteInfo:
    """A site's description of itself when it joins."""

    site: str
    protocol: int
    model: str  # fingerprint, as are the next two
    tokenizer: str
    chat_template: str
    layout: str  # hash of the shared arrays' names and shapes
    task: str
    train: int  # number of examples, as are the next three
    test: int
    truncated: int
    dropped: int
    classes: int = 0  # number of labels of a classification task
    labels: str = ""  # hash of the labels' names and order where heads are shared; empty where they are personal
    rank: int = 0  # of the site's adapter, if it is smaller than the federation's; else 0


def hash_arrays(arrays: Arrays) -> str:
    """Return the SHA-256 of names, types, shapes and bytes, in name order."""
    state = hashlib.sha256()
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        state.update(f"{key}|{array.dtype}|{array.shape}|".encode())
        state.update(array.data)
    return state.hexdigest()


def hash_layout(layout: Mapping[str, tuple[int, ...]]) -> str:
    """Return a hash of names and shapes, in name order."""
    return digest("\n".join(f"{key}:{tuple(layout[key])}" for key in sorted(layout)))


def hash_labels(labels: Sequence[str]) -> str:
    """Return a hash of the labels' names and order."""
    return digest(json.dumps(list(labels)))


def check_metrics(metrics: Mapping[str, float], site: str) -> None:
    """Check that all metrics have known names. Both sides do. Raises RefusedError."""
    unknown = sorted(set(metrics) - METRIC_NAMES)
    if unknown:
        raise RefusedError("metrics", "known metrics only", f"also {unknown[0][:40]!r}", site=site)


def check_arrays(arrays: Arrays, layout: Mapping[str, tuple[int, ...]], site: str) -> None:
    """Check that the arrays are exactly the shared ones, with their shapes, in fp32. Both sides do.

    Raises RefusedError.
    """
    extra, missing = sorted(set(arrays) - set(layout)), sorted(set(layout) - set(arrays))
    if extra:
        raise RefusedError("arrays", "the shared groups only", f"also {extra[0][:80]}", site=site)
    if missing:
        raise RefusedError("arrays", missing[0], "no such array", site=site)
    for key, array in arrays.items():
        if array.dtype != np.float32:
            raise RefusedError(key, "float32", array.dtype, site=site)
        if tuple(array.shape) != tuple(layout[key]):
            raise RefusedError(key, f"shape {tuple(layout[key])}", array.shape, site=site)
