"""What one round means at a site: measure what arrived, train, store, answer with the shared groups only."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from ...common.adapters.initialization import initial_values
from ...common.adapters.inject import ADAPTER, activate, layout_of
from ...common.config.schema import Plan, PrivateSettings, parse, to_dict, to_json
from ...common.dataset import SiteDataset
from ...common.errors import RefusedError
from ...common.methods import PERSONAL, SHARED, Method, group_of
from ...common.models.saved import ModelMetadata
from ...common.protocol.types import (
    PROTOCOL,
    Arrays,
    SiteInfo,
    TrainReply,
    TrainRequest,
    check_arrays,
    check_metrics,
    hash_layout,
)
from ...common.seeds import seed_from
from ...common.tasks import Task, build_task
from ...common.training.loop import StepCallback, TrainCursor, TrainOutcome, TrainPhase, train
from ...transfer.preparation import TransferArtifacts, check_preparation, prepare
from .adapted_model import AdaptedModel
from .state_store import PersonalState, StateStore


class Trainer:
    """One site: its rows, its task and its personal state, on a bench that it may share with other sites.

    Nothing of the site stays on the bench between calls that matters: every call loads all groups first. A site that
    does not learn measures only, with heads fitted to its training rows where heads are personal. What is ``prepared``
    for a later transfer goes into its states.
    """

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
        self.site, self.model, self.store, self.trains, self.transfer_artifacts = (
            rows.site,
            model,
            store,
            trains,
            artifacts,
        )
        self.plan: Plan = dataclasses.replace(model.plan, private=private) if private else model.plan
        self.method: Method = self.plan.row()
        self.task: Task = build_task(rows, model.base, self.plan)
        self.private = model.private_adapter(self.plan.private)
        self.parameters: dict[str, nn.Parameter] = {**model.adapter, **self.private.parameters, **self.task.head}
        layout = layout_of(self.parameters)
        self.layout = self.method.having(layout, SHARED)
        self.site_seed = seed_from(self.plan.seed, self.plan.name, self.site)
        self.initial = initial_values(layout, self.plan.adapter, self.plan.seed)
        if self.method.head is PERSONAL:
            heads = {key: layout[key] for key in self.task.head}
            self.initial |= initial_values(heads, self.plan.adapter, seed_from(self.site_seed, "head"))
        own = {key: layout[key] for key in self.private.parameters}
        self.initial |= initial_values(own, self.plan.adapter, seed_from(self.site_seed, "private"))

    def site_info(self) -> SiteInfo:
        """What the coordinator needs to know before the first round. Raises what would make a preparation fail."""
        prints, task = self.model.base.fingerprint, self.task
        if self.plan.transfer.prepare:
            check_preparation(self.plan, task.rows, self.transfer_artifacts)
        return SiteInfo(
            site=self.site,
            protocol=PROTOCOL,
            model=prints.model,
            tokenizer=prints.tokenizer,
            chat_template=prints.chat_template,
            layout=hash_layout(self.layout),
            task=task.rows.task,
            train=len(task.train.examples) if self.trains else 0,
            test=len(task.test.examples),
            truncated=task.train.truncated + task.test.truncated,
            dropped=task.train.dropped + task.test.dropped,
            classes=len(task.rows.labels),
        )

    def handle(self, request: TrainRequest, on_step: StepCallback | None = None) -> TrainReply:
        """Answers an order; asked again for the same round it returns the stored reply.

        ``watch`` sees the steps of the training. Raises RefusedError when the order's arrays are not the shared groups
        of this plan.
        """
        stored = self.store.reply(request.round, request.key)
        if stored is not None:
            return stored
        if request.federation != self.plan.name:
            raise RefusedError("federation", self.plan.name, request.federation, site=self.site)
        check_arrays(request.shared, self.layout, self.site)
        started = time.perf_counter()
        found = self.store.state(request.admitted_round)
        state = found or PersonalState()
        self._check_private(state)
        if state.round == 0:
            state = self._with_head(state, request)
        closing = request.kind == "finalize"
        metrics: dict[str, float] = {}
        if not closing:
            state, metrics = self._measure_arrival(request, state)
        trained = self._train(request, state, on_step)
        new = PersonalState(
            request.round,
            state.round,
            state.position + trained.examples,
            self._values(PERSONAL),
            trained.optimizer_state,
            state.base,
        )
        shared = {} if closing else {k: v.numpy() for k, v in self._values(SHARED).items()}
        if closing and self.plan.transfer.prepare:
            self.transfer_artifacts = self._prepare(on_step)
        if closing:
            new, metrics = self._measure_end(request, new)
        reply = TrainReply(
            site=self.site,
            federation=request.federation,
            round=request.round,
            key=request.key,
            shared=shared,
            terms=trained.terms,
            examples=trained.examples,
            metrics=metrics if closing else {**metrics, "train.loss": trained.loss},
            seconds=time.perf_counter() - started,
            fresh=found is None,
        )
        return self._send(new, reply, request)

    def _with_head(self, state: PersonalState, order: TrainRequest) -> PersonalState:
        """A site that has trained nothing yet, with a fitted head of its own where the plan says so."""
        if not (self.plan.probes_head and self.trains and self.task.train.examples):
            return state
        self.load(order.shared, {})
        if not self.task.fit_head():
            return state
        head = {key: value for key, value in self._values(PERSONAL).items() if key in self.task.head}
        return dataclasses.replace(state, tensors=head)

    def _check_private(self, state: PersonalState) -> None:
        """A private adapter goes on as it began."""
        old = parse(Plan, json.loads(state.plan)).private if state.plan else self.plan.private
        if old != self.plan.private:
            wanted = f"{_told(old)}, as in the site's state of round {state.round} (or a new state folder)"
            raise RefusedError("private", wanted, _told(self.plan.private), site=self.site)

    def _prepare(self, watch: StepCallback | None) -> TransferArtifacts:
        """What a later transfer needs, but for what is there, from the model that writes texts without our adapters."""
        if self.transfer_artifacts and self.transfer_artifacts.satisfies(self.plan.transfer):
            return self.transfer_artifacts
        speaker = self.model.generator(self.task.rows.task)
        try:
            return prepare(speaker, self.plan, self.task.rows, self.site_seed, self.transfer_artifacts, watch)
        finally:
            activate(self.model.base.backbone, [name for name in (ADAPTER, self.private.name) if name])

    def _send(self, state: PersonalState, reply: TrainReply, order: TrainRequest) -> TrainReply:
        """The last gate: whatever happened before, only shared groups pass; stored before it is answered."""
        check_arrays(reply.shared, self.layout if reply.shared else {}, self.site)
        check_metrics(reply.metrics, self.site)
        self.store.write(
            state, reply, self._card(reply), order.shared if order.kind == "finalize" else {}, self.transfer_artifacts
        )
        self.store.prune(order.admitted_round)
        return reply

    def _card(self, reply: TrainReply) -> ModelMetadata:
        task, prints = self.task.rows, self.model.base.fingerprint
        return ModelMetadata(
            federation=reply.federation,
            round=reply.round,
            plan=to_json(self.plan),
            site=self.site,
            task=task.task,
            labels=task.labels,
            chat=bool(task.train) and "messages" in task.train[0],
            fingerprint=dataclasses.asdict(prints),
            metrics=dict(reply.metrics),
        )

    def load(self, shared: Arrays, personal: Mapping[str, torch.Tensor]) -> None:
        """Puts shared and personal values into the model; what neither has starts from its initial value.

        With no personal values this is the model of a late site, and what "shared only" means.
        """
        foreign = [key for key in personal if key not in self.parameters]
        if foreign:
            raise RefusedError("personal state", "the parameters of this plan", foreign[0], site=self.site)
        self.model.select(self.private)
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                value = shared.get(key) if key in shared else personal.get(key, self.initial[key])
                parameter.copy_(torch.as_tensor(value))

    def _values(self, role: object) -> dict[str, torch.Tensor]:
        own = {key: value for key, value in self.parameters.items() if self.method.role(key) is role}
        return {key: value.detach().to("cpu", copy=True) for key, value in own.items()}

    def _measure_arrival(self, order: TrainRequest, state: PersonalState) -> tuple[PersonalState, dict[str, float]]:
        """Base once; shared only and personal where there is something to measure yet."""
        if not order.evaluate:
            return state, {}
        generate = not self.plan.evaluation.generate_at_end_only
        state = self._with_base(state)
        metrics = _named("base", state.base or {})
        if order.round > 1 and self.method.shares:
            metrics |= _named("shared", self._measure(order.shared, {}, generate=generate))
        if state.round > 0:
            metrics |= _named("personal", self._measure(order.shared, state.tensors, generate=generate, own_head=True))
        return state, metrics

    def _measure_end(self, order: TrainRequest, state: PersonalState) -> tuple[PersonalState, dict[str, float]]:
        state = self._with_base(state)
        metrics = _named("base", state.base or {})
        if self.trains:
            metrics |= _named("personal", self._measure(order.shared, state.tensors, generate=True, own_head=True))
        if self.method.shares:
            metrics |= _named("shared", self._measure(order.shared, {}, generate=True))
        return state, metrics

    def _with_base(self, state: PersonalState) -> PersonalState:
        """At its initial values the adapter changes nothing: that is the bare base model."""
        if state.base is not None:
            return state
        return dataclasses.replace(state, base=self._measure({}, {}, generate=True))

    def _measure(
        self, shared: Arrays, personal: Mapping[str, torch.Tensor], *, generate: bool, own_head: bool = False
    ) -> dict[str, float]:
        """Metrics of one composition; without a head of its own, a head is fitted to the site's training data."""
        self.load(shared, personal)
        probing = not own_head and (self.method.head is PERSONAL or not shared)
        while True:
            try:
                fitted = self.task.probe() if probing else None
                return self.task.measure(generate=generate) if fitted is None else fitted
            except RuntimeError as error:
                self._measure_less(error)

    def _measure_less(self, error: RuntimeError) -> None:
        """Half the evaluation batch, after an error that says that the device is too small for it."""
        evaluation = self.task.plan.evaluation
        if not should_reduce_batch_size(error) or evaluation.batch_size == 1:
            raise error
        half = dataclasses.replace(evaluation, batch_size=(evaluation.batch_size + 1) // 2)
        self.task.plan = dataclasses.replace(self.task.plan, evaluation=half)
        clear_device_cache(garbage_collection=True)

    def _train(self, order: TrainRequest, state: PersonalState, watch: StepCallback | None) -> TrainOutcome:
        self.load(order.shared, state.tensors)
        settings, per_round = self.plan.train, self.plan.train.steps_per_round
        late = order.kind == "finalize" and state.round == 0  # it comes when all is trained, with a schedule of its own
        stretch = TrainCursor(
            step=0 if late else (order.round - 1) * per_round,
            total=settings.final_steps if late else self.plan.total_steps,
            position=state.position,
            seed=self.site_seed,
            noise=seed_from(self.site_seed, "round", order.round),
            moments=state.optimizer_state if settings.persist_optimizer_state else None,
        )
        live = {k: p for k, p in self.parameters.items() if self.method.role(k) in (SHARED, PERSONAL)}
        planned = phases(self.plan, self.method, live, order.kind, late=late) if self.trains else []
        return train(self.task, live, planned, settings, stretch, watch)


def phases(plan: Plan, row: Method, live: Mapping[str, object], phase: str, *, late: bool = False) -> list[TrainPhase]:
    """The steps of a round: joint, or personal groups and then shared ones; at the close personal groups only.

    A site that comes ``late``, when all is trained, trains all its personal groups then.
    """
    everything, settings = frozenset(live), plan.train
    personal, shared = (frozenset(row.having(live, role)) for role in (PERSONAL, SHARED))
    if phase == "finalize":
        groups = None if late else settings.final_groups
        chosen = personal if groups is None else frozenset(key for key in personal if group_of(key) in groups)
        planned = [TrainPhase(settings.final_steps, chosen)]
    elif settings.schedule == "phases":
        planned = [TrainPhase(p.steps, frozenset(k for k in live if group_of(k) in p.groups)) for p in settings.phase]
    elif settings.schedule == "joint" or not personal or not shared:  # nothing to alternate with: as many steps
        planned = [TrainPhase(settings.steps_per_round, everything)]
    else:
        planned = [TrainPhase(settings.personal_steps, personal), TrainPhase(settings.shared_steps, shared)]
    return [p for p in planned if p.keys and p.steps]


def _told(private: PrivateSettings) -> str:
    return ", ".join(f"{k} {v}" for k, v in to_dict(private).items()) if private.present else "none"


def _named(kind: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{kind}.{name}": value for name, value in metrics.items()}
