"""The shared adapter as differences in few bits: every site ends up with the bits that it would receive whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from colora.common.adapters.initialization import initial_shared_state
from colora.common.atomic_io import load_arrays
from colora.common.config.loader import recipe_from
from colora.common.event_log import Event
from colora.common.models.saved import SHARED, below
from colora.common.protocol import flower_messages as messages
from colora.common.protocol.broadcast import DIGEST_BYTES
from colora.common.protocol.codec import decode
from colora.common.protocol.types import hash_arrays
from colora.server.rounds.run_options import read_replay
from colora.simulation.run import RunFolder, simulate

SPECTRAL = {"adapter": {"init": "spectral"}, "server": {"quorum": 3}}
ROBUST = {"server": {"aggregator": "median", "optimizer": "adam"}, "private": "lora"}
PRODUCT = {"server": {"aggregator": "product", "quorum": 3}}
GROUPS = {"server": {"groups": "similarity", "weights": "benefit", "quorum": 3}}
SAMPLED = {"server": {"fraction": 0.67, "quorum": 1}, "rounds": 6}
BEST = {
    "server": {"keep": "best", "patience": 2, "quorum": 3},
    "data": {"validation_fraction": 0.34},
    "train": {"lr": 0.05},
}
BATCHED = {"simulation": {"engine": "batched", "threads": 1}}
PRIVATE = {"privacy": {"epsilon": 8.0}}
ONE_WAY = {"communication": {"broadcast_bits": 2}}


def settings(tiny: dict, options: dict[str, Any]) -> dict:
    """The recipe with 4 bits both ways, four rounds, and these options."""
    raw = {**tiny, "rounds": 4, "communication": {"update_bits": 4, "broadcast_bits": 4}}
    for key, value in options.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) and key != "communication" else value
    return raw


def run(raw: dict, folder: Path, listener: Callable[[Event], None] = lambda event: None, **more: Any) -> RunFolder:
    return simulate(recipe_from(raw), folder, resume=False, listener=listener, **more)


def files(folder: Path) -> dict[str, tuple[dict[str, np.ndarray], dict]]:
    """The last checkpoint and every site's last state, without durations."""
    found = {}
    for place in (folder / "checkpoints", *sorted(folder.glob("sites/*/state"))):
        arrays, meta = load_arrays(sorted(place.glob("round-*"))[-1])
        for name in ("seconds", "measuring", "fresh"):
            meta.get("reply", {}).pop(name, None)
        found[str(place.relative_to(folder))] = arrays, meta
    return found


def assert_same_files(one: Path, other: Path) -> None:
    a, b = files(one), files(other)
    assert a.keys() == b.keys()
    for place, (arrays, meta) in a.items():
        assert meta == b[place][1], place
        assert arrays.keys() == b[place][0].keys()
        assert all(np.array_equal(arrays[key], b[place][0][key]) for key in arrays), place


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Send every request of the runs from now on with the whole adapter."""

    def start() -> None:
        monkeypatch.setattr("colora.server.rounds.strategy.holds_reference", lambda difference, request: False)

    return start


def replies(folder: RunFolder) -> list[Event]:
    return [event for event in folder.events() if event["event"] == "reply"]


@pytest.mark.parametrize(
    "options",
    [{}, SPECTRAL, ROBUST, PRODUCT, GROUPS, SAMPLED, BEST, BATCHED, PRIVATE, ONE_WAY],
    ids=["mean", "spectral", "median", "product", "groups", "sampled", "best", "batched", "private", "one way"],
)
def test_differences_and_whole_adapters_give_the_same_bits(
    tiny_recipe: dict, tmp_path: Path, whole: Callable[[], None], options: dict
) -> None:
    raw = settings(tiny_recipe, options)
    by_difference = run(raw, tmp_path / "difference")
    whole()
    always_whole = run(raw, tmp_path / "whole")
    assert_same_files(by_difference.path, always_whole.path)
    assert not all(event["whole"] for event in replies(by_difference))
    assert all(event["whole"] for event in replies(always_whole))


def test_the_sites_of_the_round_before_receive_differences_and_the_others_the_whole(
    tiny_recipe: dict, tmp_path: Path
) -> None:
    folder = run(settings(tiny_recipe, SAMPLED), tmp_path / "run")
    admitted = {event["round"]: event["admitted"] for event in folder.events() if event["event"] == "round"}
    seen: set[str] = set()
    for event in replies(folder):
        t, site = event["round"], event["site"]
        new = t == 1 or site in admitted.get(t - 1, ())
        assert event["whole"] is not new, event
        seen.add(f"{event['whole']}")
    assert seen == {"True", "False"}


def test_a_site_applies_the_differences_to_the_start_that_it_makes_itself(
    tiny_recipe: dict, tmp_path: Path, wire: list[Message]
) -> None:
    """Decoded by hand from what was sent to one site: S_0 plus the sum of the differences is the last checkpoint."""
    raw = settings(tiny_recipe, {})
    folder = run(raw, tmp_path / "run")
    asked = [m for m in wire if m.metadata.message_type == messages.TRAIN and not m.metadata.reply_to_message_id]
    to_ada = [m for m in asked if m.metadata.dst_node_id == 1]
    adapter = initial_shared_state(recipe_from(raw).plan)
    whole = sum(array.nbytes for array in adapter.values())
    for t, message in enumerate(to_ada, 1):
        entry = message.content.array_records[messages.ARRAYS][messages.ALL]
        digest, codes = entry.data[:DIGEST_BYTES], entry.data[DIGEST_BYTES:]
        assert entry.stype == "difference4"
        assert len(codes) < whole / 7 if t > 1 else codes == b""
        adapter = dict(decode("int4", codes, adapter)) if codes else adapter
        assert hash_arrays(adapter) == digest.hex()
    assert len(to_ada) == 5
    arrays, _ = load_arrays(sorted((folder.path / "checkpoints").glob("round-*"))[-1])
    shared = below(arrays, SHARED)
    assert all(np.array_equal(shared[key], adapter[key]) for key in shared)


@pytest.mark.parametrize("damage", ["lost", "cut", "of another run"])
def test_a_site_that_lost_its_state_receives_the_whole_adapter_in_the_same_round(
    tiny_recipe: dict, tmp_path: Path, damage: str, wire: list[Message]
) -> None:
    """Only bob asks, and no attempt is counted: ``max_attempts`` is 1, and the quorum is all three."""
    raw = settings(tiny_recipe, {"server": {"quorum": 3, "max_attempts": 1}})
    other = run(settings(tiny_recipe, {"seed": 5}), tmp_path / "other")
    place = tmp_path / "run" / "sites" / "bob" / "state"

    def after_round_2(event: Event) -> None:
        if event["event"] == "round" and event["round"] == 2:
            path = place / "round-000002.safetensors"
            if damage == "lost":
                shutil.rmtree(place)
            elif damage == "cut":
                path.write_bytes(path.read_bytes()[:-9])
            else:
                shutil.copy(other.path / "sites" / "bob" / "state" / path.name, path)

    wire.clear()
    folder = run(raw, tmp_path / "run", after_round_2)
    found = {(event["site"], event["round"]): event for event in replies(folder)}
    assert [key for key, event in found.items() if event["whole"]] == [("bob", 3)]
    assert not [event for event in folder.events() if event["event"] in ("failed", "refused")]
    errors = [m.error for m in wire if m.has_error()]
    assert [(e.code, e.reason) for e in errors] == [(messages.REFERENCE_MISSING, "ReferenceMissingError: arrays")]
    sent = [m for m in wire if m.has_content() and m.metadata.group_id == "3" and m.metadata.dst_node_id == 2]
    assert found["bob", 3]["bytes_down"] == sum(map(messages.payload_bytes, sent))
    assert len(sent) == 2
    assert found["bob", 3]["bytes_down"] > found["ada", 3]["bytes_down"] * 2
    last = load_arrays(sorted(place.glob("round-*"))[-1])[0]
    checkpoint = load_arrays(sorted((folder.path / "checkpoints").glob("round-*"))[-1])[0]
    assert all(np.array_equal(value, below(last, SHARED)[key]) for key, value in below(checkpoint, SHARED).items())


def test_the_log_of_admitted_sites_replays_to_the_same_bits(tiny_recipe: dict, tmp_path: Path) -> None:
    raw = settings(tiny_recipe, SAMPLED)
    first = run(raw, tmp_path / "first")
    again = run(raw, tmp_path / "again", replay=read_replay(first.path / "events.jsonl"))
    assert_same_files(first.path, again.path)


def test_bytes_in_the_events_are_those_of_the_messages(tiny_recipe: dict, tmp_path: Path, wire: list[Message]) -> None:
    folder = run(settings(tiny_recipe, {}), tmp_path / "run")
    down, up = 0, 0
    for message in wire:
        if message.metadata.message_type.startswith(messages.TRAIN):
            is_reply = bool(message.metadata.reply_to_message_id)
            up += messages.payload_bytes(message) if is_reply else 0
            down += 0 if is_reply else messages.payload_bytes(message)
    assert sum(event["bytes_down"] for event in replies(folder)) == down
    assert sum(event["bytes_up"] for event in replies(folder)) == up


def test_few_bits_reach_the_loss_of_all_bits(tiny_recipe: dict, tmp_path: Path) -> None:
    """With feedback the last adapters are close to those of fp32: far closer than the way that training took."""
    raw = settings(tiny_recipe, {"rounds": 8})
    few = files(run(raw, tmp_path / "few").path)["checkpoints"][0]
    all_bits = files(run({**raw, "communication": {}}, tmp_path / "all").path)["checkpoints"][0]
    start = initial_shared_state(recipe_from(raw).plan)
    moved = sum(float(np.sum((all_bits[SHARED + key] - start[key]) ** 2)) for key in start)
    apart = sum(float(np.sum((all_bits[SHARED + key] - few[SHARED + key]) ** 2)) for key in start)
    assert apart < moved / 10
