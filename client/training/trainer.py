"""One round at a site: evaluate what arrived, train, store the state, and reply with the shared groups only."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...common.adapters.fit import check_layers
from ...common.adapters.initialization import initial_values
from ...common.adapters.inject import ADAPTER, activate, layout_of
from ...common.config.privacy_rules import check_privacy
from ...common.config.schema import Plan, PrivateSettings, to_json
from ...common.dataset import SiteDataset
from ...common.errors import RefusedError
from ...common.methods import PERSONAL, SHARED, Method, Role, group_of
from ...common.models.saved import ModelMetadata
from ...common.protocol.types import (
    BENEFIT,
    EPSILON,
    OVERFLOWS,
    PRELIMINARY,
    PROTOCOL,
    Arrays,
    SiteInfo,
    TrainReply,
    TrainRequest,
    check_arrays,
    check_metrics,
    hash_labels,
    hash_layout,
)
from ...common.seeds import seed_from
from ...common.tasks import build_task
from ...common.tasks.base import Task
from ...common.training.loop import StepCallback, TrainCursor, TrainOutcome, train
from ...transfer.preparation import TransferArtifacts, check_preparation, prepare
from .adapted_model import AdaptedModel
from .benefit import PersonalFit, benefit_ratio, cross_fitted_loss
from .error_feedback import Feedback, quantized_update
from .fallback import LocalModel, local_plan
from .label_list import with_pinned_labels
from .measuring import Measurer
from .private_rounds import private_rounds
from .schedule import phases
from .soundness import check_trained
from .spectral import power_step
from .state_store import PersonalState, StateStore, check_own_choices
from .update_pipeline import UpdateContext, process_update
from .validation_rows import require_validation_rows


class Trainer:
    """One site: its rows, its task and its personal state, on a model that it may share with other sites.

    Every call loads all parameter groups first, so the model holds nothing of a site between calls. With ``trains``
    false a site only evaluates, with heads fitted to its training rows where heads are personal. ``artifacts`` are what
    a later transfer needs; they are written into the site's states.
    """

    _base_loss: float | None = None  # the base model's part of the benefit ratio, once it is measured

    def __init__(
        self,
        model: AdaptedModel,
        rows: SiteDataset,
        store: StateStore,
        private: PrivateSettings | None = None,
        *,
        trains: bool = True,
        artifacts: TransferArtifacts | None = None,
    ) -> None:
        rows = with_pinned_labels(rows, store.labels())
        self.site, self.model, self.store, self.trains, self.transfer_artifacts = (
            rows.site,
            model,
            store,
            trains,
            artifacts,
        )
        self.plan: Plan = dataclasses.replace(model.plan, private=private) if private else model.plan
        check_privacy(self.plan)
        self.method: Method = self.plan.row()
        self.task: Task = build_task(rows, model.base, self.plan)
        self.private = model.private_adapter(self.plan.private)
        self.parameters: dict[str, nn.Parameter] = {**model.adapter, **self.private.parameters, **self.task.head}
        check_layers(self.plan, rows.task, self.parameters)
        fallback = trains and self.plan.train.fallback is not None and self.method.shares
        self.local = LocalModel(self, self._train) if fallback else None
        self.take_steps: Callable[..., TrainOutcome] | None = None  # in place of ``train``, with its arguments
        self.waited = 0.0  # seconds of the request in progress that went into the work of other sites
        self.measurer = Measurer(self)
        layout = layout_of(self.parameters)
        self.layout = model.layout_of_messages(self.method.having(layout, SHARED))
        self.site_seed = seed_from(store.secret or self.plan.seed, self.plan.name, self.site)
        self.private_rounds = private_rounds(self.plan, self.task, store) if trains else None
        heads = {key: layout[key] for key in self.task.head}
        head_seed = seed_from(self.site_seed, "head") if self.method.head is PERSONAL else self.plan.seed
        self.initial = {**model.initial, **initial_values(heads, self.plan.adapter, head_seed)}
        private_layout = {key: layout[key] for key in self.private.parameters}
        self.initial |= initial_values(private_layout, self.plan.adapter, seed_from(self.site_seed, "private"))

    @property
    def examples(self) -> int:
        """Number of the site's training examples."""
        return len(self.task.train.examples)

    def site_info(self) -> SiteInfo:
        """Describe the site to the coordinator.

        Raises DataError without validation rows that the plan needs, and the errors that would make a transfer
        preparation fail.
        """
        fingerprint, task = self.model.base.fingerprint, self.task
        if self.plan.transfer.prepare:
            check_preparation(self.plan, task.rows, self.transfer_artifacts)
        if self.trains and self.plan.evaluation.validation_loss:
            require_validation_rows(task.validation.examples, self.site)
        if self.private_rounds:
            self.private_rounds.check_start(self.parameters)
        return SiteInfo(
            site=self.site,
            protocol=PROTOCOL,
            model=fingerprint.model,
            tokenizer=fingerprint.tokenizer,
            chat_template=fingerprint.chat_template,
            layout=hash_layout(self.layout),
            task=task.rows.task,
            train=self.examples if self.trains else 0,
            test=len(task.test.examples),
            truncated=0 if self.private_rounds else task.train.truncated + task.test.truncated,
            dropped=0 if self.private_rounds else task.train.dropped + task.test.dropped,
            classes=len(task.rows.labels),
            labels=hash_labels(task.rows.labels) if self.method.head is SHARED else "",
            rank=self.plan.adapter.rank if self.model.smaller else 0,
        )

    def received(self, round_number: int) -> Arrays:
        """The shared adapter that the site received in a round, or S_0 for round 0; nothing if it has none."""
        if round_number == 0:
            return {key: self.initial[key].numpy() for key in self.layout}
        return self.store.received(round_number)

    def handle(self, request: TrainRequest, on_step: StepCallback | None = None, *, again: bool = False) -> TrainReply:
        """Execute a request, or return the stored reply if the same request was executed before.

        ``on_step`` is called during training. With ``again`` a request is executed in any case. Raises RefusedError
        when the request's arrays are not the shared groups of this plan.
        """
        stored = None if again else self.store.reply(request.round, request.key)
        if stored is not None:
            return stored
        if request.federation != self.plan.name:
            raise RefusedError("federation", self.plan.name, request.federation, site=self.site)
        check_arrays(request.shared, self.layout, self.site)
        started, self.measurer.seconds, self.waited = time.perf_counter(), 0.0, 0.0
        if self.private_rounds:
            self.private_rounds.check_request(request)
        if request.kind in PRELIMINARY:
            return self._preliminary(request, started, on_step)
        if request.kind == "validate":
            metrics = self.measurer.validation(request)
            seconds = self._seconds_since(started)
            return self._reply(request, metrics=metrics, seconds=seconds, measuring=self.measurer.seconds)
        stored_state = self.store.state(request.admitted_round)
        state = stored_state or PersonalState()
        check_own_choices(state, self.plan, self.site)
        if state.round == 0:
            state = self._with_probed_head(state, request)
        finalizes = request.kind == "finalize"
        metrics: dict[str, float] = {}
        if not finalizes:
            state, metrics = self.measurer.arrival(request, state)
            metrics |= self._benefit(request)
        trained = self._train(request, state, on_step)
        personal, own = self.values(PERSONAL), self.values(SHARED)
        check_trained(trained, {**personal, **own}, self.site)
        shared, update_metrics = ({}, {}) if finalizes else self._shared_update(request)
        shared, feedback = self._rounded(shared, request, state)
        new = PersonalState(
            request.round,
            state.round,
            state.position + trained.examples,
            personal,
            trained.optimizer_state,
            state.base,
            local=self.local.train(request, state.local, on_step) if self.local else None,
            feedback=feedback,
            noised=self.private_rounds is not None and not finalizes,
        )
        if finalizes:
            new, metrics = self._finalize(request, new, on_step)
        else:
            metrics = {**metrics, **update_metrics, "train.loss": trained.loss}
        if self.private_rounds:
            metrics = {**metrics, EPSILON: self.private_rounds.spent()}
        hides = self.private_rounds is not None and finalizes  # steps without noise: their counts tell of the rows
        if trained.overflows:
            metrics = {**metrics, OVERFLOWS: float(trained.overflows)}
        reply = self._reply(
            request,
            shared=shared,
            terms=0 if hides else trained.terms,
            examples=0 if hides else trained.examples,
            metrics=metrics,
            seconds=self._seconds_since(started),
            measuring=self.measurer.seconds,
            fresh=stored_state is None,
        )
        return self._send(new, reply, request, own)

    def _finalize(
        self, request: TrainRequest, state: PersonalState, on_step: StepCallback | None
    ) -> tuple[PersonalState, dict[str, float]]:
        """Prepare a later transfer, keep one of two models if there are two, and measure it."""
        if self.plan.transfer.prepare:
            self.transfer_artifacts = self._prepare(on_step)
        state, comparison = self.local.better_of_both(request, state) if self.local else (state, {})
        state, metrics = self.measurer.end(request, state)
        return state, metrics | comparison

    def _shared_update(self, request: TrainRequest) -> tuple[Arrays, dict[str, float]]:
        """The trained shared arrays after the steps of the update pipeline, and the pipeline's metrics."""
        trained: Arrays = {key: value.numpy() for key, value in self.values(SHARED).items()}
        trained = self.model.at_shared_rank(trained, request.shared)
        context = UpdateContext(request.round, seed_from(self.site_seed, "update", request.round))
        return process_update(trained, request.shared, self.plan.train, context)

    def _rounded(self, shared: Arrays, request: TrainRequest, state: PersonalState) -> tuple[Arrays, Feedback]:
        """The arrays as the plan's number of bits represents them, and what they lack of the trained ones."""
        bits = self.plan.communication.update_bits
        if not (bits and shared):
            return shared, {}
        bound = self.plan.train.max_update_norm
        return quantized_update(shared, request.shared, state.feedback, bits, bound, self.site)

    def _preliminary(self, request: TrainRequest, started: float, on_step: StepCallback | None) -> TrainReply:
        """The reply to a request before round 1, a function of the request and the site's rows: nothing is stored.

        A linear head is fitted first. Heads that begin at random turn the updates of like sites in unlike directions.
        """
        self.load(request.shared, {})
        self.task.fit_head()
        if request.kind == "trial":
            first = dataclasses.replace(request, round=1, kind="train")
            trained = self._train(first, PersonalState(tensors=self.values(PERSONAL)), on_step)
            arrays, terms, examples = self._shared_update(first)[0], trained.terms, trained.examples
        else:
            arrays, terms = power_step(self.task, self.model.base.backbone, request.shared)
            examples = len(self.task.train.examples)
        check_arrays(arrays, self.layout, self.site)
        seconds = self._seconds_since(started)
        return self._reply(request, shared=arrays, terms=terms, examples=examples, seconds=seconds)

    def _seconds_since(self, started: float) -> float:
        return time.perf_counter() - started - self.waited

    def _reply(
        self, request: TrainRequest, *, shared: Arrays | None = None, terms: int = 0, examples: int = 0, **more: Any
    ) -> TrainReply:
        return TrainReply(
            self.site, request.federation, request.round, request.key, shared or {}, terms, examples, **more
        )

    def _benefit(self, request: TrainRequest) -> dict[str, float]:
        """The benefit ratio of the adapter that arrived, if the plan asks for it."""
        if not (self.plan.train.report_benefit and self.trains and self.method.shares):
            return {}
        if self._base_loss is None:
            self._base_loss = self._cross_fitted_loss({}, ("head",))
        return {BENEFIT: benefit_ratio(self._cross_fitted_loss(request.shared, ("head", "core")), self._base_loss)}

    def _cross_fitted_loss(self, shared: Arrays, groups: tuple[str, ...]) -> float:
        """The loss on one half of the examples with these groups fitted to the other, for both halves."""
        fitted = {key: value for key, value in self.parameters.items() if group_of(key) in groups}
        fit = PersonalFit(fitted, always=bool(shared) and self.plan.adapter.init == "spectral")
        return cross_fitted_loss(self.task, lambda: self.load(shared, {}), fit, self.site_seed)

    def _with_probed_head(self, state: PersonalState, request: TrainRequest) -> PersonalState:
        """The state of a site that has not trained yet, with a head fitted to the features if the plan says so."""
        if not (self.plan.probes_head and self.trains and self.task.train.examples):
            return state
        self.load(request.shared, {})
        if not self.task.fit_head():
            return state
        head = {key: value for key, value in self.values(PERSONAL).items() if key in self.task.head}
        return dataclasses.replace(state, tensors=head)

    def _prepare(self, on_step: StepCallback | None) -> TransferArtifacts:
        """Make the artifacts that a later transfer needs and that do not exist yet, with all adapters switched off."""
        if self.transfer_artifacts and self.transfer_artifacts.satisfies(self.plan.transfer):
            return self.transfer_artifacts
        generator = self.model.generator(self.task.rows.task)
        try:
            return prepare(generator, self.plan, self.task.rows, self.site_seed, self.transfer_artifacts, on_step)
        finally:
            activate(self.model.base.backbone, [name for name in (ADAPTER, self.private.name) if name])

    def _send(
        self, state: PersonalState, reply: TrainReply, request: TrainRequest, trained: Mapping[str, torch.Tensor]
    ) -> TrainReply:
        """Check that the reply holds shared groups and known metrics only, write it to disk, and return it.

        ``trained`` are the shared groups as this site trained them, in its own rank.
        """
        check_arrays(reply.shared, self.layout if reply.shared else {}, self.site)
        check_metrics(reply.metrics, self.site)
        shared: Arrays = {}
        if request.kind == "finalize":
            shared = {} if state.is_local else self.model.at_own_rank(request.shared)
        elif self.model.smaller:
            shared = {key: value.numpy() for key, value in trained.items()}
        if request.kind == "train" and self.plan.communication.broadcast_bits:
            state = dataclasses.replace(state, received=request.shared)
        plan = local_plan(self.plan) if state.is_local else self.plan
        self.store.write(state, reply, self._metadata(reply, plan), shared, self.transfer_artifacts)
        if self.plan.train.keep_states == "newest":
            self.store.prune(request.admitted_round)
        return reply

    def _metadata(self, reply: TrainReply, plan: Plan) -> ModelMetadata:
        task, fingerprint = self.task.rows, self.model.base.fingerprint
        return ModelMetadata(
            federation=reply.federation,
            round=reply.round,
            plan=to_json(plan),
            site=self.site,
            task=task.task,
            labels=task.labels,
            chat=bool(task.train) and "messages" in task.train[0],
            columns=dict(task.columns),
            fingerprint=dataclasses.asdict(fingerprint),
            metrics=dict(reply.metrics),
        )

    def load(self, shared: Arrays, personal: Mapping[str, torch.Tensor]) -> None:
        """Copy shared and personal values into the model. Parameters in neither get their initial values.

        Without personal values this is the model of a site that has not trained yet (evaluation mode ``shared``).
        """
        unknown = [key for key in personal if key not in self.parameters]
        if unknown:
            raise RefusedError(
                "personal state",
                "the parameters of this plan",
                unknown[0],
                site=self.site,
                message=f"The personal state contains {unknown[0]}, which is not a parameter of this plan.",
                hint="Use the state folder of this federation, or a new one.",
            )
        self.model.select(self.private)
        shared = self.model.at_own_rank(shared)
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                value = shared.get(key) if key in shared else personal.get(key, self.initial[key])
                parameter.copy_(torch.as_tensor(value))

    def values(self, role: Role, method: Method | None = None) -> dict[str, torch.Tensor]:
        """Copies of the parameters with this role, on the CPU."""
        chosen = (method or self.method).having(self.parameters, role)
        return {key: value.detach().to("cpu", copy=True) for key, value in chosen.items()}

    def _train(
        self,
        request: TrainRequest,
        state: PersonalState,
        on_step: StepCallback | None,
        method: Method | None = None,
    ) -> TrainOutcome:
        """Train from the request's adapter and this state, with the roles of ``method`` (by default the plan's)."""
        self.load(request.shared, state.tensors)
        method = method or self.method
        settings, examples = self.plan.train, self.examples
        late = request.kind == "finalize" and state.round == 0  # joins after the last round: its schedule begins now
        cursor = TrainCursor(
            step=0 if late else (request.round - 1) * settings.steps_per_round(examples),
            total=settings.final_steps if late else self.plan.total_steps(examples),
            position=state.position,
            seed=self.site_seed,
            noise=seed_from(self.site_seed, "round", request.round),
            moments=state.optimizer_state if settings.persist_optimizer_state else None,
        )
        trainable = method.having(self.parameters, SHARED, PERSONAL)
        planned = phases(self.plan, method, trainable, request.kind, examples=examples, late=late)
        planned = planned if self.trains else []
        take_steps = self.take_steps or train
        if self.private_rounds and request.kind == "train":
            take_steps = self.private_rounds.loop(request, state, trainable).train
        outcome = take_steps(self.task, trainable, planned, settings, cursor, on_step)
        if request.kind == "finalize" and self.trains and self.plan.fits_final_head:
            self.task.fit_head()
        return outcome
