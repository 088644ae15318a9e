"""What a shared array looks like in bytes. A codec is one row; Flower's ``Array.stype`` carries its name."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .errors import RefusedError


@dataclass(frozen=True)
class Codec:
    """``encode`` and ``decode`` are inverse to each other."""

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes], np.ndarray]


def _to_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _from_npy(data: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)  # unlike np.load it opens no archives


DEFAULT = "numpy.ndarray"  # Flower's own serialisation
CODECS: dict[str, Codec] = {DEFAULT: Codec(_to_npy, _from_npy)}


def decode(stype: str, data: bytes, key: str) -> np.ndarray:
    """Bytes → array. Raises RefusedError for an unknown codec or broken bytes."""
    if stype not in CODECS:
        raise RefusedError(key, f"a codec of {', '.join(CODECS)}", stype)
    try:
        return CODECS[stype].decode(data)
    except Exception as error:  # the bytes come from outside, and numpy raises what it likes on broken ones
        raise RefusedError(key, "whole array bytes", type(error).__name__) from None
