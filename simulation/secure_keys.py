"""The keys of simulated sites for secure aggregation, in place of those of ``colora provision``."""

from __future__ import annotations

import hashlib
from functools import lru_cache

from cryptography.hazmat.primitives.asymmetric import ec

from ..common.secure_aggregation.identity import Identity

ORDER = 2**384 - 2**190  # a little less than the order of P-384


@lru_cache(maxsize=4)
def simulated_identities(seed: str, names: tuple[str, ...]) -> dict[str, Identity]:
    """Make the identities of all sites. They derive from a seed, so that every process of a simulation has the same.

    Whoever knows the recipe knows them: a simulation shows what secure aggregation costs, and protects nobody.
    """
    keys = {name: _key(f"{seed}|{name}") for name in names}
    roster = {name: key.public_key() for name, key in keys.items()}
    return {name: Identity(name, key, roster) for name, key in keys.items()}


def _key(text: str) -> ec.EllipticCurvePrivateKey:
    number = int.from_bytes(hashlib.sha512(text.encode()).digest(), "big")
    return ec.derive_private_key(number % ORDER + 1, ec.SECP384R1())
