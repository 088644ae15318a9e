"""The tables of docs/evidence.md are what the script writes from the results on disk."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def evidence(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("evidence")


def result(*personal: float) -> dict:
    """A result of these accuracies, one for each site."""
    return {"sites": {f"s{i}": {"base": 0.5, "personal": value} for i, value in enumerate(personal)}}


def test_the_page_is_up_to_date(evidence: ModuleType) -> None:
    assert evidence.page() == evidence.PAGE.read_text(), "run python docs/scripts/evidence.py"


def test_the_pictures_are_up_to_date(evidence: ModuleType) -> None:
    for name, text in evidence.pictures().items():
        assert text == (evidence.PICTURES / name).read_text(), f"run python docs/scripts/evidence.py: {name}"


def test_the_best_arm_of_a_method_is_compared_on_the_seeds_that_all_arms_have(evidence: ModuleType) -> None:
    arms = {
        "local": {0: result(0.6, 0.6), 1: result(0.9, 0.9)},
        "local,train.lr=2e-3": {0: result(0.7, 0.7)},
        "colora": {0: result(0.8, 0.8)},
    }
    assert evidence.best(arms, "local") == "local,train.lr=2e-3"
    assert evidence.best(arms, "colora") == "colora"


def test_gains_are_over_sites(evidence: ModuleType) -> None:
    """Gains of 0.1 and 0.3: mean 0.2, standard deviation 0.1414, standard error 0.1."""
    arms = {"colora": {0: result(0.7, 0.9)}, "local": {0: result(0.6, 0.6)}}
    assert evidence.gain_table(arms, "colora", "local")[-1] == (
        "| 0 | 0.500 | 0.600 | 0.800 | +0.200 ± 0.100 | 2 of 2 |"
    )
