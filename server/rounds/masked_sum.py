"""The masked sum of a round on disk. Once it may have been opened, no other sum of the round can be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...common.atomic_io import load_arrays, save_arrays
from ...common.errors import DamagedError, RefusedError, StateError
from ...common.secure_aggregation.bodies import ENVELOPE_BYTES
from ...common.secure_aggregation.view import Offer, Offers, View
from .checkpoint import MAX_CHECKPOINTS

FILES = "round-*.safetensors"
SUM, ENVELOPES = "sum", "envelopes"  # names of the arrays


@dataclass(frozen=True)
class MaskedSum:
    """The sum (n,) of the survivors' masked vectors modulo 2³², and what is needed to open it.

    ``plan`` is the plan that the sites trained by, as JSON. ``envelopes`` (offers, members, bytes) are the sealed
    shares: from each site that shared its keys, in the order of ``offers``, to each member.
    """

    plan: str
    view: View
    offers: Offers
    envelopes: np.ndarray
    survivors: tuple[str, ...]
    total: np.ndarray

    @property
    def dropped(self) -> list[str]:
        """The sites that shared keys and are not in the sum."""
        return [name for name in self.offers if name not in self.survivors]

    def envelopes_for(self, site: str) -> dict[str, str]:
        """What the other sites sealed for this one, in hexadecimal digits by sender."""
        column = self.envelopes[:, self.view.point(site) - 1]
        return {name: sealed.tobytes().hex() for name, sealed in zip(self.offers, column, strict=True) if name != site}


def sealed_by(site: str, envelopes: Mapping[str, str], view: View) -> np.ndarray:
    """Return a site's envelopes (members, bytes); that for itself is zeros.

    Raises RefusedError unless there is one for each other member, and no other.
    """
    others = set(view.members) - {site}
    if envelopes.keys() != others:
        found = f"{len(others & envelopes.keys())} of them, and {len(envelopes.keys() - others)} others"
        raise RefusedError("envelopes", f"one for each of {len(others)} other sites", found, site=site)
    sealed = np.zeros((len(view.members), ENVELOPE_BYTES), np.uint8)
    for i, name in enumerate(view.members):
        if name != site:
            sealed[i] = np.frombuffer(bytes.fromhex(envelopes[name]), np.uint8)
    return sealed


def write_sum(path: Path, masked: MaskedSum) -> None:
    """Write a masked sum before it is opened, and delete those of rounds that no checkpoint can repeat."""
    meta = {
        "plan": masked.plan,
        "view": dataclasses.asdict(masked.view),
        "offers": [[name, dataclasses.asdict(offer)] for name, offer in masked.offers.items()],
        "survivors": masked.survivors,
    }
    save_arrays(path, {SUM: masked.total, ENVELOPES: masked.envelopes}, meta)
    for old in sorted(path.parent.glob(FILES))[: -MAX_CHECKPOINTS - 1]:
        old.unlink(missing_ok=True)


def read_sum(path: Path, reference: str) -> MaskedSum | None:
    """Return the masked sum that an earlier process wrote, or None if there is no file.

    ``reference`` is the hash of the shared arrays of the round. Raises DamagedError, and StateError for a sum of other
    arrays: if it may have been opened already, no other one can be.
    """
    if not path.exists():
        return None
    hint = "Restore it from a backup, or begin a federation with another name."
    try:
        arrays, meta = load_arrays(path)
    except DamagedError as error:
        raise DamagedError(error.field, error.expected, error.found, message=error.message, hint=hint) from None
    try:
        view = View(**{**meta["view"], "members": tuple(meta["view"]["members"])})
        offers = {name: Offer(**offer) for name, offer in meta["offers"]}
        masked = MaskedSum(meta["plan"], view, offers, arrays[ENVELOPES], tuple(meta["survivors"]), arrays[SUM])
    except (KeyError, TypeError) as error:
        message = f"{path} is damaged: its metadata have no {error}."
        raise DamagedError(str(path), "complete metadata", error, message=message, hint=hint) from None
    if view.reference != reference:
        raise StateError(
            str(path),
            f"a sum of updates of the arrays {reference[:16]}",
            view.reference[:16],
            message=f"Round {view.round} has a masked sum in {path}, of updates of another shared adapter than that of "
            f"the checkpoint of round {view.round - 1}. The sites may have opened it, and then open no other.",
            hint="Restore the checkpoints of the run from a backup, or begin a federation with another name.",
        )
    return masked
