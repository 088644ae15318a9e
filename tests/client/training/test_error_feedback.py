"""Updates in few bits: finite, within the bound, and after a bounded number of tries."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from colora.client.training import error_feedback
from colora.client.training.error_feedback import MAX_TRIES, quantized_update
from colora.client.training.update_pipeline import Clip, UpdateContext, update_norm
from colora.common.errors import RefusedError

BITS = (2, 4, 8)
NOTHING: dict[str, torch.Tensor] = {}


def one(value: float) -> dict[str, np.ndarray]:
    return {"a": np.full(4, value, np.float32)}


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item for each encoding."""
    made: list[int] = []
    encode = error_feedback.encode
    monkeypatch.setattr(error_feedback, "encode", lambda *arguments: made.append(1) or encode(*arguments))
    return made


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bound", [None, 1.0, 5e-324, 1e38])
def test_values_whose_difference_is_beyond_fp32_are_sent_as_finite_ones(bits: int, bound: float | None) -> None:
    """3e38 - (-3e38) is infinite in fp32: the sent values were -inf, and with a bound the loop had no end."""
    arrays, reference = one(2.9e38), one(-2.9e38)
    sent, feedback = quantized_update(arrays, reference, NOTHING, bits, bound)
    assert np.isfinite(sent["a"]).all()
    assert feedback["a"].isfinite().all()
    assert feedback["a"].dtype == torch.float32
    assert bound is None or update_norm(sent, reference) <= bound
    clipped = Clip(1.0)(arrays, reference, UpdateContext(1, 1))[0]
    quantized_update(clipped, reference, NOTHING, bits, 1.0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bound", [None, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_feedback_that_makes_a_value_infinite_is_refused(bits: int, bound: float | None, value: float) -> None:
    with pytest.raises(RefusedError, match=r"site ada: The trained array with error feedback of a is not finite in"):
        quantized_update(one(1e38), one(0), {"a": torch.full((4,), value)}, bits, bound, "ada")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_trained_values_that_are_not_finite_are_refused(bits: int, value: float) -> None:
    with pytest.raises(RefusedError, match=r"a is not finite in fp32\. The site keeps its last state"):
        quantized_update(one(value), one(0), NOTHING, bits, 1.0)


@pytest.mark.parametrize("shape", [(3,), (1,), (4, 1)])
def test_feedback_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RefusedError, match=r"feedback of a: expected shape \(4,\), found shape"):
        quantized_update(one(1), one(0), {"a": torch.zeros(shape)}, 8, 1.0)


def test_rounding_beyond_fp32_is_refused() -> None:
    """2 bits know 1 and 3 times a scale: the value next to the largest of a block is rounded up."""
    arrays = {"a": np.array([3.4e38, 2.4e38, -3.4e38, 3.4028e38], np.float32)}
    for bits in BITS:
        try:
            sent, feedback = quantized_update(arrays, one(0), NOTHING, bits)
        except RefusedError as error:
            assert "is not finite in fp32" in error.args[0]  # noqa: PT017
        else:
            assert np.isfinite(sent["a"]).all()
            assert feedback["a"].isfinite().all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bound", [5e-324, 1e-40, 1e-30, 1e-7, 1e-3, 0.7, 1e12, 1e38])
def test_the_tries_are_few_for_every_bound(bits: int, bound: float, tries: list[int]) -> None:
    rng = np.random.default_rng(0)
    for size in (1e-38, 1.0, 1e37):
        arrays, reference = ({"a": (rng.normal(0, 1, 300) * size).astype(np.float32)} for _ in range(2))
        tries.clear()
        sent, _ = quantized_update(arrays, reference, NOTHING, bits, bound)
        assert update_norm(sent, reference) <= bound
        assert len(tries) < MAX_TRIES


def test_what_is_sent_and_what_it_lacks_is_what_was_trained() -> None:
    rng = np.random.default_rng(1)
    arrays, reference = ({"a": rng.normal(0, 1, 600).astype(np.float32)} for _ in range(2))
    lacked = {"a": torch.full((600,), 0.25)}
    sent, feedback = quantized_update(arrays, reference, lacked, 4)
    np.testing.assert_allclose(sent["a"] + feedback["a"].numpy(), arrays["a"] + 0.25, atol=1e-6)
