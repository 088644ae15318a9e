"""Differentially private rounds of a site: its noise, what a round spends, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ...common.config.schema import Plan, digest
from ...common.errors import RefusedError
from ...common.protocol.types import PRELIMINARY, TrainRequest, hash_arrays
from ...common.tasks.base import Task
from ...common.training.noise import NoiseSource
from ...common.training.private_loop import PrivateLoop, check_separable
from .privacy_budget import PrivacyLedger, Spending, check_budget, epsilon_of, noise_for
from .state_store import PersonalState


@dataclass
class PrivateRounds:
    """``secret`` is what the site's random numbers derive from. ``max_epsilon`` is for all federations together."""

    plan: Plan
    site: str
    secret: object
    examples: int
    ledger: PrivacyLedger
    max_epsilon: float | None = None

    @property
    def sample_rate(self) -> float:
        """The probability with which a step draws an example."""
        return min(1.0, self.plan.train.batch_size / max(1, self.examples))

    @property
    def steps(self) -> int:
        """Optimizer steps of a round."""
        return self.plan.train.steps_per_round(self.examples)

    @cached_property
    def noise_multiplier(self) -> float:
        """The recipe's noise multiplier, or what spends the recipe's budget over all rounds."""
        privacy = self.plan.privacy
        if privacy.noise_multiplier is not None:
            return privacy.noise_multiplier
        assert privacy.epsilon is not None
        return noise_for(privacy.epsilon, privacy.delta, self.sample_rate, self.steps * self.plan.rounds)

    @property
    def round_spending(self) -> Spending:
        """What one round spends."""
        return Spending(self.noise_multiplier, self.sample_rate, self.steps)

    def forecast(self) -> float:
        """Return ε of all rounds of the plan."""
        whole = dataclasses.replace(self.round_spending, steps=self.steps * self.plan.rounds)
        return epsilon_of([whole], self.plan.privacy.delta)

    def spent(self) -> float:
        """Return ε of what the site has sent in this federation."""
        return epsilon_of(self.ledger.spendings(self.plan.name), self.plan.privacy.delta)

    def check_forecast(self) -> None:
        """Raise RefusedError before the first round if the plan would spend more than the site allows."""
        if self.max_epsilon is None:
            return
        epsilon = self.forecast()
        if epsilon > self.max_epsilon:
            raise RefusedError(
                "privacy.epsilon", f"at most {self.max_epsilon:g} (allow.max_epsilon)", f"{epsilon:.3g}", site=self.site
            )

    def check_request(self, request: TrainRequest) -> None:
        """Raise RefusedError for requests before round 1, whose replies would have no noise."""
        if request.kind in PRELIMINARY:
            raise RefusedError("request", "a round, with differential privacy", request.kind, site=self.site)

    def loop(
        self, request: TrainRequest, state: PersonalState, task: Task, parameters: Mapping[str, nn.Parameter]
    ) -> PrivateLoop:
        """Return the training loop of a round, which is paid for before it is returned.

        A round that runs again from the same state gets the same noise and spends nothing. The same noise on other
        gradients would let an observer subtract it, so the noise also derives from the content of the request and of
        the state. Raises RefusedError if the budget is spent.
        """
        key = digest(f"{request.key}|{_hash_state(state)}")
        if not self.ledger.has(key):
            self._check_budget()
            check_separable(task, parameters, self.plan.train)
            self.ledger.spend(self.plan.name, key, self.round_spending)
        source = NoiseSource("privacy", self.secret, self.plan.name, self.site, key)
        return PrivateLoop(self.noise_multiplier, self.plan.privacy.max_grad_norm, source)

    def _check_budget(self) -> None:
        privacy, ledger = self.plan.privacy, self.ledger
        limits = (
            (ledger.spendings(self.plan.name), privacy.epsilon, "privacy.epsilon"),
            (ledger.spendings(), self.max_epsilon, "allow.max_epsilon"),
        )
        for spendings, limit, key in limits:
            check_budget([*spendings, self.round_spending], privacy.delta, limit, key, self.site)


def _hash_state(state: PersonalState) -> str:
    def arrays(values: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {key: value.cpu().numpy() for key, value in values.items()}

    return hash_arrays(arrays(state.tensors)) + hash_arrays(arrays(state.optimizer_state))
