"""How shared arrays are encoded as bytes. A codec is one row of ``CODECS``; Flower's ``Array.stype`` carries its name.

The recipe names one codec for the whole federation (``communication.codec``), and perhaps a number of bits for updates
(``communication.update_bits``), and both sides refuse another one. All
arrays of a message travel as one piece: Flower transfers every array with several requests over each hop, which for a
few dozen small matrices takes longer than everything else in a round.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy

from ..errors import RefusedError
from .quantized import STEPS, decode_update, encode_update
from .types import Arrays

Narrow = Callable[[np.ndarray], np.ndarray]


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


def _half(stored: type[np.generic], narrow: Narrow, widen: Callable[[np.ndarray], np.ndarray], limit: float) -> Codec:
    """A codec of 16 bits a number. ``limit`` is the largest finite value, ``stored`` the type in the bytes."""

    def encode(arrays: Arrays, reference: Arrays) -> bytes:
        for key, array in arrays.items():
            if (np.isfinite(array) & (np.abs(array) > limit)).any():
                raise RefusedError(
                    "communication.codec",
                    f"values of at most {limit:g}",
                    f"a larger one in {key}",
                    message=f"{key} has a value beyond {limit:g}, the largest that the codec represents.",
                    hint="Use the codec safetensors.",
                )
        return _save({key: narrow(array) for key, array in arrays.items()})

    def decode(data: bytes, reference: Arrays) -> Arrays:
        arrays = safetensors.numpy.load(data)
        if any(array.dtype != stored for array in arrays.values()):
            raise ValueError(f"arrays of another type than {stored.__name__}")
        return {key: widen(array) for key, array in arrays.items()}

    return Codec(encode, decode)


def _to_bf16(array: np.ndarray) -> np.ndarray:
    """fp32 → the upper half of its bits, rounded to nearest even, as uint16. NaN stays NaN."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(array), 0x7FC0, rounded).astype(np.uint16)


def _from_bf16(upper: np.ndarray) -> np.ndarray:
    return (upper.astype(np.uint32) << 16).view(np.float32)


def _quantized(bits: int) -> Codec:
    return Codec(
        lambda arrays, reference: encode_update(arrays, reference, bits),
        lambda data, reference: decode_update(data, reference, bits),
    )


DEFAULT = "safetensors"
CODECS: dict[str, Codec] = {
    DEFAULT: Codec(lambda arrays, _: _save(arrays), lambda data, _: safetensors.numpy.load(data), lossless=True),
    "fp16": _half(np.float16, lambda x: x.astype(np.float16), lambda x: x.astype(np.float32), limit=65504.0),
    "bf16": _half(np.uint16, _to_bf16, _from_bf16, limit=float.fromhex("0x1.fep+127")),
    **{f"int{bits}": _quantized(bits) for bits in STEPS},  # of updates: they need a reference
}
FOR_REQUESTS = (DEFAULT, "fp16", "bf16")


def codec_of(plan: str) -> str:
    """The codec that a plan (settings as JSON) names. Raises RefusedError for an unknown one or another text."""
    name = _communication(plan).get("codec", DEFAULT)
    if not isinstance(name, str) or name not in FOR_REQUESTS:
        raise RefusedError("communication.codec", f"one of {', '.join(FOR_REQUESTS)}", repr(name)[:40])
    return name


def reply_codec_of(plan: str, kind: str) -> str:
    """The codec of the replies to requests of a kind: that of updates for a round's training, if the plan has one."""
    bits = _communication(plan).get("update_bits")
    if bits is None or kind != "train":
        return codec_of(plan)
    if type(bits) is not int or bits not in STEPS:
        raise RefusedError("communication.update_bits", f"one of {', '.join(map(str, STEPS))}", repr(bits)[:40])
    return update_codec(bits)


def update_codec(bits: int) -> str:
    """The name of the codec with so many bits for each number of an update."""
    return f"int{bits}"


def _communication(plan: str) -> dict[str, Any]:
    try:
        return dict(json.loads(plan).get("communication", {}))
    except (ValueError, AttributeError, RecursionError, TypeError):
        raise RefusedError("plan", "settings as one JSON object", "something else") from None


def encode(codec: str, arrays: Arrays, reference: Arrays | None = None) -> bytes:
    """Encode arrays with one of ``CODECS``."""
    return CODECS[codec].encode(arrays, reference or {})


@np.errstate(over="ignore", invalid="ignore")  # admission refuses numbers that are not finite, by name
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
