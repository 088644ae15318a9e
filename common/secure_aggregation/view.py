"""What all sites of a secure sum must agree on. All keys and masks derive from it, so that no other view fits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

from ..errors import RefusedError
from .fixed_point import MAX_SITES, FixedPoint

STRICT = ConfigDict(extra="forbid", strict=True)
Digits64 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # 32 bytes


@dataclass(frozen=True)
class View:
    """One attempt to sum the updates of a round.

    ``token`` is a random text of the coordinator, another one for each attempt. ``plan`` and ``reference`` are hashes
    of the plan and of the shared arrays that the sites trained from. ``weights`` names what a site weighs and
    ``max_weight`` the largest weight that counts. ``members`` are the sites that may share keys, the same in all
    attempts at a round, in the order of the roster; ``min_sites`` is the smallest number of them in a sum.
    """

    federation: str
    round: int
    token: str
    plan: str
    reference: str
    weights: str
    max_weight: int
    members: tuple[str, ...]
    min_sites: int

    @property
    def digest(self) -> bytes:
        """SHA-256 of all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).digest()

    @property
    def threshold(self) -> int:
        """The number of sites that open a sum, and the smallest number of sites in it."""
        return threshold(len(self.members), self.min_sites)

    def fixed_point(self, bound: float) -> FixedPoint:
        """The integers of the sum; ``bound`` is the largest norm of an update."""
        return FixedPoint(bound, self.max_weight, len(self.members))

    def point(self, site: str) -> int:
        """The point at which a site's shares are the values of the polynomials."""
        return self.members.index(site) + 1

    def check(self, site: str) -> None:
        """Raise RefusedError unless the site can take part: members without repetition, itself among them."""
        if len(set(self.members)) != len(self.members) or site not in self.members:
            raise RefusedError("sites", "different ones, this site among them", ", ".join(self.members), site=site)
        if not self.min_sites <= len(self.members) <= MAX_SITES:
            expected = f"{self.min_sites} (privacy.min_sites) to {MAX_SITES}"
            raise RefusedError("number of sites", expected, len(self.members), site=site)


def threshold(members: int, min_sites: int) -> int:
    """Two thirds of the members, rounded up, and at least ``min_sites``.

    Two groups of so many members have 2 · threshold - members in common. So if fewer collude with the coordinator, the
    groups have an honest site in common, which reveals shares for one sum only.
    """
    return max(-(-2 * members // 3), min_sites)


@checked(frozen=True, config=STRICT)
class Offer:
    """A site's public keys for one attempt, in hexadecimal digits.

    ``public`` is an X25519 key for the masks, ``commitment`` the SHA-256 by which the coordinator recognizes the secret
    of the site's own mask, and ``signature`` the site's of both and of the view.
    """

    public: Digits64
    commitment: Digits64
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{2,216}$")]


Offers = Mapping[str, Offer]


def signed_text(view: View, site: str, public: str, commitment: str) -> bytes:
    """What a site signs."""
    return view.digest + "|".join((site, public, commitment)).encode()


def salt_of(view: View, offers: Offers) -> bytes:
    """Hash of the view and of the keys between whose owners the masks are. No two sets of sites have the same masks."""
    ordered = [(name, offers[name].public, offers[name].commitment) for name in view.members if name in offers]
    return hashlib.sha256(view.digest + json.dumps(ordered).encode()).digest()


def commitment_of(secret: bytes, view: View) -> str:
    """The commitment to the secret of a site's own mask."""
    return hashlib.sha256(b"commitment" + view.digest + secret).hexdigest()


def from_hex(text: str, length: int | None, field: str, site: str | None = None) -> bytes:
    """Return the bytes of hexadecimal digits. Raises RefusedError for another text or number of bytes."""
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = None
    if found is None or len(found) != (len(found) if length is None else length):
        expected = "hexadecimal digits" if length is None else f"{length} bytes in hexadecimal digits"
        raise RefusedError(field, expected, text, site=site)
    return found
