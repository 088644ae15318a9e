"""The contents of the messages of a secure sum as JSON, checked where they arrive."""

from __future__ import annotations

import json
from dataclasses import asdict, field
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from ..errors import RefusedError
from .identity import NONCE_BYTES
from .participant import Revealed
from .shamir import PRIME, SHARE_BYTES
from .view import STRICT, Offer

Weights = Literal["tokens", "examples", "uniform"]
ENVELOPE_BYTES = 2 * SHARE_BYTES + NONCE_BYTES + 16  # two shares, and what encryption adds
ENTRY_BYTES = 2 * ENVELOPE_BYTES + 80  # of one site's entry in a reply: an envelope or a share in digits, and a name
REPLY_BYTES = 1024  # of the rest of a reply
Envelope = Annotated[str, Field(pattern=f"^[0-9a-f]{{{2 * ENVELOPE_BYTES}}}$")]
T = TypeVar("T")


@dataclass(frozen=True, config=STRICT)
class SumBody:
    """What the coordinator sends in each step of an attempt; the fields below ``max_weight`` as far as they are known.

    ``token``, ``weights``, ``max_weight`` and ``members`` are those of the ``View``. ``offers`` are the keys of the
    sites that shared theirs, ``survivors`` the sites that sent their vectors, and ``envelopes`` what the others sealed
    for the receiver, in hexadecimal digits by sender.
    """

    token: str
    members: tuple[str, ...]
    weights: Weights
    max_weight: Annotated[int, Field(ge=1, lt=2**53)]
    offers: dict[str, Offer] = field(default_factory=dict)
    survivors: tuple[str, ...] = ()
    envelopes: dict[str, Envelope] = field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Shared:
    """The reply to the step ``share``: the site's keys, and its sealed shares in hexadecimal digits by receiver."""

    offer: Offer
    envelopes: dict[str, Envelope]


@dataclass(frozen=True, config=STRICT)
class Opened:
    """The reply to the step ``open``: the site's shares in hexadecimal digits, by site."""

    self_masks: dict[str, str]
    mask_keys: dict[str, str]

    @classmethod
    def of(cls, revealed: Revealed) -> Opened:
        """Encode shares."""
        return cls(*({name: f"{value:x}" for name, value in shares.items()} for shares in revealed))

    def revealed(self) -> Revealed:
        """Decode the shares. Raises RefusedError for one that is none."""
        return Revealed(*({k: _share(v) for k, v in shares.items()} for shares in (self.self_masks, self.mask_keys)))


def to_bytes(body: Any) -> bytes:
    """Return a body as JSON."""
    return json.dumps(asdict(body), sort_keys=True).encode()


def from_bytes(kind: type[T], data: bytes, members: int | None = None) -> T:
    """Return the body in JSON from an untrusted sender. Raises RefusedError.

    A site's reply is not parsed if it is longer than one to so many ``members`` can be.
    """
    if members is not None and len(data) > REPLY_BYTES + members * ENTRY_BYTES:
        raise RefusedError("bytes of the reply", f"at most {REPLY_BYTES + members * ENTRY_BYTES}", len(data))
    try:
        return TypeAdapter(kind).validate_json(data)
    except (pydantic.ValidationError, ValueError, RecursionError) as error:
        raise RefusedError("secure aggregation", f"a {kind.__name__}", type(error).__name__) from None


def _share(text: str) -> int:
    try:
        value = int(text, 16) if len(text) <= 132 else PRIME
    except ValueError:
        value = PRIME
    if not 0 <= value < PRIME:
        raise RefusedError("share", "a number below 2^521 - 1 in hexadecimal digits", text)
    return value
