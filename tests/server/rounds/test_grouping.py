"""Groups of sites: planted ones are found, a single one is not divided, and each group trains as if it were alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context

from colora.client.client_app import make_app
from colora.common.adapters.initialization import initial_shared_state
from colora.common.config.loader import recipe_from
from colora.common.config.schema import Recipe
from colora.common.errors import ConfigError, QuorumError, StateError
from colora.common.event_log import EventLog
from colora.common.models.saved import read_saved_model
from colora.common.protocol.types import PROTOCOL, SiteInfo, TrainReply, TrainRequest, hash_layout
from colora.common.seeds import seed_from
from colora.server.reporting.events import read_events
from colora.server.rounds.checkpoint import Checkpoints, ServerState
from colora.server.rounds.grouping import best_division, find_groups, update_cosines
from colora.server.rounds.run_options import RosterEntry, RunOptions, read_replay
from colora.server.rounds.strategy import AdapterStrategy
from colora.server.server_app import train_federation
from colora.simulation.local_grid import LocalGrid

NORTH, SOUTH = ("ada", "cyd", "eve", "gus"), ("bob", "dee", "fay", "hal")
NAMES = tuple(sorted(NORTH + SOUTH))
B = "proj.lora_B.weight"


def cosines(groups: Sequence[int], seed: int, common: float = 0.5, own: float = 0.6, size: int = 400) -> np.ndarray:
    """Cosines of updates: a direction of all sites, one of each group, and noise of a strength that differs by site."""
    rng = np.random.default_rng(seed)
    everyone, group = rng.normal(size=size), {g: rng.normal(size=size) for g in set(groups)}
    updates = [{B: common * everyone + own * group[g] + rng.uniform(1.0, 3.0) * rng.normal(size=size)} for g in groups]
    return update_cosines(updates, {B: np.zeros(size)})


def names(count: int) -> list[str]:
    return [f"site-{i}" for i in range(count)]


def test_two_planted_groups_are_found_at_every_seed() -> None:
    planted = [i % 2 for i in range(8)]
    expected = tuple(tuple(f"site-{i}" for i in range(first, 8, 2)) for first in (0, 1))
    for seed in range(20):
        found = find_groups(names(8), cosines(planted, seed, own=1.2), seed)
        assert found.groups == expected
        assert [d.p_value <= 0.005 for d in found.divisions] == [True]


def test_three_groups_are_found_by_dividing_twice() -> None:
    planted = [0] * 8 + [1] * 7 + [2] * 6
    found = find_groups(names(21), cosines(planted, 1, own=1.5), 1)
    assert [len(group) for group in found.groups] == [8, 7, 6]
    assert found.groups[2] == tuple(f"site-{i}" for i in range(15, 21))


@pytest.mark.slow
def test_sites_with_one_direction_and_unlike_noise_are_not_divided() -> None:
    """At a significance of .005, forty pools of one group are divided at most twice (probability of more: .0001)."""
    divided = [len(find_groups(names(8), cosines([0] * 8, seed), seed).groups) > 1 for seed in range(40)]
    assert sum(divided) <= 2


def test_a_few_sites_are_never_divided() -> None:
    found = find_groups(names(5), cosines([0, 0, 1, 1, 1], 0, own=3.0), 0)
    assert found.groups == (tuple(names(5)),)
    assert found.divisions == ()


def test_the_order_of_the_sites_does_not_matter() -> None:
    matrix, order = cosines([0, 0, 0, 1, 1, 1, 1], 3, own=1.5), [4, 1, 6, 0, 5, 3, 2]
    found = find_groups(names(7), matrix, 0)
    shuffled = find_groups([names(7)[i] for i in order], matrix[np.ix_(order, order)], 0)
    assert {frozenset(group) for group in found.groups} == {frozenset(group) for group in shuffled.groups}


def test_a_site_that_did_not_move_has_cosine_zero_and_breaks_nothing() -> None:
    updates = [{B: np.zeros(4)}, {B: np.ones(4)}, {B: -np.ones(4)}]
    found = update_cosines(updates, {B: np.zeros(4)})
    np.testing.assert_allclose(found, [[0, 0, 0], [0, 1, -1], [0, -1, 1]], atol=1e-12)


def test_the_strength_of_a_site_does_not_count() -> None:
    """An additive pattern, such as one noisy site among clear ones, is no division."""
    effects = np.array([0.1, 0.2, 0.3, 0.05, 0.25, 0.15])
    matrix = effects[:, None] + effects[None, :]
    np.fill_diagonal(matrix, 1.0)
    _, p_value = best_division(matrix, np.random.default_rng(0))
    assert p_value > 0.5


# --- through the strategy ---


@dataclasses.dataclass
class Pretender:
    """A site whose update has the direction of its half of the country, and noise seeded by its name and the round."""

    name: str
    layout: str
    crash_in: int = 0
    asked: list[TrainRequest] = dataclasses.field(default_factory=list)

    def site_info(self, federation: str, plan: str) -> SiteInfo:
        return SiteInfo(self.name, PROTOCOL, "model", "tokenizer", "template", self.layout, "regression", 20, 5, 0, 0)

    def handle(self, order: TrainRequest) -> TrainReply:
        self.asked.append(order)
        if self.crash_in and order.round == self.crash_in:
            raise RuntimeError("power cut")
        shared = {} if order.kind == "finalize" else self.trained(order)
        terms = 1 + NAMES.index(self.name)
        return TrainReply(self.name, order.federation, order.round, order.key, shared, terms, 5, {"personal.loss": 1})

    def trained(self, order: TrainRequest) -> dict[str, np.ndarray]:
        half = np.random.default_rng(self.name in NORTH)
        noise = np.random.default_rng(seed_from(self.name, order.round))
        return {
            key: array + (half.normal(size=array.shape) + noise.normal(0, 0.5, array.shape)).astype(np.float32)
            for key, array in sorted(order.shared.items())
        }


def recipe(sites: Sequence[str] = NAMES, **server: Any) -> Recipe:
    model, adapter = {"source": "synthetic:bilinear-20"}, {"rank": 2, "target_modules": ["proj"]}
    raw = {"name": "fed", "rounds": 4, "seed": 1, "model": model, "adapter": adapter, "data": {"task": "regression"}}
    listed = [{"name": name, "source": "none.npz"} for name in sites]
    return recipe_from({**raw, "site": listed, "server": {"groups": "similarity", "quorum": 2, **server}})


def run(
    settings: Recipe, folder: Path, options: RunOptions | None = None, crash_in: int = 0
) -> tuple[ServerState, list[Pretender]]:
    layout = hash_layout({key: value.shape for key, value in initial_shared_state(settings.plan).items()})
    nodes = [Pretender(site.name, layout, crash_in) for site in settings.site]
    roster = tuple(RosterEntry(site.name) for site in settings.site)
    strategy = AdapterStrategy(settings, roster, EventLog(folder / "events.jsonl"), folder / "spool", options)

    def connect(context: Context) -> Pretender:
        return nodes[int(context.node_config["partition-id"])]

    checkpoints = Checkpoints(folder / "checkpoints", settings)
    return train_federation(LocalGrid(make_app(connect), len(nodes)), strategy, checkpoints), nodes


def same(one: ServerState, other: ServerState) -> bool:
    return len(one.adapters) == len(other.adapters) and all(
        {k: v.tobytes() for k, v in getattr(a, part).items()} == {k: v.tobytes() for k, v in getattr(b, part).items()}
        for a, b in zip(one.adapters, other.adapters, strict=True)
        for part in ("shared", "optimizer_state", "aggregator_state")
    )


@pytest.mark.parametrize("server", [{}, {"optimizer": "adam"}, {"aggregator": "median"}], ids=str)
def test_a_group_ends_with_the_bits_of_a_federation_of_its_own(tmp_path: Path, server: dict[str, Any]) -> None:
    state, _ = run(recipe(**server), tmp_path / "all")
    assert [set(state.by_group(NAMES)[g]) for g in (0, 1)] == [set(NORTH), set(SOUTH)]
    for index, members in enumerate((NORTH, SOUTH)):
        alone, _ = run(recipe(members, **{"groups": "none", **server}), tmp_path / str(index))
        assert same(dataclasses.replace(state, adapters=(state.adapters[index],)), alone)


def test_sites_are_asked_once_before_round_1_and_then_receive_the_adapter_of_their_group(tmp_path: Path) -> None:
    state, nodes = run(recipe(), tmp_path)
    for node in nodes:
        kinds = [(order.round, order.kind) for order in node.asked]
        assert kinds == [(0, "trial"), *((t, "train") for t in range(1, 5)), (5, "finalize")]
        final = state.adapters[state.group[node.name]].shared
        assert all(np.array_equal(node.asked[-1].shared[key], final[key]) for key in final)
    (event,) = [e for e in read_events(tmp_path / "events.jsonl") if e["event"] == "grouped"]
    assert event["groups"] == [list(NORTH), list(SOUTH)]
    assert event["cosines"]["ada"]["cyd"] > event["cosines"]["ada"]["bob"]


@pytest.mark.parametrize("crash_in", [1, 3, 5])
def test_a_resumed_run_keeps_its_groups_and_every_bit(tmp_path: Path, crash_in: int) -> None:
    settings = recipe(optimizer="momentum")
    expected, _ = run(settings, tmp_path / "calm")
    with pytest.raises(QuorumError):
        run(settings, tmp_path / "killed", crash_in=crash_in)
    state, nodes = run(settings, tmp_path / "killed")
    assert all(order.kind != "trial" for node in nodes for order in node.asked)
    assert same(state, expected)
    assert state.group == expected.group


def test_a_replay_takes_the_groups_of_its_run(tmp_path: Path) -> None:
    settings = recipe(fraction=0.6)
    expected, _ = run(settings, tmp_path / "first")
    replay = RunOptions(replay=read_replay(tmp_path / "first" / "events.jsonl"))
    state, nodes = run(settings, tmp_path / "again", replay)
    assert same(state, expected)
    assert all(order.kind != "trial" for node in nodes for order in node.asked)


def test_a_checkpoint_gives_the_adapter_of_each_group(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state, _ = run(recipe(), tmp_path)
    for group in (1, 2):
        saved = read_saved_model(tmp_path, group)
        assert np.array_equal(saved.shared[B], state.adapters[group - 1].shared[B])
        assert saved.groups == 2
    assert caplog.text == ""
    assert np.array_equal(read_saved_model(tmp_path).shared[B], state.adapters[0].shared[B])
    assert "has 2 groups of sites (1: ada, cyd, eve, gus; 2: bob, dee, fay, hal). Using group 1" in caplog.text
    with pytest.raises(StateError, match="has no group 3"):
        read_saved_model(tmp_path, 3)


def test_updates_that_begin_with_cores_of_zero_cannot_be_grouped() -> None:
    """A method that shares nothing ignores the groups, so that one recipe serves for its local-only baseline."""
    raw = {"name": "fed", "rounds": 2, "model": {"source": "synthetic:bilinear-6"}, "server": {"groups": "similarity"}}
    sites = [{"name": name, "source": "none.npz"} for name in NAMES]
    with pytest.raises(ConfigError, match="cores of zero"):
        recipe_from({**raw, "site": sites, "adapter": {"init": "spectral"}})
    assert recipe_from({**raw, "site": sites, "method": {"name": "local"}}).server.groups == "similarity"
