"""The accountant of differential privacy: what noise spends, by Opacus's Rényi accountant.

The module imports no torch, except through Opacus when it computes ε.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import ConfigError, RefusedError

RANGES = {  # far beyond what plans ask for (``plan_bounds.py``), and within what the accountant computes
    "noise_multiplier": (1e-6, 1e9),
    "sample_rate": (1e-12, 1.0),
    "steps": (0, 10**12),
}


@dataclass(frozen=True)
class Spending:
    """``steps`` steps with Gaussian noise, each on examples drawn with the probability ``sample_rate``."""

    noise_multiplier: float
    sample_rate: float
    steps: int


def check_spending(spending: Spending, table: str = "privacy") -> None:
    """Raise RefusedError for a number out of its range, with which ε would be wrong or never computed."""
    for field, (low, high) in RANGES.items():
        value = getattr(spending, field)
        if not low <= value <= high:  # NaN is in no range
            raise RefusedError(f"{table}.{field}", f"{low:g} to {high:g}", value)


def epsilon_of(spendings: Sequence[Spending], delta: float, table: str = "privacy") -> float:
    """Return ε of all spendings together at δ, by Rényi accounting (Mironov et al. 2019, arXiv 1908.10530).

    ``table`` is the recipe's table that an error names. Raises RefusedError for numbers of which the accountant cannot
    compute it.
    """
    if not spendings:
        return 0.0
    for spending in spendings:
        check_spending(spending, table)
    steps: Counter[tuple[float, float]] = Counter()
    for spending in spendings:
        steps[spending.noise_multiplier, spending.sample_rate] += spending.steps
    accountant = _accountants().RDPAccountant()
    accountant.history = [(noise, rate, count) for (noise, rate), count in sorted(steps.items())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a larger order could give a smaller ε
        try:
            epsilon = float(accountant.get_epsilon(delta=delta))
        except (ArithmeticError, ValueError) as error:
            raise _not_computable(table, str(error)) from None
    if not math.isfinite(epsilon):
        raise _not_computable(table, f"ε = {epsilon}")
    return epsilon


def _not_computable(table: str, found: str) -> RefusedError:
    message = "ε cannot be computed for this noise, sampling rate, number of steps and δ."
    hint = f"Raise {table}.noise_multiplier or {table}.epsilon, or {table}.delta."
    return RefusedError(f"{table}.noise_multiplier", "a finite ε", found, message=message, hint=hint)


@lru_cache
def noise_for(epsilon: float, delta: float, sample_rate: float, steps: int, table: str = "privacy") -> float:
    """Return the noise multiplier with which ``steps`` steps spend at most ε at δ. Raises ConfigError if none does.

    ``table`` is the recipe's table that the error names.
    """
    find = _accountants().utils.get_noise_multiplier
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return float(
                find(
                    target_epsilon=epsilon,
                    target_delta=delta,
                    sample_rate=sample_rate,
                    steps=steps,
                    epsilon_tolerance=min(0.01, epsilon / 100),
                    accountant="rdp",
                )
            )
        except (ArithmeticError, ValueError):
            key = f"{table}.epsilon"
            message = f"{key} = {epsilon:g} is too small: no amount of noise reaches it with {steps} steps."
            hint = f"Raise {key}."
            raise ConfigError(key, "a reachable budget", epsilon, message=message, hint=hint) from None


def _accountants() -> Any:
    """Opacus's accountants. Raises ConfigError if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import opacus.accountants.utils
    except ImportError:
        raise ConfigError(
            "privacy",
            "the package opacus",
            "not installed",
            message="Differential privacy needs the package opacus, which is not installed.",
            hint="pip install 'colora[privacy]'",
        ) from None
    return opacus.accountants
