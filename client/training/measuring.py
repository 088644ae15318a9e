"""What a site measures: the base, the shared and the personal model on test rows, and the loss on validation rows."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from typing import Protocol

import torch

from ...common.config.schema import Plan
from ...common.errors import RefusedError
from ...common.methods import PERSONAL, Method
from ...common.protocol.types import VALIDATION_LOSS, Arrays, TrainRequest
from ...common.tasks.base import Task
from .evaluation import evaluate
from .state_store import PersonalState, StateStore
from .validation_rows import row_losses


class MeasuredSite(Protocol):
    """What measuring needs of a site's trainer."""

    site: str
    trains: bool
    plan: Plan
    method: Method
    task: Task
    store: StateStore

    def load(self, shared: Arrays, personal: Mapping[str, torch.Tensor]) -> None:
        """Copy values into the model; parameters in neither get their initial values."""


class Measurer:
    """Measures the models of a trainer's site. ``seconds`` is the time that this took for the request in progress."""

    base_metrics: Mapping[str, float] | None = None  # those of the base model, where they are known
    seconds = 0.0

    def __init__(self, trainer: MeasuredSite) -> None:
        self.trainer = trainer

    def arrival(self, request: TrainRequest, state: PersonalState) -> tuple[PersonalState, dict[str, float]]:
        """Evaluate the base model (once), the shared adapter from round 2, and the personal model from its first state.

        Returns the state with the metrics of the base model in it, and all metrics by name.
        """
        if not request.evaluate:
            return state, {}
        generate = not self.trainer.plan.evaluation.generate_at_end_only
        state = self._with_base_metrics(state)
        metrics = _prefixed("base", state.base or {})
        if request.round > 1 and self._has_shared_model:
            metrics |= _prefixed("shared", self._measure(request.shared, {}, generate=generate))
        if state.round > 0:
            personal = self._measure(request.shared, state.tensors, generate=generate, own_head=True)
            metrics |= _prefixed("personal", personal)
        return state, metrics

    def end(self, request: TrainRequest, state: PersonalState) -> tuple[PersonalState, dict[str, float]]:
        """Evaluate the shared and the finished personal model, and keep the personal model's score on each row.

        Returns the state with these scores and the metrics of the base model in it, and all metrics by name.
        """
        state = self._with_base_metrics(state)
        metrics = _prefixed("base", state.base or {})
        has_model = state.position or self.trainer.plan.probes_head  # a site that never trained has none of its own
        if self.trainer.trains and has_model:
            shared = {} if state.is_local else request.shared
            metrics |= _prefixed("personal", self._measure(shared, state.tensors, generate=True, own_head=True))
            state = dataclasses.replace(state, row_scores=tuple(self.trainer.task.row_scores))
        if self._has_shared_model:
            metrics |= _prefixed("shared", self._measure(request.shared, {}, generate=True))
        return state, metrics

    @property
    def _has_shared_model(self) -> bool:
        """Whether base model and shared adapter make a model of their own; with cores that start at 0 they do not."""
        return self.trainer.method.shares and self.trainer.plan.adapter.init != "spectral"

    def _with_base_metrics(self, state: PersonalState) -> PersonalState:
        """Evaluate the base model once per site. An adapter at its initial values does not change the base model."""
        if state.base is not None:
            return state
        return dataclasses.replace(state, base=self.base_metrics or self._measure({}, {}, generate=True))

    def _measure(
        self, shared: Arrays, personal: Mapping[str, torch.Tensor], *, generate: bool, own_head: bool = False
    ) -> dict[str, float]:
        """Metrics of the model with these values. Without ``own_head``, a head is fitted to the training rows."""
        began = time.perf_counter()
        self.trainer.load(shared, personal)
        probes = not own_head and (self.trainer.method.head is PERSONAL or not shared)
        metrics = evaluate(self.trainer.task, generate=generate, probes=probes)
        self.seconds += time.perf_counter() - began
        return metrics

    def validation(self, request: TrainRequest) -> dict[str, float]:
        """The personal model's mean loss on the validation rows. Nothing is stored.

        Raises RefusedError if the site has no state of the admitted round.
        """
        began, site = time.perf_counter(), self.trainer
        state = site.store.state(request.admitted_round)
        if state is None or not state.round:
            expected = f"a state of round {request.admitted_round}"
            raise RefusedError("admitted_round", expected, "none", site=site.site)
        site.load(request.shared, state.tensors)
        losses = row_losses(site.task, site.task.validation.examples)
        self.seconds += time.perf_counter() - began
        return {VALIDATION_LOSS: statistics.mean(losses)}


def _prefixed(mode: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{mode}.{name}": value for name, value in metrics.items()}
