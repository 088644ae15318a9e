"""Differential privacy for each site: sensitivity, noise, budget, and what a repeated round spends and reveals."""

from __future__ import annotations

import dataclasses
import io
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from opacus.accountants import RDPAccountant
from rich.console import Console

from colora.common.config.loader import recipe_from
from colora.common.config.schema import Recipe, to_dict
from colora.common.errors import ConfigError, StateError
from colora.common.event_log import EventLog
from colora.common.protocol.types import TrainReply, TrainRequest
from colora.server.reporting.conclusions import privacy
from colora.server.reporting.report import print_report
from colora.server.reporting.run_folder import RunFolder
from colora.server.reporting.summary import summarize
from colora.server.rounds.aggregation import WeightedUpdate
from colora.server.rounds.checkpoint import Checkpoints, ServerState
from colora.server.rounds.run_options import RosterEntry
from colora.server.rounds.site_privacy import SECRET, PrivateMean, Spent, clipped_sum
from colora.server.rounds.strategy import sample
from colora.simulation.run import local_only
from tests.server.rounds.test_clipping import scaled
from tests.server.rounds.test_strategy import NAMES, Hall, Pretender, crash_in, recipe, same, trained

PRIVATE = {"noise_multiplier": 1.5, "clip_norm": 0.2}
Arrays = dict[str, np.ndarray]


@pytest.fixture
def hall(tmp_path: Path) -> Hall:
    return Hall(tmp_path / "hall")


def private(rounds: int = 4, *, server: Mapping[str, Any] | None = None, **privacy: Any) -> Recipe:
    return recipe(rounds, privacy={**PRIVATE, **privacy}, **(server or {}))


def arrays(rng: np.random.Generator, scale: float = 1.0) -> Arrays:
    return {"A": (scale * rng.normal(size=(3, 50))).astype("f4"), "B": (scale * rng.normal(size=(40, 3))).astype("f4")}


def norm(values: Mapping[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(value.astype(np.float64))) for value in values.values())))


def difference(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> Arrays:
    return {key: one[key].astype(np.float64) - other[key] for key in one}


def mean_of(updates: list[Arrays], start: Arrays, noise: float = 1e-12, sites: int | None = None) -> Arrays:
    mean = PrivateMean(sites or len(updates), 0.7, noise, ("secret", "fed", 1))
    return mean([WeightedUpdate(1.0, update) for update in updates], start)


def epsilon_by_steps(noise: float, rounds: int, delta: float) -> float:
    """ε of the accountant of Opacus, which is told of one round after the other, without sampling."""
    accountant = RDPAccountant()
    for _ in range(rounds):
        accountant.step(noise_multiplier=noise, sample_rate=1.0)
    return accountant.get_epsilon(delta=delta)


# --- the mean of a round


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("sites", [1, 5, 9])
def test_another_update_of_one_site_moves_the_noiseless_mean_by_at_most_the_accounted_bound(
    size: float, sites: int
) -> None:
    """The bound is 2C/m. Opposite updates beyond C reach it."""
    rng = np.random.default_rng(0)
    start = {key: value.astype(np.float64) for key, value in arrays(rng).items()}
    given = [{key: start[key] + value for key, value in arrays(rng, 0.1).items()} for _ in range(sites)]
    bound = 2 * 0.7 / sites
    move = arrays(rng, size)
    for other in (move, {key: -value for key, value in move.items()}, {key: 0 * value for key, value in move.items()}):
        for k in range(sites):
            changed = [*given]
            changed[k] = {key: start[key] + value for key, value in other.items()}
            moved = norm(difference(*(clipped_sum(_updates(each), start, 0.7) for each in (given, changed)))) / sites
            assert moved <= bound * (1 + 1e-12)
    ends = [[{key: start[key] + sign * value for key, value in move.items()}, *given[1:]] for sign in (1, -1)]
    moved = norm(difference(*(clipped_sum(_updates(each), start, 0.7) for each in ends))) / sites
    assert moved == pytest.approx(bound if size >= 1 else 2 * norm(move) / sites, rel=1e-9)


def _updates(given: list[Arrays]) -> list[WeightedUpdate]:
    return [WeightedUpdate(7.0 * k + 1, update) for k, update in enumerate(given)]  # weights have no effect


def test_a_missing_update_counts_as_one_without_a_change() -> None:
    rng = np.random.default_rng(1)
    start = arrays(rng)
    given = [{key: start[key] + value for key, value in arrays(rng, 0.01).items()} for _ in range(3)]
    for key, value in mean_of(given, start, sites=4).items():
        expected = start[key] + sum(update[key].astype(np.float64) - start[key] for update in given) / 4
        np.testing.assert_allclose(value, expected, atol=1e-6)
        assert value.dtype == np.float32


def test_the_noise_has_the_standard_deviation_that_is_accounted() -> None:
    """Of 2C/m, times the noise multiplier, on every number, and independent of its place."""
    start = {"A": np.zeros((200, 300), "f4"), "B": np.zeros((300, 200), "f4")}
    zero = [dict(start)] * 6
    mean = PrivateMean(6, 0.7, 1.3, ("secret", "fed", 1))
    noised = mean(_updates(zero), start)
    assert mean.noise == pytest.approx(1.3 * 2 * 0.7 / 6)
    for value in noised.values():
        deviation = mean.noise / np.sqrt(2 * value.size)
        assert np.std(value) == pytest.approx(mean.noise, abs=4 * deviation)
        assert abs(np.mean(value)) < 4 * mean.noise / np.sqrt(value.size)
    assert abs(np.corrcoef(noised["A"].ravel(), noised["B"].ravel())[0, 1]) < 4 / np.sqrt(60_000)


def test_the_same_replies_get_the_same_noise_and_others_get_independent_noise() -> None:
    """With one noise for two means, the difference of the results would be that of the means."""
    rng = np.random.default_rng(2)
    start = {"A": np.zeros((100, 100), "f4")}
    given = [{"A": (1e-6 * rng.normal(size=(100, 100))).astype("f4")} for _ in range(3)]
    noise = {name: mean_of(updates, start, 1.0, sites=3) for name, updates in (("all", given), ("two", given[:2]))}
    assert same(noise["all"], mean_of(given, start, 1.0, sites=3))
    assert abs(np.corrcoef(noise["all"]["A"].ravel(), noise["two"]["A"].ravel())[0, 1]) < 0.04
    for key in (("other", "fed", 1), ("secret", "fed", 2), ("secret", "village", 1)):
        other = PrivateMean(3, 0.7, 1.0, key)(_updates(given), start)
        assert abs(np.corrcoef(noise["all"]["A"].ravel(), other["A"].ravel())[0, 1]) < 0.04


# --- a run


def test_a_round_is_the_private_mean_of_what_the_sites_sent(hall: Hall) -> None:
    sites = hall.sites(private(1))
    state = hall.run(private(1), sites)
    start, (event,) = dict(sites[0].asked[0].shared), hall.events("noised")
    updates = [_reply(site, sites) for site in NAMES]
    secret = (hall.folder / SECRET).read_text().split("\n")[0]
    expected = PrivateMean(4, 0.2, 1.5, (secret, "fed", 1))([WeightedUpdate(1.0, each) for each in updates], start)
    assert same(state.shared, expected)
    norms = {site: norm(difference(update, start)) for site, update in zip(NAMES, updates, strict=True)}
    assert event["clipped"] == pytest.approx(norms), "every update is longer than the bound of 0.2"
    assert (event["sites"], event["bound"], event["noise"]) == (4, 0.2, 1.5 * 2 * 0.2 / 4)
    assert hall.events("agreed")[0]["weights"] == "uniform"
    assert hall.events("round")[0]["residual"] is None


def _reply(name: str, sites: list[Pretender]) -> Arrays:
    return trained(name, next(site for site in sites if site.name == name).asked[0])


def test_the_norms_of_the_other_sites_do_not_decide_how_an_update_is_clipped(hall: Hall) -> None:
    """A bound from their median would let one site's data change what another's update counts."""
    settings = private(1, clip_norm=10.0, noise_multiplier=1e-6)
    state = hall.run(settings, sites := hall.sites(settings, {"ada": scaled(100.0)}))
    assert hall.events("clipped") == []
    assert list(hall.events("noised")[0]["clipped"]) == ["ada"]
    start = dict(sites[0].asked[0].shared)
    updates = {name: difference(_reply(name, sites), start) for name in NAMES}
    shares = {name: 10.0 / norm(updates[name]) if name == "ada" else 1.0 for name in NAMES}
    for key in start:
        expected = start[key] + sum(shares[name] * updates[name][key] for name in NAMES) / 4
        np.testing.assert_allclose(state.shared[key], expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Optimal order")
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_epsilon_is_that_of_opacus_for_the_rounds_of_the_site_that_was_sampled_most(
    hall: Hall, fraction: float
) -> None:
    settings = private(6, server={"fraction": fraction, "quorum": 1}, delta=1e-3)
    state = hall.run(settings)
    asked = [event["sites"] for event in hall.events("round_started")]
    for t, event in enumerate(hall.events("noised"), 1):
        most = max(sum(name in sites for sites in asked[:t]) for name in NAMES)
        assert event["epsilon"] == pytest.approx(epsilon_by_steps(1.5, most, 1e-3))
    assert state.spent is not None
    assert state.spent.rounds == {name: sum(name in sites for sites in asked) for name in NAMES}


@pytest.mark.filterwarnings("ignore:Optimal order")
def test_a_budget_is_spent_nearly_in_full_over_all_rounds(hall: Hall) -> None:
    settings = recipe(5, privacy={"epsilon": 4.0})
    state = hall.run(settings)
    assert state.spent is not None
    assert 3.9 < epsilon_by_steps(state.spent.noise_multiplier, 5, 1e-5) <= 4.0
    assert hall.events("noised")[-1]["epsilon"] == pytest.approx(state.spent.epsilon(1e-5))
    assert (state.round, hall.events("budget_spent")) == (5, [])


@pytest.mark.filterwarnings("ignore:Optimal order")
def test_the_run_ends_before_a_round_that_would_exceed_the_budget(hall: Hall) -> None:
    limit = epsilon_by_steps(1.5, 3, 1e-5) + 0.01
    assert limit < epsilon_by_steps(1.5, 4, 1e-5)
    settings = private(8, epsilon=limit)
    named = {"federation": "fed", "method": "colora", "model": "m", "rounds": 8, "sites": list(NAMES)}
    EventLog(hall.folder / "events.jsonl").emit("started", **named)
    state = hall.run(settings)
    assert (state.round, state.finalized) == (3, True)
    assert [event["round"] for event in hall.events("budget_spent")] == [3]
    again = hall.run(settings)
    assert same(again.shared, state.shared)
    assert len(hall.events("noised")) == 3, "a finished run that is started again spends nothing"
    summary = summarize(_events(hall))
    first, second = privacy(summary)
    assert first.startswith(
        f"Differential privacy for each site: the shared adapters have spent ε = {limit - 0.01:.3g}"
    )
    assert "In the last round 4 of 4 updates were clipped to a norm of 0.2" in first
    assert second == (
        "The run ended after round 3 of 8: another round would exceed the privacy budget "
        f"of {limit:g} (server.privacy.epsilon)."
    )
    also = summarize([*_events(hall), {"event": "started", "time": 1.0, "baseline": True, **named}])
    assert privacy(also) == [first, f"{second} Local-only training took all rounds."]
    page = Console(record=True, width=300, file=io.StringIO())
    print_report(summary, hall.folder, page)
    assert second in page.export_text()
    assert "another round would exceed the privacy budget" in (hall.folder / "report.html").read_text()


def _events(hall: Hall) -> list[dict]:
    return [json.loads(line) for line in (hall.folder / "events.jsonl").read_text().splitlines()]


def test_a_site_that_sends_nothing_is_sampled_all_the_same(hall: Hall) -> None:
    settings = private(1, noise_multiplier=1e-6)
    state = hall.run(settings, sites := hall.sites(settings, {"bob": crash_in(1)}))
    start = dict(sites[0].asked[0].shared)
    updates = [WeightedUpdate(1.0, _reply(name, sites)) for name in NAMES if name != "bob"]
    for key, total in clipped_sum(updates, start, 0.2).items():
        np.testing.assert_allclose(state.shared[key], start[key] + total / 4, atol=1e-6)
    assert state.spent is not None
    assert state.spent.rounds == dict.fromkeys(NAMES, 1)


# --- again


def _without(hall: Hall, settings: Recipe, rounds: int) -> None:
    """Delete the checkpoints after a round, as if the coordinator had been killed before it wrote them."""
    for path in (hall.folder / "checkpoints").iterdir():
        if int(path.stem[6:]) > rounds:
            path.unlink()


def test_a_round_that_runs_again_after_a_kill_has_the_same_bits_and_spends_nothing(hall: Hall) -> None:
    settings = private(4)
    whole = hall.run(settings)
    _without(hall, settings, 2)
    again = hall.run(settings)
    assert same(again.shared, whole.shared)
    assert again.spent == whole.spent == Spent(1.5, dict.fromkeys(NAMES, 4))


def test_a_kill_in_the_middle_of_a_round_changes_no_bit(hall: Hall, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def dies(site: Pretender, order: TrainRequest, reply: TrainReply) -> TrainReply:
        if order.round == 3 and not killed:
            killed.append(site.name)
            raise Killed
        return reply

    killed: list[str] = []
    settings = private(4)
    whole = hall.run(settings)
    other = Hall(tmp_path / "other")
    other.folder.mkdir()
    (other.folder / SECRET).write_bytes((hall.folder / SECRET).read_bytes())
    with pytest.raises(Killed):
        other.run(settings, other.sites(settings, {"cyd": dies}))
    assert other.latest(settings).round == 2
    again = other.run(settings)
    assert killed == ["cyd"]
    assert same(again.shared, whole.shared)
    assert again.spent == whole.spent


def test_a_lost_checkpoint_of_a_released_round_is_paid_for(hall: Hall) -> None:
    """The adapter of round 3 was sent. Round 3 runs again without bob: another release, with independent noise."""
    settings = private(3)
    whole = hall.run(settings)
    path = hall.folder / "checkpoints" / "round-000003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    again = hall.run(settings, hall.sites(settings, {"bob": crash_in(3)}))
    assert not same(again.shared, whole.shared)
    assert again.spent == Spent(1.5, dict.fromkeys(NAMES, 4))
    assert hall.latest(settings).spent == again.spent


def test_the_secret_is_new_for_every_run_and_stays_at_the_coordinator(
    hall: Hall, tmp_path: Path, wire: list[Message]
) -> None:
    state = hall.run(private(2))
    path = hall.folder / SECRET
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secret = path.read_text().split("\n")[0]
    assert len(bytes.fromhex(secret)) == 32
    sent = b"".join(repr(message.content).encode() for message in wire)
    assert b"fed" in sent
    files = [each for each in hall.folder.rglob("*") if each.is_file() and each != path]
    written = b"".join(each.read_bytes() for each in files) + sent
    assert secret.encode() not in written
    assert bytes.fromhex(secret) not in written
    other = Hall(tmp_path / "other")
    assert not same(other.run(private(2)).shared, state.shared), "the noise is not that of the recipe's seed"
    assert (other.folder / SECRET).read_text() != path.read_text()


def test_a_damaged_secret_ends_the_run(hall: Hall) -> None:
    hall.run(private(2))
    text = (hall.folder / SECRET).read_text()
    (hall.folder / SECRET).write_text(("1" if text[0] == "0" else "0") + text[1:])
    _without(hall, private(2), 1)
    with pytest.raises(StateError, match=r"noise\.secret does not hold the secret of the coordinator"):
        hall.run(private(2))


# --- recipes


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("server.aggregator", name) for name in ("median", "trimmed_mean", "krum", "product")),
        *(("server.weights", name) for name in ("tokens", "examples", "benefit")),
        ("server.groups", "similarity"),
        ("server.keep", "best"),
        ("server.patience", 3),
        ("adapter.init", "spectral"),
    ],
)
def test_what_has_no_known_sensitivity_is_refused_by_name(key: str, value: Any) -> None:
    table, _, name = key.partition(".")
    raw = to_dict(recipe())
    raw[table] = {**raw.get(table, {}), name: value}
    recipe_from(raw)  # without [server.privacy]
    raw["server"]["privacy"] = PRIVATE
    with pytest.raises(ConfigError) as refused:
        recipe_from(raw)
    assert refused.value.field == key
    assert f"{key} is {value}, which is not possible with [server.privacy]" in str(refused.value)


def test_a_table_without_a_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[server\.privacy\] sets neither epsilon nor noise_multiplier"):
        recipe(privacy={"clip_norm": 2.0})


def test_budgets_that_protect_nothing_or_end_at_once_are_refused_before_the_sites_are_asked(hall: Hall) -> None:
    for settings, text in (
        (private(delta=0.25), r"delta is 0\.25, which is no protection for 4 sites"),
        (private(epsilon=0.5), r"One round alone would spend ε = 2\.98, above server\.privacy\.epsilon = 0\.5"),
        (recipe(privacy={"epsilon": 1e-9}), r"server\.privacy\.epsilon = 1e-09 is too small"),
    ):
        with pytest.raises(ConfigError, match=text):
            hall.run(settings)
    assert hall.events("joined") == []


def test_the_baseline_shares_nothing_and_spends_nothing(hall: Hall) -> None:
    state = hall.run(dataclasses.replace(local_only(private(2)), name="fed"))
    assert (state.spent, hall.events("noised")) == (None, [])


def test_a_run_with_a_budget_gets_no_more_rounds(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_recipe(recipe(2, privacy={"epsilon": 4.0}))
    with pytest.raises(ConfigError, match=r"The privacy budget of the run in .* is for 2 rounds"):
        folder.resume(recipe(3, privacy={"epsilon": 4.0}))
    folder.write_recipe(private(2))
    folder.resume(private(3))


def test_the_noise_of_a_run_stays_when_its_roster_grows(hall: Hall) -> None:
    """The budget was for two rounds of each site; a roster with late joiners has other samples."""
    settings = recipe(4, fraction=0.5, quorum=1, privacy={"epsilon": 4.0})
    first = hall.run(settings, roster=[RosterEntry(name) for name in NAMES[:3]])
    _without(hall, settings, 2)
    again = hall.run(settings, roster=[*(RosterEntry(name) for name in NAMES[:3]), RosterEntry("dee", 3)])
    assert first.spent is not None
    assert again.spent is not None
    assert again.spent.noise_multiplier == first.spent.noise_multiplier
    assert again.spent.epsilon(1e-5) <= 4.0


def test_a_state_without_a_budget_reads_as_one(hall: Hall, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, recipe())
    checkpoints.write(ServerState(1, hall.run(recipe(1)).adapters))
    found = checkpoints.latest()
    assert found is not None
    assert found.spent is None
    assert sample(list(NAMES), 1.0, 0) == list(NAMES)
