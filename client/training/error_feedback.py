"""Updates in few bits with error feedback: what rounding left out of an update is added to the next one.

Seide et al. 2014 and Karimireddy et al. 2019 (arXiv 1901.09847): without it the error of each round is lost.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...common.protocol.codec import decode, encode, update_codec
from ...common.protocol.types import Arrays
from .update_pipeline import update_norm

Feedback = dict[str, torch.Tensor]
SHORTER = 0.999  # factor by which an update is scaled down while rounding makes it longer than the bound


def quantized_update(
    arrays: Arrays, reference: Arrays, feedback: Mapping[str, torch.Tensor], bits: int, bound: float | None = None
) -> tuple[Arrays, Feedback]:
    """Return the arrays that ``bits`` bits a number can represent, and what they lack of the trained ones.

    ``feedback`` is what the last admitted update lacked. The norm of the update stays within ``bound``.
    """
    codec = update_codec(bits)
    wanted = {key: value + feedback[key].numpy() if key in feedback else value for key, value in arrays.items()}
    factor = 1.0
    while True:
        tried = {key: reference[key] + factor * (value - reference[key]) for key, value in wanted.items()}
        sent = decode(codec, encode(codec, tried, reference), reference)
        norm = update_norm(sent, reference)
        if bound is None or norm <= bound:
            return sent, {key: torch.as_tensor(tried[key] - sent[key]) for key in sent}
        factor *= SHORTER * bound / norm
