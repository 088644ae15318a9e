"""Admission checks on joining sites and on their replies. Each refusal names site, field, expected and found value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from ...common.dataset import TASKS
from ...common.errors import RefusedError
from ...common.protocol.limits import MAX_COUNT
from ...common.protocol.types import (
    BENEFIT,
    MAX_BENEFIT,
    PROTOCOL,
    Arrays,
    SiteInfo,
    TrainReply,
    TrainRequest,
    check_arrays,
    check_metrics,
)

Layout = Mapping[str, tuple[int, ...]]
PINNED = ("model", "tokenizer", "chat_template")  # fingerprints in SiteInfo that all sites must have in common


def admit_reply(reply: TrainReply, site: str, request: TrainRequest, layout: Layout, max_update_norm: float) -> None:
    """Check a reply against the request that it answers.

    ``layout`` maps the names of the expected arrays to their shapes: none for a finalize request, else all shared
    arrays. Raises RefusedError.
    """
    for field, expected in (("site", site), ("federation", request.federation), ("round", request.round)):
        if getattr(reply, field) != expected:
            raise RefusedError(field, str(expected), getattr(reply, field), site=site)
    if reply.key != request.key:
        raise RefusedError("request key", request.key, reply.key, site=site)
    check_arrays(reply.shared, layout, site)
    check_metrics(reply.metrics, site)
    if BENEFIT in reply.metrics and not 0 <= reply.metrics[BENEFIT] <= MAX_BENEFIT:
        raise RefusedError(BENEFIT, f"0 to {MAX_BENEFIT:g}", reply.metrics[BENEFIT], site=site)
    if request.kind == "train":
        for field in ("terms", "examples"):
            if not 0 < getattr(reply, field) <= MAX_COUNT:
                raise RefusedError(field, f"1 to {MAX_COUNT}", getattr(reply, field), site=site)
    check_values(reply.shared, request.shared, max_update_norm, site)


def check_values(arrays: Arrays, previous: Arrays, max_update_norm: float, site: str) -> None:
    """Check that all values are finite and that the update is not too large.

    The update norm is the Frobenius norm of ``arrays - previous`` over all arrays. Raises RefusedError.
    """
    squares = 0.0
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise RefusedError(key, "finite values", "NaN or infinity", site=site)
        squares += float(np.sum(np.square(array.astype(np.float64) - previous[key])))
    if squares > max_update_norm**2:
        raise RefusedError("update norm", f"at most {max_update_norm:g}", f"{squares**0.5:g}", site=site)


def admit_site(info: SiteInfo, expected: Mapping[str, object]) -> None:
    """Check a joining site's protocol version, fingerprints and layout against ``expected``. Raises RefusedError."""
    actual = dataclasses.asdict(info)
    for field, value in {"protocol": PROTOCOL, **expected}.items():
        if actual[field] != value:
            raise RefusedError(field, str(value)[:16], str(actual[field])[:16], site=info.site)
    if info.task not in TASKS:
        raise RefusedError("task", f"one of {', '.join(TASKS)}", info.task, site=info.site)
    if info.train < 1 and info.test < 1:
        raise RefusedError(
            "train",
            "at least one training or test example",
            info.train,
            site=info.site,
            message="The site has no training examples and no test examples.",
            hint="Check the [data] table of its site file.",
        )
