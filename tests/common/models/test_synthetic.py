"""The names of synthetic models, which a coordinator chooses."""

from __future__ import annotations

import pytest

from colora.common.errors import ModelError
from colora.common.models.synthetic import MAX_SIZE, model_of


@pytest.mark.parametrize("size", ["0", "", "-4", "²", "٣", "4\n", "04", str(MAX_SIZE + 1), "99999999", "9" * 5000])
def test_a_size_that_is_no_small_number_is_refused_before_anything_is_allocated(size: str) -> None:
    with pytest.raises(ModelError) as refused:
        model_of(f"synthetic:bilinear-{size}")
    assert "a number D from 1 to 4096" in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_small_size_is_built() -> None:
    assert model_of("synthetic:bilinear-3").proj.weight.shape == (3, 3)
