"""The coordinator's differences: nothing of an aggregate is lost, and what few bits cannot represent is sent whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from colora.common.config.loader import recipe_from
from colora.common.config.schema import ServerSettings
from colora.common.protocol.broadcast import apply_difference
from colora.server.rounds.aggregation import WeightedUpdate
from colora.server.rounds.broadcast import Difference, broadcast
from colora.server.rounds.checkpoint import Checkpoints, ServerState
from colora.server.rounds.shared_adapter import ServerStep, SharedAdapter

BITS = (8, 4, 2)
A, B = "proj.lora_A.weight", "proj.lora_B.weight"


def adapter(seed: int, size: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {key: rng.normal(0, size, shape).astype(np.float32) for key, shape in ((A, (2, 300)), (B, (300, 2)))}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("aggregator", ["mean", "median", "product"])
def test_what_one_round_leaves_out_the_next_ones_send(bits: int, aggregator: str) -> None:
    """One site, whose update is the same in each of 30 rounds: the sites receive all of it, up to the last feedback."""
    step, adapters = adapter(1, 1e-2), SharedAdapter(adapter(0))
    start, settings = adapters.shared, ServerSettings(aggregator=aggregator)  # type: ignore[arg-type]
    rounds = 30 if aggregator != "product" else 1  # whose aggregate is not a sum of updates
    for t in range(1, rounds + 1):
        trained = {key: value + step[key] for key, value in adapters.shared.items()}
        serve = ServerStep(t, settings, "safetensors", True, bits)
        before, adapters = adapters, serve(adapters, lambda arrays=trained: [WeightedUpdate(1.0, arrays)]).adapter
        assert adapters.difference is not None
        received = apply_difference(adapters.difference.data, before.shared, bits)
        assert all(np.array_equal(received[key], adapters.shared[key]) for key in received)
    for key in start:
        reached = adapters.shared[key] + adapters.feedback[key]
        assert np.allclose(reached, start[key] + rounds * step[key], atol=1e-5)
        assert np.abs(adapters.feedback[key]).max() < 2 * np.abs(step[key]).max()


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_result_that_few_bits_cannot_represent_is_sent_whole(value: float) -> None:
    aggregate, previous = adapter(1), adapter(0)
    aggregate[A][0, 0], previous[A][0, 0] = value, -value
    sent = broadcast(aggregate, {}, previous, 2, 5)
    if value == 3e38:  # the difference is beyond fp32, and the scale of a third of it is not
        assert np.isfinite(sent.shared[A]).all()
        return
    assert sent.difference is None
    assert sent.feedback == {}
    assert np.array_equal(sent.shared[A], aggregate[A], equal_nan=True)


def test_a_checkpoint_keeps_the_difference_and_the_feedback_of_each_group(tmp_path: Path, tiny_recipe: dict) -> None:
    files = Checkpoints(tmp_path, recipe_from(tiny_recipe))
    groups = (
        SharedAdapter(adapter(0), {}, {}, adapter(1), Difference(3, b"\x00\xffxyz")),
        SharedAdapter(adapter(2), {"v/x": np.ones(2, np.float32)}),
    )
    files.write(ServerState(3, groups, {"ada": 0, "bob": 1}))
    state = files.latest()
    assert state is not None
    first, second = state.adapters
    assert first.difference == groups[0].difference
    assert all(np.array_equal(first.feedback[key], groups[0].feedback[key]) for key in (A, B))
    assert second.difference is None
    assert second.feedback == {}
    assert second.optimizer_state.keys() == {"v/x"}
