"""Spectra equal the SVD of ΔW, and their measures equal values computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from spectra import Spectrum, spectrum_of, spectrum_of_factors
from torch import nn

from colora.common.adapters.factors import factors_of
from colora.common.adapters.inject import ADAPTER, attach
from colora.common.config.schema import AdapterSettings, MethodSettings, ModelSettings, Plan
from colora.common.methods import METHODS


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)


@pytest.mark.parametrize(("d_out", "rank", "d_in"), [(9, 3, 7), (7, 3, 9), (4, 6, 9), (9, 6, 4), (5, 5, 5)])
def test_factors_have_the_singular_values_of_their_product(d_out: int, rank: int, d_in: int) -> None:
    b, a = drawn(d_out, rank), drawn(rank, d_in)
    spectrum, whole = spectrum_of_factors(b, a), spectrum_of(b @ a)
    oracle = torch.linalg.svdvals(b @ a)
    assert torch.allclose(spectrum.values, oracle[: len(spectrum.values)], atol=1e-12)
    assert oracle[len(spectrum.values) :].abs().sum() < 1e-12, "omitted values are zero"
    assert measures(spectrum) == pytest.approx(measures(whole), abs=1e-9)


def measures(spectrum: Spectrum) -> list[float]:
    return [*(spectrum.top(k) for k in (1, 2, 100)), spectrum.effective_rank, spectrum.participation]


def test_n_equal_directions_count_as_n() -> None:
    spectrum = spectrum_of(torch.diag(torch.tensor([3.0] * 5 + [0.0] * 3)))
    assert spectrum.effective_rank == pytest.approx(5)
    assert spectrum.participation == pytest.approx(5)
    assert [spectrum.top(k) for k in (1, 4, 5, 8, 50)] == pytest.approx([0.2, 0.8, 1, 1, 1])


def test_one_direction_counts_as_one() -> None:
    b, a = drawn(6, 1), drawn(1, 8)
    for spectrum in (
        spectrum_of(b @ a),
        spectrum_of_factors(b, a),
        spectrum_of_factors(b.repeat(1, 3), a.repeat(3, 1)),
    ):
        assert measures(spectrum) == pytest.approx([1, 1, 1, 1, 1], abs=1e-9)


def test_two_unequal_directions_by_hand() -> None:
    spectrum = spectrum_of(torch.tensor([[0.0, 2.0], [-1.0, 0.0]]))  # σ = 2, 1
    assert spectrum.cumulative.tolist() == pytest.approx([4 / 5, 1])
    assert spectrum.effective_rank == pytest.approx(math.exp(math.log(3) - 2 / 3 * math.log(2)))
    assert spectrum.participation == pytest.approx(25 / 17)


def test_measures_do_not_depend_on_the_scale() -> None:
    delta = drawn(6, 4)
    assert measures(spectrum_of(1e-6 * delta)) == pytest.approx(measures(spectrum_of(delta)))


def test_a_zero_update_has_no_measures() -> None:
    assert all(math.isnan(value) for value in measures(spectrum_of_factors(torch.zeros(4, 2), drawn(2, 3))))


@pytest.mark.parametrize("method", ["fedit", "multilora", "colora"])
def test_an_adapters_spectrum_is_that_of_its_update(method: str) -> None:
    settings = AdapterSettings(2, 6.0, target_modules=("query",), modules=3)
    model: Any = nn.ModuleDict({"query": nn.Linear(11, 9)})
    values = attach(model, settings, METHODS[method])
    with torch.no_grad():
        for value in values.values():
            value.copy_(drawn(*value.shape))
        layer = model["query"]
        variant = layer.lora_variant.get(ADAPTER)
        delta = variant.delta(layer, ADAPTER) if variant else layer.get_delta_weight(ADAPTER)
        plan = Plan("a", 1, ModelSettings("x"), adapter=settings, method=MethodSettings(method))
        spectrum = spectrum_of_factors(*factors_of(values, plan)["query"])
    oracle = torch.linalg.svdvals(delta)
    assert torch.allclose(spectrum.values.float(), oracle[: len(spectrum.values)], rtol=1e-4, atol=1e-4)
