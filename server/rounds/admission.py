"""Admission checks on joining sites and on their replies. Each refusal names site, field, expected and found value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...common.config.schema import Recipe
from ...common.dataset import TASKS
from ...common.errors import RefusedError
from ...common.protocol.limits import MAX_COUNT
from ...common.protocol.types import (
    BENEFIT,
    FALLBACK_KEPT,
    MAX_BENEFIT,
    PROTOCOL,
    VALIDATION_LOSS,
    Arrays,
    SiteInfo,
    TrainReply,
    TrainRequest,
    check_arrays,
    check_metrics,
)

Layout = Mapping[str, tuple[int, ...]]
MAX_POWER_STEP = 1.01  # norm of an array in a spectral start; bf16 rounds it by less than 1 %
TASK_HINT = "Correct [data] task in the site file, or declare the task of this site in the recipe."
PINNED = ("model", "tokenizer", "chat_template")  # fingerprints in SiteInfo that all sites must have in common


@dataclass(frozen=True)
class ReplyLimits:
    """The largest values that a reply may have. ``examples`` and ``terms`` are those of a round's training.

    ``least`` is the smallest value of these two.
    """

    update_norm: float
    examples: int = MAX_COUNT
    terms: int = MAX_COUNT
    least: int = 1

    def without_update(self) -> ReplyLimits:
        """The limits of a reply whose update and weight come in a secure sum."""
        return ReplyLimits(self.update_norm, 0, 0, least=0)


def reply_limits(recipe: Recipe, site: SiteInfo) -> ReplyLimits:
    """The limits of a site's reply: it cannot train on more examples, or weigh more, than the plan has steps.

    With ``train.epochs`` they follow from the number of training examples that the site reported when it joined. The
    terms follow from its task: where they decide the weights, ``agreement.agreed_tasks`` does not let a site choose it.
    """
    examples = recipe.train.examples_per_round(site.train)
    tokens = recipe.model.max_length if TASKS[site.task].needs_causal_lm else 1
    return ReplyLimits(recipe.server.max_update_norm, examples, examples * tokens)


def admit_reply(reply: TrainReply, site: str, request: TrainRequest, layout: Layout, limits: ReplyLimits) -> float:
    """Check a reply against the request that it answers, and return the norm of its update.

    ``layout`` maps the names of the expected arrays to their shapes: none for a validate or finalize request, else all
    shared arrays. Raises RefusedError.
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
    if reply.metrics.get(FALLBACK_KEPT, 0) not in (0, 1):
        raise RefusedError(FALLBACK_KEPT, "0 or 1", reply.metrics[FALLBACK_KEPT], site=site)
    if request.kind == "train":
        for field in ("terms", "examples"):
            low, high = limits.least, getattr(limits, field)
            if not low <= getattr(reply, field) <= high:
                raise RefusedError(field, f"{low} to {high}", getattr(reply, field), site=site)
    if request.kind == "validate" and VALIDATION_LOSS not in reply.metrics:
        raise RefusedError(VALIDATION_LOSS, "a number", "nothing", site=site)
    if reply.metrics.get(VALIDATION_LOSS, 0) < 0:
        raise RefusedError(VALIDATION_LOSS, "at least 0", reply.metrics[VALIDATION_LOSS], site=site)
    if request.kind == "initialize":
        check_power_step(reply.shared, site)
    return check_values(reply.shared, request.shared, limits.update_norm, site)


def check_power_step(arrays: Arrays, site: str) -> None:
    """Check the arrays of a spectral start: ‖G Gᵀ B‖ ≤ 1 and ‖A Gᵀ G‖ ≤ 1, since ‖G‖ ≤ 1. Raises RefusedError."""
    for key, array in arrays.items():
        norm = float(np.linalg.norm(array.astype(np.float64)))
        if "lora_" in key and norm > MAX_POWER_STEP:
            raise RefusedError(f"norm of {key}", "at most 1", f"{norm:g}", site=site)


def check_values(arrays: Arrays, previous: Arrays, max_update_norm: float, site: str) -> float:
    """Check that all values are finite and that the update is not too large, and return the norm of the update.

    The update norm is the Frobenius norm of ``arrays - previous`` over all arrays. Raises RefusedError.
    """
    squares = 0.0
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise RefusedError(key, "finite values", "NaN or infinity", site=site)
        squares += float(np.sum(np.square(array.astype(np.float64) - previous[key])))
    if squares > max_update_norm**2:
        raise RefusedError("update norm", f"at most {max_update_norm:g}", f"{squares**0.5:g}", site=site)
    return squares**0.5


def admit_site(info: SiteInfo, expected: Mapping[str, object]) -> None:
    """Check a joining site's protocol version and task, and its fields in ``expected``. Raises RefusedError."""
    actual = dataclasses.asdict(info)
    for field, value in {"protocol": PROTOCOL, **expected}.items():
        if actual[field] != value:
            hint = TASK_HINT if field == "task" else None
            raise RefusedError(field, str(value)[:16], str(actual[field])[:16], site=info.site, hint=hint)
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
