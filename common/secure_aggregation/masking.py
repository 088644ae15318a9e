"""Masks: streams of uint32 that derive from seeds, and the seed that two sites have in common."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ..errors import RefusedError

NAME = b"colora secure aggregation 1 "  # begins all that is derived or signed
KEY_BYTES = 32


def derive(secret: bytes, salt: bytes, purpose: str) -> bytes:
    """Return 32 bytes by HKDF-SHA256 (RFC 5869)."""
    return HKDF(hashes.SHA256(), KEY_BYTES, salt, NAME + purpose.encode()).derive(secret)


def expand(seed: bytes, count: int) -> np.ndarray:
    """Return ``count`` uint32 of the ChaCha20 key stream (RFC 8439). A seed is used for one vector only."""
    return np.frombuffer(key_stream(seed, 4 * count), "<u4")


def key_stream(seed: bytes, count: int) -> bytes:
    """Return ``count`` bytes of the same."""
    return Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor().update(bytes(count))


def public_key(private: bytes) -> bytes:
    """Return the X25519 public key (RFC 7748) of 32 private bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def pairwise_seed(private: bytes, public: bytes, salt: bytes, other: str) -> bytes:
    """Return the seed of the mask of two sites, which either computes from its own key and the other's public key.

    Raises RefusedError, which names the ``other`` site, for a public key that is none.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise RefusedError(f"mask key of {other}", "an X25519 public key", public.hex()) from None
    return derive(shared, salt, "pairwise mask")


def self_seed(secret: bytes, salt: bytes) -> bytes:
    """Return the seed of the mask that a site has for itself."""
    return derive(secret, salt, "self mask")
