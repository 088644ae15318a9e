"""Local-only training beside the federation, and the choice between both models at the end (``train.fallback``).

The two models are compared on validation rows, on which neither was trained.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ...common.config.schema import Plan
from ...common.errors import RefusedError
from ...common.methods import PERSONAL, SHARED, Method, Role
from ...common.protocol.types import FALLBACK_DIFFERENCE, FALLBACK_ERROR, FALLBACK_KEPT, Arrays, TrainRequest
from ...common.standard_error import mean_and_error
from ...common.tasks.base import Task
from ...common.training.loop import StepCallback, TrainOutcome
from .soundness import check_trained
from .state_store import PersonalState
from .validation_rows import require_validation_rows, row_losses

logger = logging.getLogger("colora.trainer")

CLEAR = 1.0  # the local model is kept if it is better by more than so many standard errors


@dataclass(frozen=True)
class Comparison:
    """The mean over validation rows of loss(collaborative) − loss(local), and its standard error.

    A positive difference says that local-only training is better. With one row the error is infinite.
    """

    difference: float
    standard_error: float

    @property
    def keeps_local(self) -> bool:
        """Whether the local model is clearly better. If the rows do not tell, the collaborative one is kept."""
        return self.difference > CLEAR * self.standard_error

    @property
    def metrics(self) -> dict[str, float]:
        """What a reply tells of the choice."""
        known = {FALLBACK_DIFFERENCE: self.difference, FALLBACK_KEPT: float(self.keeps_local)}
        return {**known, FALLBACK_ERROR: self.standard_error} if math.isfinite(self.standard_error) else known


def compare(collaborative: Sequence[float], local: Sequence[float]) -> Comparison:
    """Compare the losses of two models on the same rows. A loss that is not finite loses the comparison."""
    differences = [mine - alone for mine, alone in zip(collaborative, local, strict=True)]
    if not all(map(math.isfinite, local)):
        return Comparison(-math.inf, math.inf)
    if not all(map(math.isfinite, differences)):
        return Comparison(math.inf, 0.0)
    difference, error = mean_and_error(differences)
    return Comparison(difference, math.inf if error is None else error)


def local_method(method: Method) -> Method:
    """The method with every shared group personal."""
    shared = [field.name for field in dataclasses.fields(method) if getattr(method, field.name) is SHARED]
    return dataclasses.replace(method, **dict.fromkeys(shared, PERSONAL))


def local_plan(plan: Plan) -> Plan:
    """The plan that describes the local model: groups that the method shares are personal."""
    shared = [group for group in ("A", "B", "head") if getattr(plan.row(), group) is SHARED]
    method = dataclasses.replace(plan.method, **dict.fromkeys(shared, PERSONAL.value))
    return dataclasses.replace(plan, method=method)


class SiteTraining(Protocol):
    """What a local model needs of its site's trainer."""

    site: str
    method: Method
    task: Task

    def load(self, shared: Arrays, personal: Mapping[str, torch.Tensor]) -> None:
        """Copy values into the model; parameters in neither get their initial values."""

    def values(self, role: Role, method: Method | None = None) -> dict[str, torch.Tensor]:
        """Copies of the parameters with a role."""
        ...


class LocalModel:
    """The model that a site trains alone, by the steps of the same requests."""

    def __init__(self, trainer: SiteTraining, take_steps: Callable[..., TrainOutcome]) -> None:
        """``take_steps`` trains by (request, state, callback, method). Raises DataError without validation rows."""
        self.trainer, self.take_steps, self.method = trainer, take_steps, local_method(trainer.method)
        require_validation_rows(trainer.task.validation.examples, trainer.site, "train.fallback compares two models")

    def train(
        self, request: TrainRequest, state: PersonalState | None, on_step: StepCallback | None
    ) -> PersonalState | None:
        """Return the model's state after the steps of this request.

        A model that diverges stays as it was, so that it never ends the site's part in a round. A site that joins after
        the last round has none: the comparison would not be fair.
        """
        if state is None and request.kind == "finalize":
            return None
        before = state or PersonalState()
        trained = self.take_steps(dataclasses.replace(request, shared={}), before, on_step, self.method)
        values = self.trainer.values(PERSONAL, self.method)
        try:
            check_trained(trained, values, self.trainer.site)
        except RefusedError as error:
            logger.warning("The model of train.fallback was not trained in round %d: %s", request.round, error)
            return before
        return PersonalState(
            request.round,
            position=before.position + trained.examples,
            tensors=values,
            optimizer_state=trained.optimizer_state,
        )

    def better_of_both(self, request: TrainRequest, state: PersonalState) -> tuple[PersonalState, dict[str, float]]:
        """Return the state with the collaborative or the local model, whichever it keeps, and the comparison."""
        local, losses = state.local, []
        if local is None:
            return state, {}
        for shared, tensors in ((request.shared, state.tensors), ({}, local.tensors)):
            self.trainer.load(shared, tensors)
            losses.append(row_losses(self.trainer.task, self.trainer.task.validation.examples))
        comparison = compare(*losses)
        state = dataclasses.replace(state, local=None)
        if comparison.keeps_local:
            state = dataclasses.replace(state, tensors=local.tensors, optimizer_state={}, is_local=True)
        return state, comparison.metrics
