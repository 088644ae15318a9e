"""Steps between training and the reply: their order, their seeds, and what each does by hand arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from colora.client.training import update_pipeline
from colora.client.training.update_pipeline import UPDATE_STEPS, Clip, UpdateContext, process_update, update_norm
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


# --- clip -----------------------------------------------------------------------------------------------------------


def test_clipping_by_hand() -> None:
    """The update (3, 4) over two arrays has norm 5."""
    start = {"a": np.array([1.0], np.float32), "b": np.array([[-2.0]], np.float32)}
    trained = {"a": np.array([4.0], np.float32), "b": np.array([[2.0]], np.float32)}
    sent, metrics = process_update(trained, start, TrainSettings(max_update_norm=2.5), CONTEXT)
    assert (sent["a"].item(), sent["b"].item()) == (2.5, 0.0)  # 1 + 3 / 2, -2 + 4 / 2
    assert metrics == {"update.scale": 0.5}
    assert set(metrics) <= METRIC_NAMES


@pytest.mark.parametrize("bound", [1e-6, 0.01, 1.0, 9.0])
def test_a_clipped_update_has_the_norm_of_the_bound_and_the_old_direction(bound: float) -> None:
    start, trained = arrays(0), arrays(1, 10.0)
    sent, factor = Clip(bound)(trained, start, CONTEXT)
    assert update_norm(sent, start) <= bound
    if bound > 1e-3:  # a shorter update has few bits beside values of size 1
        assert update_norm(sent, start) == pytest.approx(bound, rel=1e-4)
        for key in SHAPES:
            np.testing.assert_allclose(sent[key] - start[key], factor * (trained[key] - start[key]), atol=1e-6)
    assert all(value.dtype == np.float32 for value in sent.values())


def test_clipping_twice_is_clipping_once_to_the_bit() -> None:
    start = arrays(0)
    for seed in range(1, 30):
        once, factor = Clip(2.0)(arrays(seed), start, CONTEXT)
        assert factor < 1
        assert same(Clip(2.0)(once, start, CONTEXT)[0], once)


def test_an_update_within_the_bound_is_not_touched() -> None:
    start, trained = arrays(0), arrays(1)
    for bound in (update_norm(trained, start), 1e6):
        sent, metrics = process_update(trained, start, TrainSettings(max_update_norm=bound), CONTEXT)
        assert same(sent, arrays(1))
        assert metrics == {}
    assert same(process_update({}, {}, TrainSettings(max_update_norm=1.0), CONTEXT)[0], {})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_no_numbers_pass_unchanged_for_the_coordinator_to_refuse(bad: float) -> None:
    one = {"x": np.array([1.0, bad], np.float32)}
    assert same(Clip(1.0)(one, {"x": np.zeros(2, np.float32)}, CONTEXT)[0], one)


def test_no_step_runs_by_default() -> None:
    assert all(make(TrainSettings()) is None for make in UPDATE_STEPS.values())
