"""The shared adapter on its way to the sites, as a difference to the adapter that a site received before.

The bytes begin with the SHA-256 of the adapter that the site must end up with. The difference in few bits follows
(``quantized.py``); where nothing follows, the adapter is the reference itself. The reference is what the site received
in the round that the request names as its last admitted one, or S_0, which every site makes from the plan's seed. A
request with a difference and one with the whole adapter are the same request: both have the same arrays and one key.
"""

from __future__ import annotations

import json

import numpy as np

from ..errors import ReferenceMissingError, RefusedError
from .codec import decode, encode, update_codec
from .quantized import STEPS
from .types import Arrays, hash_arrays

DIGEST_BYTES = 32


def difference_codec(bits: int) -> str:
    """The name, as ``Array.stype``, of differences with so many bits for each number."""
    return f"difference{bits}"


def broadcast_bits_of(plan: str) -> int | None:
    """The bits of the differences in a federation, from its plan as JSON; None where it has none.

    Raises RefusedError for a number that is not possible.
    """
    try:
        bits = dict(json.loads(plan).get("communication", {})).get("broadcast_bits")
    except (ValueError, AttributeError, RecursionError, TypeError):
        raise RefusedError("plan", "settings as one JSON object", "something else") from None
    if bits is not None and (type(bits) is not int or bits not in STEPS):
        raise RefusedError("communication.broadcast_bits", f"one of {', '.join(map(str, STEPS))}", repr(bits)[:40])
    return bits


def encode_difference(arrays: Arrays, reference: Arrays, bits: int) -> tuple[bytes, Arrays]:
    """Encode ``arrays - reference``, and return the bytes with the arrays that they stand for.

    These are not finite where ``arrays`` are not, or are beyond what a scale can represent.
    """
    codec = update_codec(bits)
    with np.errstate(over="ignore", invalid="ignore"):
        codes = encode(codec, arrays, reference)
    received = decode(codec, codes, reference)
    return bytes.fromhex(hash_arrays(received)) + codes, received


def unchanged(reference: Arrays) -> bytes:
    """The bytes that stand for the reference itself."""
    return bytes.fromhex(hash_arrays(reference))


def apply_difference(data: bytes, reference: Arrays, bits: int) -> Arrays:
    """Return the adapter that a difference from another machine stands for.

    No more memory is taken than the reference needs. Raises ReferenceMissingError if there is no reference or the
    result has another SHA-256, and RefusedError for another number of bytes or values that are not finite.
    """
    digest, codes = data[:DIGEST_BYTES].hex(), data[DIGEST_BYTES:]
    if len(data) < DIGEST_BYTES:
        raise RefusedError("arrays", f"at least {DIGEST_BYTES} bytes", len(data))
    if not reference:
        raise _missing("no adapter of that round")
    arrays = decode(update_codec(bits), codes, reference) if codes else reference
    infinite = [key for key, array in arrays.items() if not np.isfinite(array).all()]
    if infinite:
        raise RefusedError(infinite[0], "finite values", "NaN or infinity")
    if hash_arrays(arrays) != digest:
        raise _missing("another adapter of that round")
    return arrays


def _missing(found: str) -> ReferenceMissingError:
    message = f"The difference to the last adapter cannot be applied: the site has {found}. It needs the whole adapter."
    return ReferenceMissingError("arrays", "the adapter that the difference was made for", found, message=message)
