"""Steps between training and the reply: their order, their seeds, and what each does by hand arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from colora.client.training import update_pipeline
from colora.client.training.update_pipeline import UPDATE_STEPS, UpdateContext, process_update
from colora.common.config.schema import TrainSettings
from colora.common.protocol.types import METRIC_NAMES, Arrays

CONTEXT = UpdateContext(round=3, seed=7)
SHAPES = {"q.lora_A.weight": (3, 7), "q.lora_B.weight": (5, 3), "v.lora_scale": (2,)}


def arrays(seed: int, size: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {key: rng.normal(0, size, shape).astype(np.float32) for key, shape in SHAPES.items()}


def same(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(one[key].tobytes() == other[key].tobytes() for key in one)


def test_default_settings_send_what_was_trained() -> None:
    trained = arrays(0)
    sent, metrics = process_update(trained, arrays(1), TrainSettings(), CONTEXT)
    assert same(sent, arrays(0))
    assert metrics == {}


def test_steps_run_in_the_order_of_the_table_with_a_seed_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """x → 0.5 x → 0.5 x + 1, and the scales multiply."""
    seeds: list[int] = []

    def step(change: Callable[[np.ndarray], np.ndarray], scale: float) -> update_pipeline.UpdateStep:
        def run(given: Arrays, reference: Arrays, context: UpdateContext) -> tuple[Arrays, float]:
            seeds.append(context.seed)
            return {key: change(value) for key, value in given.items()}, scale

        return run

    table = {
        "halve": lambda settings: step(lambda x: x / 2, 0.5),
        "absent": lambda settings: None,
        "shift": lambda settings: step(lambda x: x + 1, 0.5),
    }
    monkeypatch.setattr(update_pipeline, "UPDATE_STEPS", table)
    one = {"x": np.array([4.0], np.float32)}
    for _ in range(2):
        sent, metrics = process_update(one, {"x": np.zeros(1, np.float32)}, TrainSettings(), CONTEXT)
        assert sent["x"].tolist() == [3.0]
        assert metrics == {"update.scale": 0.25}
        assert set(metrics) <= METRIC_NAMES
    assert seeds[:2] == seeds[2:]
    assert len(set(seeds)) == 2


def test_steps_are_known_by_name() -> None:
    assert all(make(TrainSettings()) is None for make in UPDATE_STEPS.values())
