"""The coordinator's part in a secure sum: take the masks off the sum, with what the sites have revealed."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import RefusedError
from .identity import PublicKeys, is_signed
from .masking import KEY_BYTES, expand, pairwise_seed, public_key, self_seed
from .participant import Revealed
from .reed_solomon import Polynomial, decode
from .shamir import combine, secret_of, value_at
from .view import Offer, Offers, View, commitment_of, from_hex, salt_of, signed_text

MAX_WORK = 250_000  # of the search for one secret: number of decodings × squared number of shares; about 2 s


class Unmasked(NamedTuple):
    """A sum (n,) without masks, and what was wrong: the sites whose secrets a site's shares do not fit, by the latter.

    A wrong share is either that of the site that revealed it, or of the one that made it.
    """

    total: np.ndarray
    wrong: Mapping[str, Sequence[str]]


def check_offer(view: View, site: str, offer: Offer, roster: PublicKeys) -> None:
    """Raise RefusedError unless the other sites can use a site's keys. One wrong key would stop the round at all.

    The signature can only be checked for a site whose public key is in ``roster``.
    """
    pairwise_seed(bytes(range(KEY_BYTES)), bytes.fromhex(offer.public), b"", site)
    signature = from_hex(offer.signature, None, f"signature of {site}", site)
    if site in roster and not is_signed(
        roster[site], signed_text(view, site, offer.public, offer.commitment), signature
    ):
        message = "The site's keys are not signed with its key in roster.pub."
        hint = "If the site has a new key, the coordinator and all sites need the new roster.pub."
        field = f"signature of {site}"
        raise RefusedError(field, f"one by the key of {site}", "another", site=site, message=message, hint=hint)


def unmask(
    total: np.ndarray, view: View, offers: Offers, survivors: Collection[str], revealed: Mapping[str, Revealed]
) -> Unmasked:
    """Return the sum of the survivors' vectors modulo 2³². ``total`` (n,) is the sum of the masked ones.

    ``revealed`` are the shares by the site that sent them. Raises RefusedError if they do not give a secret.
    """
    salt, result, secrets = salt_of(view, offers), total.astype(np.uint32, copy=True), Secrets(view)
    for name, offer in offers.items():
        if name in survivors:
            shares = {of: r.self_masks[name] for of, r in revealed.items() if name in r.self_masks}
            secret = secrets.find(name, shares, lambda s, o=offer: commitment_of(s, view) == o.commitment)
            result -= expand(self_seed(secret, salt), len(result))
            continue
        shares = {of: r.mask_keys[name] for of, r in revealed.items() if name in r.mask_keys}
        private = secrets.find(name, shares, lambda s, o=offer: public_key(s).hex() == o.public)
        for survivor in survivors:
            public = bytes.fromhex(offers[survivor].public)
            mask = expand(pairwise_seed(private, public, salt, survivor), len(result))
            if secrets.points[survivor] < secrets.points[name]:  # the survivor added it
                result -= mask
            else:
                result += mask
    return Unmasked(result, secrets.wrong)


class Secrets:
    """Finds the secrets of an attempt from shares of which some may be wrong, and remembers whose these are."""

    def __init__(self, view: View) -> None:
        self.threshold = view.threshold
        self.points = {site: point for point, site in enumerate(view.members, 1)}
        self.wrong: dict[str, list[str]] = {}

    def find(self, owner: str, revealed: Mapping[str, int], fits: Callable[[bytes], bool]) -> bytes:
        """Return the secret of a site that fits its published key, from shares by the site that sent them.

        The sites without a wrong share so far come first. If their shares do not fit, as many wrong ones as are half
        of the spare ones are corrected, and where the search is not too long, all spare ones. Raises RefusedError.
        """
        order = sorted(revealed, key=lambda site: len(self.wrong.get(site, ())))
        shares = {self.points[site]: revealed[site] for site in order}
        if len(shares) >= self.threshold:
            secret = combine(dict(itertools.islice(shares.items(), self.threshold)))
            if secret is not None and fits(secret):
                return secret
            for chosen in _choices(shares, len(shares) - self.threshold):
                polynomial = decode(chosen, self.threshold) or []
                secret = secret_of(polynomial[0]) if polynomial else None
                if secret is not None and fits(secret):
                    self._note(owner, revealed, polynomial)
                    return secret
        raise RefusedError(
            "shares of a secret",
            f"at least {self.threshold} right ones",
            len(shares),
            site=owner,
            message=f"The masks of {owner!r} stay on the sum: its secret does not follow from {len(shares)} shares.",
        )

    def _note(self, owner: str, revealed: Mapping[str, int], polynomial: Polynomial) -> None:
        for site, share in revealed.items():
            if value_at(polynomial, self.points[site]) != share:
                self.wrong.setdefault(site, []).append(owner)


def _choices(shares: Mapping[int, int], spare: int) -> Iterator[Mapping[int, int]]:
    """All shares, then all but a few. Each two that are left out rightly make up for one more that is wrong.

    So few are left out first. The sets are all of one size, or random ones, always the same, if these are too many.
    """
    tries = MAX_WORK // max(1, len(shares)) ** 2
    yield shares
    for count in range(2 - spare % 2, spare + 1, 2):
        for left_out in itertools.islice(_sets(list(shares), count, tries), tries):
            tries -= 1
            yield {point: share for point, share in shares.items() if point not in left_out}


def _sets(points: Sequence[int], count: int, limit: int) -> Iterator[Collection[int]]:
    if math.comb(len(points), count) <= limit:
        return itertools.combinations(points, count)
    source = random.Random(count)
    return (set(source.sample(points, count)) for _ in itertools.count())
