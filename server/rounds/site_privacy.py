"""Differential privacy for each site, at the coordinator: DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963).

m sites are sampled for round t      (from a seed that is no secret, so sampling does not amplify)
Δ_k = S_k − S_{t-1}, scaled to ‖Δ_k‖ ≤ C                (0 for a sampled site without an admitted reply)
S_t = S_{t-1} + (1/m) Σ_k Δ_k + N(0, (z · 2C/m)²)       (or a server optimizer's step towards it)

If the data of one site are replaced by any other, the mean of a round moves by at most 2C/m. Rounds in which the site
is not sampled depend on its data through S_{t-1} only. So a site spends what its own rounds spend: Gaussian mechanisms
with noise multiplier z, composed by the Rényi accountant.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...common.config.schema import Recipe
from ...common.errors import ConfigError
from ...common.protocol.types import hash_arrays
from ...common.secret_file import new_secret, read_secret
from ...common.training.accountant import Spending, epsilon_of, noise_for
from .aggregation import Arrays, WeightedUpdate

SECRET = "noise.secret"  # in the run folder
TABLE = "server.privacy"  # of the recipe
_HINT = "Restore the file. If you delete it, a round that runs again gets other noise."


@dataclass(frozen=True)
class Spent:
    """What the released rounds have spent: their noise multiplier, and for how many of them each site was sampled."""

    noise_multiplier: float
    rounds: Mapping[str, int]

    def epsilon(self, delta: float) -> float:
        """Return the largest ε of a site."""
        most = max(self.rounds.values(), default=0)
        return epsilon_of([Spending(self.noise_multiplier, 1.0, most)] if most else [], delta, TABLE)

    def plus(self, sites: Iterable[str]) -> Spent:
        """Return what has been spent after one more round with these sites."""
        return dataclasses.replace(self, rounds=dict(Counter(self.rounds) + Counter(sites)))


def clipped_sum(updates: Iterable[WeightedUpdate], start: Mapping[str, np.ndarray], clip_norm: float) -> Arrays:
    """Σ_k Δ_k · min(1, C / ‖Δ_k‖) in double precision, with one update in memory at a time."""
    total = {key: np.zeros(array.shape) for key, array in start.items()}
    for update in updates:
        change = {key: update.arrays[key].astype(np.float64) - array for key, array in start.items()}
        norm = math.sqrt(sum(float(np.vdot(value, value)) for value in change.values()))
        scale = min(1.0, clip_norm / norm) if norm else 1.0
        for key, value in change.items():
            total[key] += scale * value
    return total


@dataclass(frozen=True)
class PrivateMean:
    """The mean of one round: of ``sites`` clipped updates, with noise from a secret."""

    sites: int
    clip_norm: float
    noise_multiplier: float
    key: tuple[object, ...]  # the secret, the federation and the round

    @property
    def noise(self) -> float:
        """The standard deviation of the noise on every number of the mean."""
        return self.noise_multiplier * 2 * self.clip_norm / self.sites

    def __call__(self, updates: Iterable[WeightedUpdate], start: Mapping[str, np.ndarray]) -> Arrays:
        """Return S_{t-1} + the mean of the clipped updates + noise.

        The noise also derives from the mean: the same replies get the same noise, and others get independent noise.
        With the same noise on two different means, their difference would be without noise.
        """
        from ...common.training.noise import NoiseSource  # cryptography, which only private runs need

        mean = {key: value / self.sites for key, value in clipped_sum(updates, start, self.clip_norm).items()}
        source = NoiseSource("site privacy", *self.key, hash_arrays(start), hash_arrays(mean))
        noised: Arrays = {}
        for step, key in enumerate(sorted(start)):
            noise = self.noise * source.normal(mean[key].size, step).reshape(mean[key].shape)
            noised[key] = (start[key].astype(np.float64) + mean[key] + noise).astype(start[key].dtype)
        return noised


def coordinator_secret(folder: Path) -> str:
    """Return the secret in a run folder. The first call makes it. Raises StateError for a damaged file.

    A file that is missing later costs nothing but the exact repetition of a round: noise is never used for two means.
    """
    path = folder / SECRET
    return read_secret(path, "the coordinator", _HINT) or new_secret(path)


class SitePrivacy:
    """The private rounds of a run: their noise, and what they spend.

    ``sampled`` returns the sites of a round, connected or not. They depend on the recipe and the roster only.
    """

    def __init__(self, recipe: Recipe, sites: Sequence[str], folder: Path, sampled: Callable[[int], list[str]]) -> None:
        assert recipe.server.privacy is not None
        self.settings, self.recipe, self.sampled = recipe.server.privacy, recipe, sampled
        self.sites, self.folder = sites, folder

    @cached_property
    def secret(self) -> str:
        """What the noise derives from. Raises StateError for a damaged file."""
        return coordinator_secret(self.folder)

    def begin(self) -> Spent:
        """Return the budget before round 1, with the noise multiplier of all rounds.

        Raises ConfigError for a δ that would allow publishing one site, and for a budget that no round fits in.
        """
        if self.settings.delta * len(self.sites) >= 1:
            message = f"{TABLE}.delta is {self.settings.delta:g}, which is no protection for {len(self.sites)} sites."
            expected, hint = f"below 1/{len(self.sites)}", "Set it below 1 / the number of sites."
            raise ConfigError(f"{TABLE}.delta", expected, self.settings.delta, message=message, hint=hint)
        spent = Spent(self._noise_multiplier(), {})
        first = spent.plus(self.sampled(1)).epsilon(self.settings.delta)
        if self._exceeds(first):
            limit = self.settings.epsilon
            message = f"One round alone would spend ε = {first:.3g}, above {TABLE}.epsilon = {limit:g}."
            hint = f"Raise {TABLE}.noise_multiplier or {TABLE}.epsilon."
            raise ConfigError(f"{TABLE}.epsilon", f"at least {first:.3g}", limit, message=message, hint=hint)
        return spent

    def mean_of(self, t: int, spent: Spent) -> PrivateMean:
        """Return the mean of round t, which takes the place of an aggregator."""
        key = (self.secret, self.recipe.name, t)
        return PrivateMean(len(self.sampled(t)), self.settings.clip_norm, spent.noise_multiplier, key)

    def is_over(self, spent: Spent, t: int) -> bool:
        """Whether round t would exceed the budget."""
        return self._exceeds(spent.plus(self.sampled(t)).epsilon(self.settings.delta))

    def with_lost_rounds(self, spent: Spent, last: int, damaged: Sequence[str]) -> Spent:
        """Count the rounds after ``last`` whose checkpoints are damaged, by their files' names.

        Their adapters have been sent. When they run again with other replies, they get other noise and spend again.
        """
        numbers = [number for name in damaged if (number := Path(name).stem.removeprefix("round-")).isdecimal()]
        for t in range(last + 1, max(map(int, numbers), default=last) + 1):
            spent = spent.plus(self.sampled(t))
        return spent

    def fields(self, mean: PrivateMean, spent: Spent, norms: Mapping[str, float]) -> dict[str, Any]:
        """Return the fields of the event that says what a round cut, added and spent."""
        return {
            "sites": mean.sites,
            "clipped": {site: norm for site, norm in norms.items() if norm > mean.clip_norm},
            "bound": mean.clip_norm,
            "noise": mean.noise,
            "epsilon": spent.epsilon(self.settings.delta),
            "delta": self.settings.delta,
            "budget": self.settings.epsilon,
        }

    def _noise_multiplier(self) -> float:
        """The recipe's, or what spends the budget of the site that is sampled most often."""
        if self.settings.noise_multiplier is not None:
            return self.settings.noise_multiplier
        assert self.settings.epsilon is not None
        rounds = Counter(site for t in range(1, self.recipe.rounds + 1) for site in self.sampled(t))
        return noise_for(self.settings.epsilon, self.settings.delta, 1.0, max(rounds.values()), TABLE)

    def _exceeds(self, epsilon: float) -> bool:
        return self.settings.epsilon is not None and epsilon > self.settings.epsilon
