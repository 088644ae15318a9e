"""The keys of simulated sites for secure aggregation, in place of those of ``colora provision``."""

from __future__ import annotations

import hashlib
from functools import lru_cache

from cryptography.hazmat.primitives.asymmetric import ec

from ..common.config.schema import Plan, Recipe
from ..common.secure_aggregation.identity import Identity, PublicKeys

ORDER = 2**384 - 2**190  # a little less than the order of P-384


@lru_cache(maxsize=4)
def simulated_identities(seed: str, names: tuple[str, ...]) -> dict[str, Identity]:
    """Make the identities of all sites. They derive from a seed, so that every process of a simulation has the same.

    Whoever knows the recipe knows them: a simulation shows what secure aggregation costs, and protects nobody.
    """
    keys = {name: _key(f"{seed}|{name}") for name in names}
    roster = {name: key.public_key() for name, key in keys.items()}
    return {name: Identity(name, key, roster) for name, key in keys.items()}


def simulated_public_keys(recipe: Recipe, names: tuple[str, ...]) -> PublicKeys:
    """Return the public keys of all sites of a recipe with secure aggregation, else none."""
    if not recipe.privacy.secure_aggregation or not names:
        return {}
    return simulated_identities(seed_of(recipe), names)[names[0]].roster


def seed_of(plan: Plan) -> str:
    """What the keys of a simulation derive from."""
    return f"{plan.seed}|{plan.name}"


def _key(text: str) -> ec.EllipticCurvePrivateKey:
    number = int.from_bytes(hashlib.sha512(text.encode()).digest(), "big")
    return ec.derive_private_key(number % ORDER + 1, ec.SECP384R1())
