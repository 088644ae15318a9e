"""What shared arrays look like in bytes. A codec is one row; Flower's ``Array.stype`` carries its name.

All arrays of a message travel as one piece: Flower moves every array by requests of its own, several for each and
over each of its hops, which for a few dozen small matrices takes longer than everything else of a round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import safetensors.numpy

from ..errors import RefusedError
from .types import Arrays


@dataclass(frozen=True)
class Codec:
    """``encode`` and ``decode`` are inverse to each other; ``decode`` allocates no more than the bytes hold."""

    encode: Callable[[Arrays], bytes]
    decode: Callable[[bytes], Arrays]


def _to_safetensors(arrays: Arrays) -> bytes:
    return safetensors.numpy.save({key: np.ascontiguousarray(arrays[key]) for key in sorted(arrays)})


DEFAULT = "safetensors"
CODECS: dict[str, Codec] = {DEFAULT: Codec(_to_safetensors, safetensors.numpy.load)}


def encode(arrays: Arrays) -> bytes:
    """Arrays → bytes."""
    return CODECS[DEFAULT].encode(arrays)


def decode(stype: str, data: bytes) -> Arrays:
    """Bytes → arrays in name order. Raises RefusedError for an unknown codec or broken bytes."""
    if stype not in CODECS:
        raise RefusedError("arrays", f"a codec of {', '.join(CODECS)}", stype[:40])
    try:
        arrays = CODECS[stype].decode(data)
        return {key: arrays[key] for key in sorted(arrays)}
    except Exception as error:  # the bytes come from outside, and who reads them raises what it likes on broken ones
        raise RefusedError("arrays", "whole bytes of arrays", type(error).__name__) from None
