"""The trainer process's base model, and the site's trainer for the current plan."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable
from pathlib import Path

import torch

from ...common.adapters.inject import detach
from ...common.config.schema import ModelSettings, Plan, parse
from ...common.config.site_schema import SiteSettings
from ...common.dataset import TASKS, SiteDataset
from ...common.errors import ConfigError, ModelError, RefusedError
from ...common.models.base_model import BaseModel, load_base_model
from ...common.models.precision import resolve_device
from ...common.protocol.limits import check_values
from ...common.protocol.types import Arrays, SiteInfo, SumReply, SumRequest, TrainReply, TrainRequest
from ...common.secure_aggregation.identity import read_identity
from ...common.training.loop import StepCallback
from ...transfer.preparation import TransferArtifacts
from ..artifacts.transfer import is_prepared, rows_on_new_base
from ..data.row_schema import tell
from ..data.selection import load_site_rows
from ..data.unknown_tokens import tell_unknown
from ..training.adapted_model import attach_adapters
from ..training.private_rounds import without_metrics
from ..training.secure_rounds import SecureRounds, check_still_secure, without_update
from ..training.state_store import StateStore
from ..training.trainer import Trainer
from .lower_bounds import check_lower_bounds
from .plan_bounds import check_bounds, check_disk, check_request
from .policy import check_allowed, check_epochs
from .release import ReleasedReply, SiteSize, release
from .request_ledger import check_requests_of_day, may_send_metrics
from .site_report import report_rows
from .site_secret import site_secret
from .time_limit import TimeLimit


class TrainerSession:
    """Holds the trainer of one plan at a time. A new plan removes the adapter and attaches its own.

    The base model is loaded again only when ``plan.model`` changes. All methods except ``accept`` must be called
    from one thread.
    """

    def __init__(self, site: SiteSettings) -> None:
        self.site = site
        self._base: tuple[ModelSettings, BaseModel] | None = None
        self._current: tuple[Plan, Trainer] | None = None

    def start(self) -> None:
        """Set the number of threads and check the device. Raises ConfigError when the device does not exist."""
        if self.site.trainer.threads:
            torch.set_num_threads(self.site.trainer.threads)
        try:
            resolve_device(self.site.trainer.device)
        except ModelError as error:
            raise ConfigError(
                "trainer.device",
                error.expected,
                error.found,
                site=self.site.name,
                message=f"trainer.device: this machine has no device {error.found}.",
                hint="Use auto, cpu, cuda or cuda:N.",
            ) from None

    def accept(self, federation: str, text: str) -> Plan:
        """Parse and check the plan of a message, and apply the site's own settings. Uses neither disk nor model.

        ``text`` is the plan as JSON. The federation becomes a folder name, so it must be the plan's name, whose form
        the settings check. Raises ConfigError or RefusedError.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError):
            raw = None
        if not isinstance(raw, dict):
            raise RefusedError("plan", "one JSON object", "something else", site=self.site.name)
        plan = parse(Plan, raw)
        if federation != plan.name:
            raise RefusedError("federation", plan.name, federation[:80], site=self.site.name)
        check_bounds(plan, self.site)
        check_allowed(plan, federation, self.site)
        check_lower_bounds(plan, self.site)
        return self._with_site_settings(plan)

    def _with_site_settings(self, plan: Plan) -> Plan:
        """Return the plan with the device, precision, memory settings and private adapter that the site chose."""
        own = self.site.trainer
        checkpointing = own.gradient_checkpointing
        return dataclasses.replace(
            plan,
            model=dataclasses.replace(plan.model, device=own.device, precision=own.precision or plan.model.precision),
            private=self.site.private or plan.private,
            train=dataclasses.replace(
                plan.train,
                micro_batch=own.micro_batch or plan.train.micro_batch,
                gradient_checkpointing=plan.train.gradient_checkpointing if checkpointing is None else checkpointing,
            ),
        )

    def folder(self, plan: Plan) -> Path:
        """Return the site's state folder for the plan's federation."""
        return Path(self.site.trainer.state) / plan.name

    def trainer(self, plan: Plan) -> Trainer:
        """Return the trainer for ``plan``. Building it for a new plan takes seconds to minutes."""
        if self._current is None or self._current[0] != plan:
            self._current = None  # frees the old model before the new one is built
            gc.collect()
            with TimeLimit(self.site.allow.max_seconds, self.site.name):  # a transfer trains here
                rows, trains, artifacts = self._rows(plan)
            secret = site_secret(Path(self.site.trainer.state)) if self.site.trainer.seeds == "secret" else None
            store = StateStore(self.folder(plan), plan.name, secret)
            model = attach_adapters(self._base_of(plan.model), plan, self.site.allow.max_rank)
            trainer = Trainer(model, rows, store, trains=trains, artifacts=artifacts)
            if trainer.private_rounds:
                trainer.private_rounds.max_epsilon = self.site.allow.max_epsilon
            self._current = plan, trainer
            tell_unknown(rows, model.base.tokenizer, plan.model.source)
        trainer = self._current[1]
        if trainer.trains:
            check_epochs(plan, self.site, trainer.examples)
            check_lower_bounds(plan, self.site, trainer.examples)
        return trainer

    def site_info(self, plan: Plan) -> SiteInfo:
        """Return what the site tells the coordinator when it joins."""
        self._check_noise(plan)
        check_still_secure(plan, self.folder(plan), self.site.name)
        if plan.privacy.secure_aggregation:
            self._secure_rounds(plan)
        return self.trainer(plan).site_info()

    def received(self, plan: Plan, number: int) -> Arrays:
        """Return the shared adapter that the site received in a round, which a difference of this plan is applied to.

        Raises RefusedError for a plan without differences.
        """
        if plan.communication.broadcast_bits is None:
            raise RefusedError("communication.broadcast_bits", "a number of bits", "none", site=self.site.name)
        check_values({"round": number}, self.site.name)
        return self.trainer(plan).received(number)

    def _check_noise(self, plan: Plan) -> None:
        """Raise ConfigError where the coordinator would know the noise of differential privacy."""
        if plan.privacy.enabled and self.site.trainer.seeds != "secret":
            message = 'trainer.seeds = "recipe" is not possible with [privacy]: the coordinator would know the noise.'
            hint = 'Set trainer.seeds = "secret" in the site file.'
            raise ConfigError("trainer.seeds", "secret", "recipe", site=self.site.name, message=message, hint=hint)

    def examples(self, plan: Plan) -> int | None:
        """Return the number of training examples for ``plan``; None if its trainer has not been built."""
        current = self._current
        return current[1].examples if current and current[0] == plan else None

    def answer(
        self, plan: Plan, request: TrainRequest, on_step: StepCallback, on_begin: Callable[[], None] = lambda: None
    ) -> tuple[TrainReply, bool]:
        """Return the reply to a request, and whether it had been stored before.

        ``on_begin`` is called before the work on a new request that the site accepts.
        """
        check_request(plan, request, self.site)
        check_still_secure(plan, self.folder(plan), self.site.name)
        if request.kind == "train":  # of the other requests nothing is sent that depends on noise
            self._check_noise(plan)
        trainer = self.trainer(plan)
        if plan.privacy.secure_aggregation:
            self._secure_rounds(plan).prepare(request)
        stored = trainer.store.reply(request.round, request.key)
        if stored:
            return stored, True
        check_disk(self.folder(plan), self.site)
        check_requests_of_day(self.site, request.key)
        on_begin()
        with TimeLimit(self.site.allow.max_seconds, self.site.name) as limit:

            def count(done: int, total: int) -> None:
                on_step(done, total)
                limit.on_step(done, total)

            return trainer.handle(request, count), False

    def sum(self, plan: Plan, request: SumRequest) -> SumReply:
        """Take a step of a secure sum."""
        if not plan.privacy.secure_aggregation:
            raise RefusedError("privacy.secure_aggregation", "true", "false", site=self.site.name)
        return self._secure_rounds(plan).answer(request)

    def _secure_rounds(self, plan: Plan) -> SecureRounds:
        """Return the site's part in the secure sums of a plan.

        Its keys derive from the site's secret also where its other random numbers derive from the recipe. Raises
        ConfigError without a key or a roster, and StateError.
        """
        own = self.site.trainer
        identity = read_identity(self.site.name, Path(own.aggregation_key), Path(own.roster))
        secret = site_secret(Path(own.state))
        return SecureRounds(plan, identity, secret, StateStore(self.folder(plan), plan.name))

    def released(self, plan: Plan, request: TrainRequest, reply: TrainReply) -> ReleasedReply:
        """Return the reply with what may leave the site: with secure aggregation, nothing of the update."""
        released = self._released(plan, request, without_update(reply) if plan.privacy.secure_aggregation else reply)
        withheld = tuple(sorted(set(reply.metrics) - set(released.reply.metrics)))
        return dataclasses.replace(released, withheld=withheld)

    def _released(self, plan: Plan, request: TrainRequest, reply: TrainReply) -> ReleasedReply:
        if plan.privacy.enabled:
            return ReleasedReply(without_metrics(reply))
        rule, task = self.site.allow.metrics, self.trainer(plan).task
        size = SiteSize(len(task.train.examples), len(task.test.examples))
        asks = bool(reply.metrics) and rule != "none"
        place = f"validation after {request.round - 1}" if request.kind == "validate" else str(request.round)
        evaluates = not asks or may_send_metrics(self.site, self.folder(plan), place, request.key)
        return release(reply, rule, size, evaluates=evaluates)

    def _rows(self, plan: Plan) -> tuple[SiteDataset, bool, TransferArtifacts | None]:
        """Return the rows, whether the site trains on them, and its artifacts for the next transfer.

        The rows are the site's own, or generated ones in a federation that was transferred to another base model. A
        site without artifacts for the transfer follows its ``on_unprepared``: ``retrain`` trains on its own rows,
        ``evaluate`` only measures the final adapter on them, and ``wait`` raises an error.
        """
        if plan.transfer.source_federation is not None:
            old = Path(self.site.trainer.state) / plan.transfer.source_federation
            if self.site.on_unprepared == "wait" or is_prepared(old):
                self._base = None  # frees the memory for the base models that the transfer loads
                gc.collect()
                rows, artifacts = rows_on_new_base(plan, old, self.folder(plan) / "transfer")
                return rows, True, artifacts
            return self._own_rows(plan), self.site.on_unprepared == "retrain", None
        return self._own_rows(plan), True, None

    def _own_rows(self, plan: Plan) -> SiteDataset:
        rows = load_site_rows(self.site, plan.seed)
        tell([rows])
        report_rows(rows)
        return rows

    def _base_of(self, settings: ModelSettings) -> BaseModel:
        if self._base is None or self._base[0] != settings:
            self._base = None
            gc.collect()
            self._base = settings, load_base_model(settings, generates=TASKS[self.site.data.task].needs_causal_lm)
        base = self._base[1]
        detach(base.backbone)
        return base
