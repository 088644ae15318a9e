"""What a reply, and a site that joins, must be to count. Every refusal names the site, the field and both values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from ...common.errors import RefusedError
from ...common.protocol.types import PROTOCOL, Arrays, SiteInfo, TrainReply, TrainRequest, check_arrays, check_metrics

Layout = Mapping[str, tuple[int, ...]]
MAX_TERMS = 10**12  # loss terms of one round; more is a broken count
PINNED = ("model", "tokenizer", "chat_template")


def admit_reply(reply: TrainReply, site: str, order: TrainRequest, layout: Layout, max_update_norm: float) -> None:
    """Checks one reply against the order that it answers. Raises RefusedError.

    ``layout`` has the arrays that must come: all shared ones after training, none at the close.
    """
    for field, expected in (("site", site), ("federation", order.federation), ("round", order.round)):
        if getattr(reply, field) != expected:
            raise RefusedError(field, str(expected), getattr(reply, field), site=site)
    if reply.key != order.key:
        raise RefusedError("order", order.key, reply.key, site=site)
    check_arrays(reply.shared, layout, site)
    check_metrics(reply.metrics, site)
    if order.kind == "train":
        for field in ("terms", "examples"):
            if not 0 < getattr(reply, field) <= MAX_TERMS:
                raise RefusedError(field, f"1 to {MAX_TERMS}", getattr(reply, field), site=site)
    check_values(reply.shared, order.shared, max_update_norm, site)


def check_values(arrays: Arrays, previous: Arrays, max_update_norm: float, site: str) -> None:
    """Finite everywhere, and not further than ``max_update_norm`` (Frobenius, all arrays) from what was sent."""
    squares = 0.0
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise RefusedError(key, "finite values", "NaN or infinity", site=site)
        squares += float(np.sum(np.square(array.astype(np.float64) - previous[key])))
    if squares > max_update_norm**2:
        raise RefusedError("update norm", f"at most {max_update_norm:g}", f"{squares**0.5:g}", site=site)


def admit_site(description: SiteInfo, expected: Mapping[str, object]) -> None:
    """Checks a joining site against the federation's pinned fingerprints, layout and protocol. Raises RefusedError."""
    found = dataclasses.asdict(description)
    for field, value in {"protocol": PROTOCOL, **expected}.items():
        if found[field] != value:
            raise RefusedError(field, str(value)[:16], str(found[field])[:16], site=description.site)
    if description.train < 1 and description.test < 1:
        raise RefusedError("train", "examples to train or to measure on", description.train, site=description.site)
