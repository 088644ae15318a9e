"""Differentially private rounds of a site: its noise, what a round spends, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ...common.config.schema import Plan, to_json
from ...common.digest import digest
from ...common.errors import RefusedError
from ...common.protocol.types import EPSILON, PRELIMINARY, TrainReply, TrainRequest, hash_arrays
from ...common.tasks.base import Task, hash_examples
from ...common.training.accountant import Spending, epsilon_of
from ...common.training.noise import NoiseSource
from ...common.training.private_loop import PrivateLoop, check_separable
from .privacy_budget import LEDGER, PrivacyForecast, PrivacyLedger, check_budget, check_delta
from .state_store import PersonalState, StateStore


@dataclass
class PrivateRounds:
    """``secret`` is what the site's random numbers derive from. ``max_epsilon`` is for all federations together."""

    plan: Plan
    site: str
    secret: object
    task: Task
    ledger: PrivacyLedger
    max_epsilon: float | None = None
    _separable: bool = False  # once it is checked

    @cached_property
    def forecast(self) -> PrivacyForecast:
        """What the plan spends at this site."""
        return PrivacyForecast(self.plan, len(self.task.train.examples))

    @cached_property
    def _identity(self) -> str:
        """Hash of the plan with the site's own settings, of the training examples, and of the secret.

        With another secret a round that runs again has other noise, which has to be paid for.
        """
        return digest(f"{to_json(self.plan)}|{hash_examples(self.task.train.examples)}|{digest(str(self.secret))}")

    def spent(self) -> float:
        """Return ε of what the site has sent in this federation."""
        return epsilon_of(self.ledger.spendings(self.plan.name), self.plan.privacy.delta)

    def check_start(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Check before the first round what the plan would spend, δ, and the model.

        Raises RefusedError, ConfigError or ModelError.
        """
        check_delta(self.plan, self.forecast.examples, self.site)
        epsilon = self.forecast.epsilon()
        if self.max_epsilon is not None:
            epsilon = self.forecast.epsilon(*self.ledger.others(self.plan.name))
            if epsilon > self.max_epsilon:
                limit = f"at most {self.max_epsilon:g} (allow.max_epsilon, of all federations)"
                raise RefusedError("privacy.epsilon", limit, f"{epsilon:.3g}", site=self.site)
        self._check_model(parameters)

    def check_request(self, request: TrainRequest) -> None:
        """Raise RefusedError for requests before round 1, whose replies would have no noise."""
        if request.kind in PRELIMINARY:
            raise RefusedError("request", "a round, with differential privacy", request.kind, site=self.site)

    def loop(self, request: TrainRequest, state: PersonalState, parameters: Mapping[str, nn.Parameter]) -> PrivateLoop:
        """Return the training loop of a round, after writing to the ledger what the round spends.

        A round that runs again from the same state gets the same noise and spends nothing. The same noise on other
        gradients would let an observer subtract it, so the noise also derives from the content of the request, the
        state, the plan and the training examples. All of these and the secret are in the key of the ledger.

        Raises RefusedError if the budget is spent, and for a state that was trained without noise: the gradients of A
        and B depend on it.
        """
        if state.round and not state.noised:
            found = f"the state of round {state.round}, which was trained without noise"
            raise RefusedError("state", "a state that was trained with noise", found, site=self.site)
        self._check_model(parameters)
        key = digest(f"{request.key}|{_hash_state(state)}|{self._identity}")
        spending = self.forecast.of_rounds(1)
        if not self.ledger.has(key):
            self._check_budget(spending)
            self.ledger.spend(self.plan.name, key, spending)
        source = NoiseSource("privacy", self.secret, self.plan.name, self.site, key)
        return PrivateLoop(spending.noise_multiplier, self.plan.privacy.max_grad_norm, source)

    def _check_model(self, parameters: Mapping[str, nn.Parameter]) -> None:
        if not self._separable:
            check_separable(self.task, parameters, self.plan.train)
            self._separable = True

    def _check_budget(self, spending: Spending) -> None:
        privacy, ledger = self.plan.privacy, self.ledger
        limits = (
            (ledger.spendings(self.plan.name), privacy.epsilon, "privacy.epsilon"),
            (ledger.spendings(), self.max_epsilon, "allow.max_epsilon"),
        )
        for spendings, limit, key in limits:
            check_budget([*spendings, spending], privacy.delta, limit, key, self.site)


def private_rounds(plan: Plan, task: Task, store: StateStore) -> PrivateRounds | None:
    """Return the private rounds of a site; None for a plan without differential privacy, or one that shares nothing."""
    if not plan.privacy.enabled or not plan.row().shares:
        return None
    ledger = PrivacyLedger(store.folder.parent / LEDGER)
    return PrivateRounds(plan, task.rows.site, store.secret or plan.seed, task, ledger)


def _hash_state(state: PersonalState) -> str:
    def arrays(values: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {key: value.cpu().numpy() for key, value in values.items()}

    return hash_arrays(arrays(state.tensors)) + hash_arrays(arrays(state.optimizer_state))


def without_metrics(reply: TrainReply) -> TrainReply:
    """The reply as it leaves a private federation: only ε stays in it, which depends on public numbers only."""
    return dataclasses.replace(reply, metrics={key: value for key, value in reply.metrics.items() if key == EPSILON})
