"""The coordinator's part in a secure sum: take the masks off the sum, with what the sites have revealed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping

import numpy as np

from ..errors import RefusedError
from .masking import expand, pairwise_seed, public_key, self_seed
from .participant import Revealed
from .shamir import combine
from .view import Offers, View, commitment_of, from_hex, salt_of

MAX_TRIES = 200  # sets of shares that are tried for one secret: a dishonest site may have revealed a wrong share


def unmask(
    total: np.ndarray, view: View, offers: Offers, survivors: Collection[str], revealed: Mapping[str, Revealed]
) -> np.ndarray:
    """Return the sum (n,) of the survivors' vectors modulo 2³². ``total`` is the sum of the masked ones.

    ``revealed`` are the shares by the site that sent them. Raises RefusedError if they do not give a secret.
    """
    salt, result = salt_of(view, offers), total.astype(np.uint32, copy=True)
    for name in offers:
        if name in survivors:
            shares = {view.point(of): r.self_masks[name] for of, r in revealed.items() if name in r.self_masks}
            secret = _secret(shares, view, name, lambda s, n=name: commitment_of(s, view) == offers[n].commitment)
            result -= expand(self_seed(secret, salt), len(result))
            continue
        shares = {view.point(of): r.mask_keys[name] for of, r in revealed.items() if name in r.mask_keys}
        private = _secret(shares, view, name, lambda s, n=name: public_key(s).hex() == offers[n].public)
        for survivor in survivors:
            public = from_hex(offers[survivor].public, None, "mask key", survivor)
            mask = expand(pairwise_seed(private, public, salt), len(result))
            if view.point(survivor) < view.point(name):  # the survivor added it
                result -= mask
            else:
                result += mask
    return result


def _secret(shares: Mapping[int, int], view: View, site: str, fits: Callable[[bytes], bool]) -> bytes:
    """The secret of a site that fits its published key. Raises RefusedError."""
    needed = view.threshold
    if len(shares) >= needed:
        for chosen in itertools.islice(itertools.combinations(shares, needed), MAX_TRIES):
            secret = combine({point: shares[point] for point in chosen})
            if secret is not None and fits(secret):
                return secret
    raise RefusedError(
        "shares of a secret",
        f"at least {needed} right ones",
        len(shares),
        site=site,
        message=f"The masks of {site!r} stay on the sum: its secret does not follow from {len(shares)} shares.",
    )
