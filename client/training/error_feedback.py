"""Updates in few bits with error feedback: what rounding left out of an update is added to the next one.

Seide et al. 2014 and Karimireddy et al. 2019 (arXiv 1901.09847): without it the error of each round is lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from ...common.errors import RefusedError
from ...common.protocol.codec import decode, encode, update_codec
from ...common.protocol.types import Arrays
from .soundness import LOWER_RATES
from .update_pipeline import update_norm

Feedback = dict[str, torch.Tensor]
MARGIN = 0.001  # by which an update is scaled below the bound if rounding makes it longer; doubles at every try
MAX_TRIES = 16  # after eleven the margin is 1, and nothing is sent
LARGEST = float(np.finfo(np.float32).max)


def quantized_update(
    arrays: Arrays,
    reference: Arrays,
    feedback: Mapping[str, torch.Tensor],
    bits: int,
    bound: float | None = None,
    site: str | None = None,
) -> tuple[Arrays, Feedback]:
    """Return the arrays that ``bits`` bits a number can represent, and what they lack of the trained ones.

    ``feedback`` is what the last admitted update lacked. The norm of the update stays within ``bound``. Differences are
    computed in fp64: that of two fp32 numbers may be beyond fp32. Raises RefusedError if an array is not finite.
    """
    codec, factor, margin, norm = update_codec(bits), 1.0, MARGIN, math.inf
    wanted = {key: _wanted(key, value, feedback.get(key), site) for key, value in arrays.items()}
    for _ in range(MAX_TRIES):
        tried = {key: reference[key] + factor * (value - reference[key]) for key, value in wanted.items()}
        with np.errstate(over="ignore", invalid="ignore"):  # found by the checks of what is sent
            sent = decode(codec, encode(codec, tried, reference), reference)
        for key, value in sent.items():
            _check(key, "update in few bits", value, site)
        norm = update_norm(sent, reference)
        if bound is None or norm <= bound:
            return sent, {key: _lacking(key, tried[key], sent[key], site) for key in sent}
        factor *= bound / norm * (1.0 - margin)
        margin = min(1.0, 2 * margin)
    raise RefusedError(
        "update in few bits",
        f"a norm of at most {bound:g} (train.max_update_norm)",
        f"{norm:.3g}",
        site=site,
        hint="Raise train.max_update_norm, or unset communication.update_bits.",
    )


def _wanted(key: str, trained: np.ndarray, lacked: torch.Tensor | None, site: str | None) -> np.ndarray:
    """The trained array with what the last update lacked of it, in fp64."""
    wanted = trained.astype(np.float64)
    if lacked is not None:
        if tuple(lacked.shape) != trained.shape:
            shape = f"shape {tuple(lacked.shape)}"
            raise RefusedError(f"feedback of {key}", f"shape {trained.shape}", shape, site=site)
        wanted = wanted + lacked.numpy()
    _check(key, "trained array with error feedback", wanted, site)
    return wanted


def _lacking(key: str, tried: np.ndarray, sent: np.ndarray, site: str | None) -> torch.Tensor:
    lacking = tried - sent
    _check(key, "feedback", lacking, site)
    return torch.as_tensor(lacking.astype(np.float32))


def _check(key: str, what: str, values: np.ndarray, site: str | None) -> None:
    """Raise RefusedError for values that are not finite or beyond fp32. The site then keeps its last state."""
    largest = float(np.abs(values).max(initial=0.0))  # NaN stays NaN
    if not (math.isfinite(largest) and largest <= LARGEST):
        raise RefusedError(
            f"{key} not finite",
            "finite numbers in fp32",
            largest,
            site=site,
            message=f"The {what} of {key} is not finite in fp32. The site keeps its last state.",
            hint=LOWER_RATES,
        )
