"""Weights of admitted replies."""

from __future__ import annotations

import math

import pytest

from colora.server.rounds.weighting import Contribution, benefit_weights, running_mean


def contributions(**ratios: float) -> dict[str, Contribution]:
    return {site: Contribution(8, 8, ratio) for site, ratio in ratios.items()}


def test_all_sites_weigh_the_same_in_the_first_round() -> None:
    assert benefit_weights(contributions(ada=0.1, bob=9.0), 0.0) == {"ada": 0.5, "bob": 0.5}


@pytest.mark.parametrize(("progress", "beta"), [(0.125, 2.0), (0.25, 4.0), (0.5, 8.0), (0.9, 8.0)])
def test_benefit_weights_are_a_softmax_that_sharpens_until_half_of_the_rounds(progress: float, beta: float) -> None:
    weights = benefit_weights(contributions(ada=0.5, bob=1.0), progress)
    assert weights["ada"] / weights["bob"] == pytest.approx(math.exp(beta * 0.5))
    assert sum(weights.values()) == pytest.approx(1.0)


def test_the_largest_ratio_that_is_admitted_leaves_finite_weights() -> None:
    weights = benefit_weights(contributions(ada=0.0, bob=10.0), 1.0)
    assert weights == {"ada": pytest.approx(1.0), "bob": pytest.approx(0.0)}


def test_a_running_mean_starts_with_its_first_ratio_and_forgets_slowly() -> None:
    assert running_mean(None, 0.6) == 0.6
    assert running_mean(0.6, 1.0) == pytest.approx(0.68)
