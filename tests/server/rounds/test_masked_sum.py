"""The masked sum on disk, and what a reply may hold: small enough for the largest federation, and never forgotten."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from colora.common.atomic_io import save_arrays
from colora.common.errors import DamagedError, RefusedError, StateError
from colora.common.secure_aggregation.bodies import ENVELOPE_BYTES, Opened, Shared, from_bytes, to_bytes
from colora.common.secure_aggregation.fixed_point import MAX_SITES
from colora.common.secure_aggregation.shamir import PRIME
from colora.common.secure_aggregation.view import Offer, View
from colora.server.rounds.masked_sum import MaskedSum, read_sum, sealed_by, write_sum

OFFER = Offer("ab" * 32, "cd" * 32, "ef" * 104)


def masked_sum(sites: int, round_number: int = 1) -> MaskedSum:
    rng = np.random.default_rng(sites)
    names = tuple(f"{k:04}-{'n' * 59}" for k in range(sites))  # as long as names can be
    view = View("fed", round_number, "token", "plan", "reference", "tokens", 64, names, 3)
    offers = dict.fromkeys(reversed(names[: sites - 1]), OFFER)
    envelopes = rng.integers(0, 256, (sites - 1, sites, ENVELOPE_BYTES), dtype=np.uint8)
    return MaskedSum("{}", view, offers, envelopes, names[:2], rng.integers(0, 2**32, 9, dtype=np.uint32))


def test_a_sum_of_many_sites_is_read_as_it_was_written_and_its_envelopes_are_not_in_the_header(tmp_path: Path) -> None:
    """The safetensors format allows headers of 100 MB: of 1,000 sites, the envelopes alone would take 400 MB there."""
    written, path = masked_sum(300), tmp_path / "round-000001.safetensors"
    write_sum(path, written)
    read = read_sum(path, "reference")
    assert read is not None
    for field in dataclasses.fields(MaskedSum):
        one, other = getattr(read, field.name), getattr(written, field.name)
        assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other
    assert list(read.offers) == list(written.offers)
    assert read.dropped == written.dropped
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    assert header < 1000 * 300
    assert header * (MAX_SITES / 300) < 10_000_000
    receiver, sender = written.view.members[7], written.view.members[290]
    at = list(written.offers).index(sender)
    assert bytes.fromhex(read.envelopes_for(receiver)[sender]) == written.envelopes[at, 7].tobytes()
    assert receiver not in read.envelopes_for(receiver)


def test_a_sum_of_another_adapter_is_an_error_and_not_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "round-000003.safetensors"
    assert read_sum(path, "reference") is None
    write_sum(path, masked_sum(4, 3))
    with pytest.raises(StateError, match=r"Round 3 has a masked sum in .*that of the checkpoint of round 2\. .*backup"):
        read_sum(path, "other")
    save_arrays(path, {"sum": np.zeros(1, np.uint32)}, {"view": {}})
    with pytest.raises(DamagedError, match="is damaged"):
        read_sum(path, "reference")


def test_the_sums_of_the_last_four_rounds_are_kept(tmp_path: Path) -> None:
    for t in range(1, 7):
        write_sum(tmp_path / f"round-{t:06d}.safetensors", masked_sum(4, t))
    assert sorted(path.name[6:12] for path in tmp_path.iterdir()) == ["000003", "000004", "000005", "000006"]


def test_a_site_seals_one_share_for_each_other_member_and_for_nobody_else() -> None:
    view = masked_sum(4).view
    site, *others = view.members
    right = {name: f"{k:02x}" * ENVELOPE_BYTES for k, name in enumerate(others, 1)}
    assert sealed_by(site, right, view)[:, 0].tolist() == [0, 1, 2, 3]
    for wrong in (
        {},
        dict(list(right.items())[1:]),
        right | {site: right[others[0]]},
        right | {"eve": right[others[0]]},
    ):
        with pytest.raises(RefusedError, match="envelopes: expected one for each of 3 other sites"):
            sealed_by(site, wrong, view)


@pytest.mark.parametrize("sites", [3, 50, MAX_SITES])
def test_a_reply_is_parsed_if_it_is_no_longer_than_a_right_one_can_be(sites: int) -> None:
    names = [f"{k:04}-{'n' * 59}" for k in range(sites)]
    right = (
        Shared(OFFER, dict.fromkeys(names, "ab" * ENVELOPE_BYTES)),
        Opened(dict.fromkeys(names, f"{PRIME - 1:x}"), {}),
    )
    for body in right:
        assert from_bytes(type(body), to_bytes(body), sites) == body
    twice = Shared(
        OFFER, {name + suffix: "ab" * ENVELOPE_BYTES for name in [*names, "a", "b", "c"] for suffix in ("", "!")}
    )
    with pytest.raises(RefusedError, match="bytes of the reply: expected at most"):
        from_bytes(Shared, to_bytes(twice), sites)
