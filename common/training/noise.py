"""Random numbers from a secret, for differential privacy: the same secret gives the same numbers on every machine.

They come from the stream cipher ChaCha20 (RFC 8439), so that someone who sees some of them cannot compute the
others. A round that runs again adds the same noise, so that an observer cannot average it away.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

SUMMED = 4  # Gaussians in one sample, against attacks on the lowest bits (Holohan and Braghin 2021, arXiv 2107.10138)
_NOISE, _SAMPLING = 0, 1


class NoiseSource:
    """Numbers that derive from ``parts``. One of them must be a secret of the site, and one name the request."""

    def __init__(self, *parts: object) -> None:
        self._key = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()

    def normal(self, count: int, step: int) -> np.ndarray:
        """Return ``count`` independent standard normal numbers for an optimizer step, in double precision."""
        pairs = math.ceil(count * SUMMED / 2)
        uniform = self._uniform(2 * pairs, step, _NOISE)
        radius, angle = np.sqrt(-2.0 * np.log(uniform[:pairs])), 2.0 * np.pi * uniform[pairs:]
        samples = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[: count * SUMMED]
        return samples.reshape(SUMMED, count).sum(0) / math.sqrt(SUMMED)

    def sample(self, count: int, rate: float, step: int) -> list[int]:
        """Return the numbers below ``count`` that a step draws, each with probability ``rate`` (Poisson sampling)."""
        return np.flatnonzero(self._uniform(count, step, _SAMPLING) < rate).tolist()

    def _uniform(self, count: int, step: int, purpose: int) -> np.ndarray:
        """``count`` numbers in (0, 1)."""
        nonce = (0).to_bytes(4, "little") + step.to_bytes(8, "little") + purpose.to_bytes(4, "little")
        stream = Cipher(algorithms.ChaCha20(self._key, nonce), mode=None).encryptor().update(bytes(8 * count))
        return ((np.frombuffer(stream, "<u8") >> 11) + 0.5) * 2.0**-53
