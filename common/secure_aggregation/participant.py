"""A site's part in a secure sum (Bonawitz et al. 2017, with double masking).

Every pair of sites has a mask that one adds and the other subtracts, and every site adds one of its own. The sum of all
sites keeps only the latter. Each site shares two secrets with the others: that of its own mask, which they reveal if it
sent its vector, and its key of the pairwise masks, which they reveal if it did not. Nobody ever reveals both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..errors import RefusedError
from .identity import Identity
from .masking import derive, expand, key_stream, pairwise_seed, public_key, self_seed
from .shamir import PRIME, SHARE_BYTES, split
from .view import Offer, Offers, View, commitment_of, from_hex, salt_of, signed_text

SPARE = 16  # bytes by which a random number is longer than PRIME, so that its remainder is as good as uniform


class Revealed(NamedTuple):
    """A site's shares by name of the site whose secret it is: of own masks, and of keys of the pairwise masks."""

    self_masks: dict[str, int]
    mask_keys: dict[str, int]


@dataclass(frozen=True)
class Participant:
    """A site in one attempt. ``secret`` (32 bytes) must derive from the site's own secret, the view and the vector.

    Everything is a function of the three, so that a repeated request gets the same bytes, and another vector has other
    keys.
    """

    identity: Identity
    view: View
    secret: bytes

    @cached_property
    def _private(self) -> bytes:
        return derive(self.secret, b"", "mask key")

    @cached_property
    def _own(self) -> bytes:
        return derive(self.secret, b"", "own mask")

    @cached_property
    def offer(self) -> Offer:
        """The site's signed keys."""
        public, commitment = public_key(self._private).hex(), commitment_of(self._own, self.view)
        signature = self.identity.sign(signed_text(self.view, self.identity.site, public, commitment))
        return Offer(public, commitment, signature.hex())

    def envelopes(self) -> dict[str, bytes]:
        """Return the shares of both secrets for each other member, encrypted together with the keys they belong to."""
        own, context = self.identity.site, self._context(self.identity.site, self.offer)
        texts = zip(self.view.members, self._shares, strict=True)
        return {name: self.identity.seal(name, text, context) for name, text in texts if name != own}

    @cached_property
    def _shares(self) -> list[bytes]:
        """The shares of the key and of the own mask for every member, in order."""
        count, needed = len(self.view.members), self.view.threshold - 1
        size = SHARE_BYTES + SPARE
        stream = key_stream(derive(self.secret, b"", "polynomials"), 2 * needed * size)
        numbers = [int.from_bytes(stream[i : i + size], "big") % PRIME for i in range(0, len(stream), size)]
        keys, owns = split(self._private, count, numbers[:needed]), split(self._own, count, numbers[needed:])
        return [b"".join(value.to_bytes(SHARE_BYTES, "big") for value in pair) for pair in zip(keys, owns, strict=True)]

    def mask(self, vector: np.ndarray, offers: Offers) -> np.ndarray:
        """Return the vector (n,) of uint32 with all masks. ``offers`` are those of the sites that shared their keys.

        Raises RefusedError for too few sites, a wrong signature, or another key of this site.
        """
        salt, own = self._check(offers), self.view.point(self.identity.site)
        masked = vector + expand(self_seed(self._own, salt), len(vector))
        for name, offer in offers.items():
            if name == self.identity.site:
                continue
            public = from_hex(offer.public, None, f"mask key of {name}", self.identity.site)
            mask = expand(pairwise_seed(self._private, public, salt, name), len(vector))
            if own < self.view.point(name):
                masked += mask
            else:
                masked -= mask
        return masked

    def reveal(self, offers: Offers, survivors: Sequence[str], envelopes: Mapping[str, bytes]) -> Revealed:
        """Return this site's shares: of the own masks of the survivors, and of the mask keys of the others.

        ``survivors`` are the sites that sent their vectors, and ``envelopes`` what the others sealed for this site. A
        share that cannot be decrypted is left out. Raises RefusedError for fewer survivors than the threshold.
        """
        self._check(offers)
        site = self.identity.site
        if len(set(survivors)) != len(survivors) or not {site} <= set(survivors) <= set(offers):
            raise RefusedError("sites of the sum", "this site and others that shared keys", "others", site=site)
        self._require(len(survivors), "sites of the sum")
        revealed = Revealed({}, {})
        for name in offers:
            text = self._shares[self.view.point(site) - 1] if name == site else None
            if text is None and name in envelopes:
                text = self.identity.open(name, envelopes[name], self._context(name, offers[name]))
            if text is None or len(text) != 2 * SHARE_BYTES:
                continue
            if name in survivors:
                revealed.self_masks[name] = int.from_bytes(text[SHARE_BYTES:], "big")
            else:
                revealed.mask_keys[name] = int.from_bytes(text[:SHARE_BYTES], "big")
        return revealed

    def _context(self, site: str, offer: Offer) -> bytes:
        """What the shares of a site are sealed to: a share of other keys of the same view does not open."""
        return signed_text(self.view, site, offer.public, offer.commitment)

    def _check(self, offers: Offers) -> bytes:
        """Check the keys of all sites, and return the salt of the masks. Raises RefusedError."""
        site = self.identity.site
        unknown = sorted(set(offers) - set(self.view.members))
        if unknown or offers.get(site) != self.offer:
            found = unknown[0] if unknown else "another key of this site"
            raise RefusedError("mask keys", "those of members, this site's own among them", found, site=site)
        self._require(len(offers), "sites that shared keys")
        for name, offer in offers.items():
            text = signed_text(self.view, name, offer.public, offer.commitment)
            self.identity.verify(name, text, from_hex(offer.signature, None, f"signature of {name}", site))
        return salt_of(self.view, offers)

    def _require(self, count: int, what: str) -> None:
        if count < self.view.threshold:
            site, needed = self.identity.site, self.view.threshold
            message = f"A sum of {count} sites is not opened: at least {needed} of {len(self.view.members)} are needed."
            raise RefusedError(f"number of {what}", f"at least {needed}", count, site=site, message=message)
