"""A secure sum as pure functions: it is exact, says nothing else, and opens for enough honest sites only."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from scipy.stats import chisquare

from colora.common.errors import RefusedError
from colora.common.secure_aggregation import opening
from colora.common.secure_aggregation import participant as participant_module
from colora.common.secure_aggregation.fixed_point import LARGEST, MAX_SITES, FixedPoint, flatten, unflatten
from colora.common.secure_aggregation.identity import Identity, parse_roster
from colora.common.secure_aggregation.masking import expand, public_key
from colora.common.secure_aggregation.opening import Unmasked, check_offer, unmask
from colora.common.secure_aggregation.participant import Participant, Revealed
from colora.common.secure_aggregation.reed_solomon import decode
from colora.common.secure_aggregation.shamir import PRIME, combine, split, value_at
from colora.common.secure_aggregation.view import Offer, View, commitment_of, signed_text, threshold
from colora.server.deployment.provisioning.certificates import new_site_key

KEYS = {f"s{k:02}": ec.generate_private_key(ec.SECP384R1()) for k in range(10)}
ROSTER = {name: key.public_key() for name, key in KEYS.items()}


@dataclass
class Table:
    """Sites around one attempt, with random vectors."""

    count: int
    size: int = 50
    min_sites: int = 3

    def __post_init__(self) -> None:
        names = tuple(sorted(KEYS))[: self.count]
        self.view = View("fed", 1, "token", "plan", "reference", "tokens", 64, names, self.min_sites)
        rng = np.random.default_rng(self.count)
        self.vectors = {name: rng.integers(0, 2**32, self.size, dtype=np.uint32) for name in names}
        self.sites = {name: self.site(name) for name in names}

    def site(self, name: str, view: View | None = None) -> Participant:
        return Participant(Identity(name, KEYS[name], ROSTER), view or self.view, name.encode().ljust(32))

    def offers(self, names: Sequence[str]) -> dict[str, Offer]:
        return {name: self.sites[name].offer for name in names}

    def reveal(self, offers: dict[str, Offer], survivors: Sequence[str], of: Sequence[str]) -> dict[str, Revealed]:
        sealed = {name: self.sites[name].envelopes() for name in offers}
        return {
            name: self.sites[name].reveal(offers, survivors, {n: s[name] for n, s in sealed.items() if n != name})
            for name in of
        }


@pytest.mark.parametrize(
    ("count", "absent", "dropped", "mute"),
    [(3, 0, 0, 0), (10, 0, 0, 0), (10, 3, 0, 0), (10, 0, 3, 0), (10, 0, 0, 3), (10, 1, 1, 1), (7, 0, 2, 0)],
)
def test_the_opened_sum_is_that_of_the_vectors_with_dropouts_in_every_step(
    count: int, absent: int, dropped: int, mute: int
) -> None:
    """``absent`` share no keys, ``dropped`` send no vector, and ``mute`` do not help to open the sum."""
    table = Table(count)
    names = list(table.view.members)
    random.Random(count + dropped).shuffle(names)
    offers = table.offers(names[absent:])
    survivors = names[absent + dropped :]
    total = np.zeros(table.size, np.uint32)
    for name in survivors:
        total += table.sites[name].mask(table.vectors[name], offers)
    revealed = table.reveal(offers, survivors, survivors[mute:])
    opened, wrong = unmask(total, table.view, offers, survivors, revealed)
    assert not wrong
    expected = np.zeros(table.size, np.uint32)
    for name in survivors:
        expected += table.vectors[name]
    assert opened.tolist() == expected.tolist()
    assert total.tolist() != expected.tolist()


def test_below_the_threshold_nothing_is_revealed_masked_or_opened() -> None:
    table = Table(10)  # threshold 7
    assert table.view.threshold == 7
    names, offers = table.view.members, table.offers(table.view.members)
    few = dict(itertools.islice(offers.items(), 6))
    with pytest.raises(RefusedError, match="A sum of 6 sites is not opened"):
        table.sites["s00"].mask(table.vectors["s00"], few)
    with pytest.raises(RefusedError, match="A sum of 6 sites is not opened: at least 7 of 10 are needed"):
        table.reveal(offers, names[:6], names[:1])
    revealed = table.reveal(offers, names, names[:6])
    with pytest.raises(RefusedError, match="does not follow from 6 shares"):
        unmask(np.zeros(50, np.uint32), table.view, offers, names, revealed)


def test_a_smallest_number_of_sites_is_a_threshold_of_its_own() -> None:
    assert [threshold(n, 3) for n in (3, 4, 5, 6, 9, 10)] == [3, 3, 4, 4, 6, 7]
    assert threshold(6, 6) == 6
    with pytest.raises(RefusedError, match="number of sites: expected 4 "):
        Table(3, min_sites=4).view.check("s00")
    with pytest.raises(RefusedError, match="this site among them"):
        Table(3).view.check("s09")


def test_two_colluding_sites_and_the_coordinator_open_no_update_of_a_third() -> None:
    """What the coordinator and two sites hold, over all that honest sites reveal, lacks one of the two secrets.

    All shares that they could have are tried: those of the two colluders for both secrets, and of the honest sites for
    the one that each reveals. They reach the threshold for exactly one.
    """
    table = Table(7)  # threshold 5
    names, offers = list(table.view.members), table.offers(table.view.members)
    victim, colluders = "s03", ("s00", "s06")
    honest = [name for name in names if name not in (victim, *colluders)]
    own = {name: table.sites[name] for name in colluders}
    for said_dropped in range(len(honest) + 1):  # the coordinator tells these many honest sites that the victim is gone
        alive = table.reveal(offers, names, [*honest[said_dropped:], victim])
        without = [name for name in names if name != victim]
        gone = table.reveal(offers, without, honest[:said_dropped])
        masks = {name for name, r in alive.items() if victim in r.self_masks} | set(own)
        keys = {name for name, r in gone.items() if victim in r.mask_keys} | set(own)
        assert not masks & keys - set(own)
        assert not (len(masks) >= table.view.threshold and len(keys) >= table.view.threshold)


def least_honest(members: int, needed: int, colluders: int) -> int:
    """The smallest number of honest sites in an opened sum, if sites are told different lists of lost sites.

    With o sites that shared keys, an honest one reveals keys of at most o - needed sites, and a key takes
    needed - colluders of the o - colluders honest sites. So at most (o - c)(o - t) / (t - c) keys are revealed.
    """
    honest = {o: o - colluders for o in range(needed, members + 1)}
    return min(h - h * (o - needed) // (needed - colluders) for o, h in honest.items())


def test_with_fewer_colluders_than_half_of_min_sites_no_list_of_sites_shows_an_update() -> None:
    """The coordinator chooses the list, which has ``min_sites`` or more sites. What the guide says of it."""
    for min_sites in range(2, 40):
        colluders = (min_sites - 1) // 2
        for members in range(min_sites, 3 * min_sites + 3):
            needed = threshold(members, min_sites)
            assert colluders < 2 * needed - members, "two sums of a list, or both secrets of a site"
            assert least_honest(members, needed, colluders) >= 2
        assert any(  # one more is enough
            colluders + 1 >= 2 * threshold(n, min_sites) - n
            or least_honest(n, threshold(n, min_sites), colluders + 1) < 2
            for n in range(min_sites, 3 * min_sites + 3)
        )
    assert [least_honest(10, 7, colluders) for colluders in range(4)] == [6, 5, 4, 2]


def test_the_colluders_own_masks_do_not_uncover_the_vector() -> None:
    """Less the masks that the two colluders have in common with the victim, its vector is still uniform."""
    table = Table(5, size=20_000)
    table.vectors["s02"] = np.zeros(20_000, np.uint32)
    offers = table.offers(table.view.members)
    masked = table.sites["s02"].mask(table.vectors["s02"], offers)
    salt = participant_module.salt_of(table.view, offers)
    for name in ("s00", "s04"):
        public = bytes.fromhex(offers["s02"].public)
        seed = participant_module.pairwise_seed(table.sites[name]._private, public, salt, "s02")
        masked = masked + expand(seed, 20_000) * (np.uint32(1) if name == "s04" else np.uint32(2**32 - 1))
    assert is_uniform(masked)


def is_uniform(vector: np.ndarray) -> bool:
    """Whether the bytes of the vector are as uniform as random ones would be (χ² at 10⁻⁶)."""
    return chisquare(np.bincount(vector.view(np.uint8), minlength=256)).pvalue > 1e-6


def test_a_masked_vector_is_uniform_and_fails_the_test_without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(4, size=20_000)
    vector = FixedPoint(1.0, 64, 4).encode(np.random.default_rng(0).normal(0, 1e-3, 19_999), 64)
    offers = table.offers(table.view.members)
    masked = table.sites["s01"].mask(vector, offers)
    assert is_uniform(masked)
    assert abs(np.corrcoef(masked.astype(float), vector.view(np.int32).astype(float))[0, 1]) < 0.04
    monkeypatch.setattr(participant_module, "expand", lambda seed, count: np.zeros(count, np.uint32))
    assert not is_uniform(table.sites["s01"].mask(vector, offers))


def test_no_two_views_sets_of_sites_or_vectors_have_masks_in_common() -> None:
    """Otherwise the difference of two masked vectors of a site would be free of some masks."""
    table = Table(5, size=2000)
    zero, names = np.zeros(2000, np.uint32), list(table.view.members)
    offers = table.offers(names)
    first = table.sites["s00"].mask(zero, offers)
    fewer = table.sites["s00"].mask(zero, table.offers(names[:4]))
    assert is_uniform(first - fewer)
    for change in ({"token": "other"}, {"max_weight": 65}, {"reference": "other"}, {"plan": "other"}, {"round": 2}):
        view = dataclasses.replace(table.view, **change)
        with pytest.raises(RefusedError, match="this site's own among them"):
            table.site("s00", view).mask(zero, offers)
        others = {name: table.site(name, view).offer for name in names}
        with pytest.raises(RefusedError, match="not signed by 's01'"):  # a peer that was told another view
            table.sites["s00"].mask(zero, {**offers, "s01": others["s01"]})


def test_a_site_that_the_coordinator_made_up_is_refused() -> None:
    table, key = Table(3), ec.generate_private_key(ec.SECP384R1())
    view = dataclasses.replace(table.view, members=(*table.view.members, "made-up"))
    roster = {**ROSTER, "made-up": key.public_key()}
    fake = Participant(Identity("made-up", key, roster), view, b"x" * 32)
    sites = {name: table.site(name, view) for name in table.view.members}
    with pytest.raises(RefusedError, match="a site 'made-up' that is not in this site's roster"):
        sites["s00"].envelopes()
    offers = {**{name: site.offer for name, site in sites.items()}, "made-up": fake.offer}
    with pytest.raises(RefusedError, match="not in this site's roster"):
        sites["s00"].mask(np.zeros(3, np.uint32), offers)
    stolen = Participant(Identity("s01", key, roster), view, b"x" * 32).offer
    with pytest.raises(RefusedError, match="not signed by 's01'"):
        sites["s00"].mask(np.zeros(3, np.uint32), {name: s.offer for name, s in sites.items()} | {"s01": stolen})


def test_only_the_receiver_reads_an_envelope_and_only_in_its_view() -> None:
    table = Table(3)
    sealed = table.sites["s00"].envelopes()["s01"]
    offer = table.sites["s00"].offer
    context = signed_text(table.view, "s00", offer.public, offer.commitment)
    one, other = (table.sites[name].identity for name in ("s01", "s02"))
    assert one.open("s00", sealed, context) is not None
    assert one.open("s00", sealed, b"another view") is None
    assert one.open("s02", sealed, context) is None
    assert other.open("s00", sealed, context) is None
    assert one.open("s00", sealed[:-1] + bytes([sealed[-1] ^ 1]), context) is None
    assert one.open("s00", b"", context) is None


def test_shares_of_other_keys_of_the_same_view_do_not_open() -> None:
    """Else a coordinator could have the masks of a second set of keys opened, and subtract two sums of one round."""
    table = Table(6)
    names = table.view.members
    others = {
        name: Participant(Identity(name, KEYS[name], ROSTER), table.view, b"second".ljust(32) + name.encode())
        for name in names
    }
    receiver, offers = names[0], table.offers(names)
    swapped = {name: others[name].envelopes()[receiver] for name in names[1:]}
    assert set(table.sites[receiver].reveal(offers, names, swapped).self_masks) == {receiver}
    right = {name: table.sites[name].envelopes()[receiver] for name in names[1:]}
    assert set(table.sites[receiver].reveal(offers, names, right).self_masks) == set(names)


def test_a_repeated_request_gets_the_same_bytes() -> None:
    one, two = Table(4), Table(4)
    offers = one.offers(one.view.members)
    for name in one.view.members:
        a, b = one.sites[name], two.sites[name]
        assert (a.offer, a.envelopes()) == (b.offer, b.envelopes())
        assert a.mask(one.vectors[name], offers).tolist() == b.mask(one.vectors[name], offers).tolist()


def test_one_wrong_share_is_found_out_where_there_are_enough_others() -> None:
    table = Table(6)  # threshold 4
    names, offers = table.view.members, table.offers(table.view.members)
    total = np.zeros(table.size, np.uint32)
    for name in names:
        total += table.sites[name].mask(table.vectors[name], offers)
    revealed = table.reveal(offers, names, names)
    wrong = {name: (value + 1) % PRIME for name, value in revealed["s00"].self_masks.items()}
    opened = unmask(total, table.view, offers, names, {**revealed, "s00": Revealed(wrong, {})})
    assert opened.total.tolist() == np.sum(list(table.vectors.values()), axis=0, dtype=np.uint32).tolist()
    assert opened.wrong == {"s00": ["s00"]}
    few = {name: revealed[name] for name in names[1:4]}
    with pytest.raises(RefusedError, match="does not follow from 4 shares"):
        unmask(total, table.view, offers, names, {**few, "s00": Revealed(wrong, {})})


def test_the_coordinator_refuses_keys_that_would_stop_the_other_sites() -> None:
    """Each of them makes the step ``mask`` fail at every other site. The errors of both sides name the same site."""
    table = Table(3)
    offers, names = table.offers(table.view.members), table.view.members
    for site, offer in offers.items():
        check_offer(table.view, site, offer, ROSTER)
    own = offers["s01"]
    low_order = "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"  # RFC 7748, section 7
    key = Participant(Identity("s01", KEYS["s02"], ROSTER), table.view, table.sites["s01"].secret).offer  # of another
    wrong = {
        "mask key of s01": [dataclasses.replace(own, public=public) for public in ("00" * 32, low_order)],
        "signature of s01": [dataclasses.replace(own, signature=text) for text in ("123", "12", own.signature[:-2])],
    }
    wrong["signature of s01"] += [dataclasses.replace(own, commitment="ab" * 32), key]
    for field, offer in ((field, offer) for field, found in wrong.items() for offer in found):
        with pytest.raises(RefusedError) as refused:
            check_offer(table.view, "s01", offer, ROSTER)
        assert (refused.value.field, refused.value.site or "s01") == (field, "s01")
        with pytest.raises(RefusedError, match=r"of s01: expected|not signed by 's01'"):
            table.sites["s00"].mask(np.zeros(3, np.uint32), {**offers, "s01": offer})
    check_offer(
        table.view, names[1], key, {}
    )  # without a roster, a signature of another cannot be told from a right one


# --- wrong shares ---


@dataclass
class Shares:
    """An attempt without envelopes: the shares of everybody's own mask, as all sites but liars reveal them."""

    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        names, self.rng = tuple(f"s{k:02}" for k in range(self.count)), random.Random(self.seed)
        self.view = View("fed", 1, "token", "plan", "reference", "tokens", 64, names, 3)
        self.secrets = {name: self.rng.randbytes(32) for name in names}
        numbers = [self.rng.randrange(PRIME) for _ in range(self.view.threshold - 1)]
        made = {name: split(secret, self.count, numbers) for name, secret in self.secrets.items()}
        self.revealed = {
            site: Revealed({name: shares[i] for name, shares in made.items()}, {}) for i, site in enumerate(names)
        }
        self.offers = {
            name: Offer("00" * 32, commitment_of(secret, self.view), "00") for name, secret in self.secrets.items()
        }

    def let_lie(self, site: str, about: Sequence[str]) -> None:
        """Let a site reveal wrong shares of the secrets of these."""
        lies = {name: self.rng.randrange(PRIME) for name in about}
        self.revealed[site] = Revealed({**self.revealed[site].self_masks, **lies}, {})

    def unmask(self) -> Unmasked:
        """The sum of nothing but own masks, so that zeros are left."""
        salt = participant_module.salt_of(self.view, self.offers)
        masks = [expand(participant_module.self_seed(secret, salt), 4) for secret in self.secrets.values()]
        total = np.sum(masks, axis=0, dtype=np.uint32)
        return unmask(total, self.view, self.offers, self.view.members, self.revealed)


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of shares of all decodings, which take the time."""
    found: list[int] = []

    def counted(shares: Mapping[int, int], threshold: int) -> list[int] | None:
        found.append(len(shares))
        return decode(shares, threshold)

    monkeypatch.setattr(opening, "decode", counted)
    return found


@pytest.mark.parametrize(
    ("count", "liars", "tries"),
    [
        *((n, 1, 1) for n in (6, 12, 15, 50)),
        *((n, (n - threshold(n, 3)) // 2, 1) for n in (12, 15, 50)),  # all that follows without a search
        (5, 1, 6),  # each share is left out once
        (12, 3, 67),  # each two of twelve
        (12, 4, 562),  # each four: the other shares just suffice
        (15, 3, 16),
    ],
)
def test_liars_are_named_and_searched_for_once_and_not_for_each_secret(
    count: int, liars: int, tries: int, decodings: list[int]
) -> None:
    attempt = Shares(count)
    named = list(attempt.view.members[:liars])  # the first ones, whose shares are combined first
    for site in named:
        attempt.let_lie(site, attempt.view.members)
    total, wrong = attempt.unmask()
    assert not total.any()
    assert wrong == {site: ["s00"] for site in named}
    assert len(decodings) <= tries


def test_liars_who_agree_on_a_polynomial_of_their_own_are_found(decodings: list[int]) -> None:
    attempt, other = Shares(50), Shares(50, seed=1)
    liars = attempt.view.members[:8]
    for site in liars:
        attempt.revealed[site] = other.revealed[site]
    total, wrong = attempt.unmask()
    assert not total.any()
    assert wrong == {site: ["s00"] for site in liars}
    assert len(decodings) == 1


def test_sites_that_dishonest_ones_gave_wrong_shares_do_not_count_as_lost() -> None:
    """Each of three sites made wrong shares for two others. All six are suspected, and the sum opens all the same."""
    attempt = Shares(12)  # threshold 8
    names = attempt.view.members
    for k, owner in enumerate(names[:3]):
        for site in names[2 * k : 2 * k + 2]:
            attempt.let_lie(site, [owner])
    total, wrong = attempt.unmask()
    assert not total.any()
    assert wrong == {names[2 * k + i]: [names[k]] for k in range(3) for i in range(2)}


def test_the_search_for_liars_ends_where_too_many_lie(decodings: list[int]) -> None:
    attempt = Shares(50)  # threshold 34, so that 17 liars leave too few shares
    for site in attempt.view.members[:17]:
        attempt.let_lie(site, attempt.view.members)
    with pytest.raises(RefusedError, match="'s00' stay on the sum: its secret does not follow from 50 shares"):
        attempt.unmask()
    assert len(decodings) <= 1 + opening.MAX_WORK / 50**2


# --- secrets --------------------------------------------------------------------------------------------------------


def test_any_enough_shares_give_the_secret_and_fewer_another_number() -> None:
    rng = random.Random(1)
    secret = bytes(rng.randrange(256) for _ in range(32))
    shares = dict(enumerate(split(secret, 6, [rng.randrange(PRIME) for _ in range(3)]), 1))
    for chosen in itertools.combinations(shares, 4):
        assert combine({point: shares[point] for point in chosen}) == secret
    for chosen in itertools.combinations(shares, 3):
        assert combine({point: shares[point] for point in chosen}) != secret
    assert split(secret, 2, [5])[0] == int.from_bytes(secret, "big") + 5  # by hand: s + 5x


def test_wrong_shares_are_corrected_up_to_half_of_the_spare_ones() -> None:
    rng = random.Random(2)
    for count, needed, wrong in ((9, 3, 3), (10, 4, 3), (7, 7, 0), (4, 1, 1)):
        polynomial = [rng.randrange(PRIME) for _ in range(needed)]
        shares = {x: value_at(polynomial, x) for x in range(1, count + 1)}
        for bad in range(wrong + 1):
            for chosen in itertools.combinations(shares, bad):
                found = {x: rng.randrange(PRIME) if x in chosen else share for x, share in shares.items()}
                assert decode(found, needed) == polynomial
        if wrong:
            assert decode({x: rng.randrange(PRIME) for x in shares}, needed) is None
    assert decode({1: 0, 2: 0, 3: 0}, 2) == []
    assert decode({2: 7, 5: 13}, 2) == [3, 2]  # by hand: 3 + 2x


def test_the_key_agreement_is_x25519_and_the_stream_chacha20() -> None:
    """RFC 7748, section 6.1, and RFC 8439, appendix A.1: the first test vectors."""
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    assert public_key(alice).hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert expand(bytes(32), 2).tobytes().hex() == "76b8e0ada0f13d90"


def test_the_roster_is_made_of_openssh_lines() -> None:
    lines = [new_site_key(name)[1] for name in ("north", "south")]
    assert list(parse_roster(b"".join(lines))) == ["north", "south"]
    for wrong in (lines[0] * 2, b" ".join(lines[0].split()[:2]), b"north", b"\xff", lines[0].replace(b"north", b"a b")):
        with pytest.raises(ValueError, match=r"."):
            parse_roster(wrong)


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [2, 3, 10, MAX_SITES])
def test_no_sum_overflows_and_the_mean_is_that_of_plain_numbers_to_the_step(sites: int) -> None:
    numbers, rng = FixedPoint(2.0, 500, sites), np.random.default_rng(sites)
    worst = np.sum([numbers.encode(np.array([2.0, -2.0]), 500).view(np.int32).astype(np.int64)] * sites, axis=0)
    assert np.abs(worst).max() <= LARGEST
    updates = [rng.uniform(-2, 2, 40) / 40**0.5 for _ in range(sites)]
    weights = [int(rng.integers(1, 501)) for _ in range(sites)]
    total = np.sum([numbers.encode(u, w) for u, w in zip(updates, weights, strict=True)], axis=0, dtype=np.uint32)
    mean = numbers.decode(total, sites)
    expected = np.average(updates, axis=0, weights=weights)
    rounding = numbers.step * numbers.levels * sites / mean.weight  # of half a step in each addend, and of the weights
    assert np.abs(mean.update - expected).max() <= rounding


def test_a_weight_above_the_largest_counts_as_the_largest() -> None:
    """A refusal would tell who chooses ``max_weight`` whether the weight is above it."""
    numbers = FixedPoint(1.0, 10, 3)
    assert numbers.encode(np.array([0.5]), 11).tolist() == numbers.encode(np.array([0.5]), 10).tolist()
    same = FixedPoint(1.0, 1, 3)
    assert same.encode(np.array([0.5]), 7).tolist() == same.encode(np.array([0.5]), 500).tolist()


def test_values_beyond_the_bound_and_weights_below_1_are_refused() -> None:
    numbers = FixedPoint(1.0, 10, 3)
    for update, weight in (([1.01], 10), ([np.nan], 10), ([np.inf], 10), ([0.0], 0), ([0.0], -1)):
        with pytest.raises(RefusedError):
            numbers.encode(np.array(update), weight)
    noise = np.append(expand(b"1" * 32, 1000), np.uint32(LARGEST // 2))
    for total, sites, message in (
        (np.zeros(3, np.uint32), 1, "weight of the sum"),
        (np.ones(3, np.uint32), 2, "weight of the sum"),
        (noise, 3, "norm of the sum"),  # what is left where a mask is wrong
    ):
        with pytest.raises(RefusedError, match=message):
            numbers.decode(total, sites)


def test_arrays_become_one_vector_and_arrays_again() -> None:
    arrays = {"b": np.arange(6.0).reshape(2, 3), "a": np.array(7.0)}
    values = flatten(arrays)
    assert values.tolist() == [7, 0, 1, 2, 3, 4, 5]
    back = unflatten(values, {key: value.shape for key, value in arrays.items()})
    assert all(np.array_equal(back[key], arrays[key]) for key in arrays)
    assert unflatten(flatten({}), {}) == {}
