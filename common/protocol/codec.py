"""How shared arrays are encoded as bytes. A codec is one row of ``CODECS``; Flower's ``Array.stype`` carries its name.

The recipe names one codec for the whole federation (``communication.codec``), and both sides refuse another one. All
arrays of a message travel as one piece: Flower transfers every array with several requests over each hop, which for a
few dozen small matrices takes longer than everything else in a round.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import safetensors.numpy

from ..errors import RefusedError
from .types import Arrays


@dataclass(frozen=True)
class Codec:
    """How arrays become bytes and fp32 arrays again.

    Both functions also receive the reference: arrays that the other side has already. It is empty for a request, and
    holds the request's decoded arrays for the reply. ``decode`` allocates at most a small multiple of the bytes.
    Without a reference, arrays that were decoded once must pass encoding and decoding unchanged: the coordinator keeps
    S_t as the sites receive it.
    """

    encode: Callable[[Arrays, Arrays], bytes]
    decode: Callable[[bytes, Arrays], Arrays]
    lossless: bool = False


def _save(arrays: Arrays) -> bytes:
    return safetensors.numpy.save({key: np.ascontiguousarray(arrays[key]) for key in sorted(arrays)})


DEFAULT = "safetensors"
CODECS: dict[str, Codec] = {
    DEFAULT: Codec(lambda arrays, _: _save(arrays), lambda data, _: safetensors.numpy.load(data), lossless=True),
}


def codec_of(plan: str) -> str:
    """The codec that a plan (settings as JSON) names. Raises RefusedError for an unknown one or another text."""
    try:
        name = json.loads(plan).get("communication", {}).get("codec", DEFAULT)
    except (ValueError, AttributeError, RecursionError):
        raise RefusedError("plan", "settings as one JSON object", "something else") from None
    if not isinstance(name, str) or name not in CODECS:
        raise RefusedError("communication.codec", f"one of {', '.join(CODECS)}", repr(name)[:40])
    return name


def encode(codec: str, arrays: Arrays, reference: Arrays | None = None) -> bytes:
    """Encode arrays with one of ``CODECS``."""
    return CODECS[codec].encode(arrays, reference or {})


def decode(codec: str, data: bytes, reference: Arrays | None = None) -> Arrays:
    """Decode bytes to arrays in name order. Raises RefusedError for an unknown codec or damaged bytes."""
    if codec not in CODECS:
        raise RefusedError("arrays", f"a codec of {', '.join(CODECS)}", codec[:40])
    try:
        arrays = CODECS[codec].decode(data, reference or {})
        return {key: arrays[key] for key in sorted(arrays)}
    except Exception as error:  # the bytes come from another machine, and a decoder may raise anything on damaged ones
        raise RefusedError("arrays", "complete bytes of arrays", type(error).__name__) from None


def as_received(codec: str, arrays: Arrays) -> Arrays:
    """The arrays as the other side sees them after a request."""
    return arrays if CODECS[codec].lossless else decode(codec, encode(codec, arrays))
