"""The privacy budget of a site: what training spends, and a ledger of it on disk.

This module imports no torch, except through Opacus when it computes ε.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...common.checked_entries import CheckedEntries, Entries
from ...common.config.schema import Plan
from ...common.errors import ConfigError, RefusedError
from ...common.foreign_text import MAX_TEXT
from ...common.training.accountant import RANGES, Spending, check_spending, epsilon_of, noise_for

LEDGER = "privacy.json"  # in the folder above that of a federation


@dataclass(frozen=True)
class PrivacyForecast:
    """What a plan spends at a site with so many training examples."""

    plan: Plan
    examples: int

    @property
    def sample_rate(self) -> float:
        """The probability with which a step draws an example."""
        return min(1.0, self.plan.train.batch_size / max(1, self.examples))

    @cached_property
    def noise_multiplier(self) -> float:
        """The recipe's noise multiplier, or what spends the recipe's budget over all rounds."""
        privacy = self.plan.privacy
        if privacy.noise_multiplier is not None:
            return privacy.noise_multiplier
        assert privacy.epsilon is not None
        return noise_for(privacy.epsilon, privacy.delta, self.sample_rate, self.of_rounds(self.plan.rounds, 1.0).steps)

    def of_rounds(self, rounds: int, noise_multiplier: float | None = None) -> Spending:
        """Return what so many rounds spend."""
        steps = rounds * self.plan.train.steps_per_round(self.examples)
        noise = self.noise_multiplier if noise_multiplier is None else noise_multiplier
        return Spending(noise, self.sample_rate, steps)

    def epsilon(self, *before: Spending) -> float:
        """Return ε of all rounds of the plan, and of what was spent before."""
        return epsilon_of([*before, self.of_rounds(self.plan.rounds)], self.plan.privacy.delta)


class PrivacyLedger:
    """What each request has spent, over all federations of a site. It is written before a request is trained.

    The file holds the SHA-256 of what has been spent. Every method raises DamagedError for a file that is cut or
    changed, and StateError for one that cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        expected, lost = "a ledger of the privacy budget", "the privacy budget that the site has spent is unknown"
        hint = "Restore the file. If you delete it, the budget starts again from zero."
        self.file = CheckedEntries(path, "spendings", expected, lost, hint)

    def spendings(self, federation: str | None = None) -> list[Spending]:
        """Return the spendings of one federation, or of all."""
        entries = self._read()
        return [_spending(entry) for entry in entries.values() if federation in (None, entry["federation"])]

    def others(self, federation: str) -> list[Spending]:
        """Return the spendings of all other federations."""
        return [_spending(entry) for entry in self._read().values() if entry["federation"] != federation]

    def has(self, key: str) -> bool:
        """Whether the request with this key has been paid for."""
        return key in self._read()

    def spend(self, federation: str, key: str, spending: Spending) -> None:
        """Write down a spending. One with the same key is already there and is not counted again.

        Raises RefusedError for a spending that the ledger could not hold.
        """
        entries = self._read()
        if key not in entries:
            check_spending(spending)
            entries[key] = {"federation": federation, **asdict(spending)}
            self.file.write(entries)

    def _read(self) -> Entries:
        return self.file.read(_check_entry)


def check_budget(spendings: Sequence[Spending], delta: float, limit: float | None, key: str, site: str) -> None:
    """Raise RefusedError if the spendings exceed ``limit``, which ``key`` names."""
    if limit is None:
        return
    epsilon = epsilon_of(spendings, delta)
    if epsilon > limit:
        message = f"The privacy budget is spent: with this round ε would be {epsilon:.3g}, above {key} = {limit:g}."
        hint = "Start a new federation with a larger budget, or end this one here."
        if len(spendings) == 1:
            message = f"One round alone would spend ε = {epsilon:.3g}, above {key} = {limit:g}."
            hint = "Raise the noise or the budget."
        raise RefusedError(key, f"at most {limit:g}", f"{epsilon:.3g}", site=site, message=message, hint=hint)


def check_delta(plan: Plan, examples: int, site: str) -> None:
    """Raise ConfigError for a δ that allows publishing one of the examples."""
    if plan.privacy.delta * max(1, examples) >= 1:
        message = f"privacy.delta is {plan.privacy.delta:g}, which is no protection for {examples} training examples."
        hint = "Set it far below 1 / the number of examples, for example to 1e-5."
        expected = f"below 1/{examples}"
        raise ConfigError("privacy.delta", expected, plan.privacy.delta, site=site, message=message, hint=hint)


def _spending(entry: dict[str, Any]) -> Spending:
    return Spending(float(entry["noise_multiplier"]), float(entry["sample_rate"]), entry["steps"])


def _check_entry(entry: Any) -> None:
    if not isinstance(entry, dict) or entry.keys() != {"federation", *RANGES}:
        raise ValueError("an entry has other fields")
    federation = entry["federation"]
    if not isinstance(federation, str) or not 0 < len(federation) <= MAX_TEXT:
        raise ValueError("an entry has no federation")
    if any(type(entry[field]) not in (int, float) for field in RANGES) or type(entry["steps"]) is not int:
        raise ValueError("an entry has something else than numbers")
    check_spending(Spending(entry["noise_multiplier"], entry["sample_rate"], entry["steps"]))
