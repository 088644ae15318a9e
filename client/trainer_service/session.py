"""The base model for the life of the trainer process, and the site's trainer on it, by the plan at hand."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from pathlib import Path

import torch

from ...common.adapters.inject import detach
from ...common.config.schema import ModelSettings, Plan, parse
from ...common.config.site_schema import SiteSettings
from ...common.dataset import TASKS, SiteDataset
from ...common.errors import ConfigError, ModelError, RefusedError
from ...common.models.base_model import BaseModel, load_base_model
from ...common.models.precision import resolve_device
from ...common.protocol.types import TrainReply, TrainRequest
from ...common.training.loop import StepCallback
from ...transfer.preparation import TransferArtifacts
from ..artifacts.transfer import is_prepared, rows_on_new_base
from ..data.selection import load_site_rows
from ..training.adapted_model import attach_adapters
from ..training.state_store import StateStore
from ..training.trainer import Trainer
from .policy import check_allowed


class TrainerSession:
    """One plan at a time: another plan takes the adapter off and puts its own on.

    The base model is read again only when ``plan.model`` is another. All calls but :meth:`accept` come from one thread.
    """

    def __init__(self, site: SiteSettings) -> None:
        self.site = site
        self._base: tuple[ModelSettings, BaseModel] | None = None
        self._current: tuple[Plan, Trainer] | None = None

    def start(self) -> None:
        """Threads and device as the site file says. Raises ConfigError when there is no such device."""
        if self.site.trainer.threads:
            torch.set_num_threads(self.site.trainer.threads)
        try:
            resolve_device(self.site.trainer.device)
        except ModelError as error:
            raise ConfigError("trainer.device", error.expected, error.found, site=self.site.name) from None

    def accept(self, federation: str, text: str) -> Plan:
        """The plan of a message, if the site allows it, on the site's own device. Touches neither disk nor model.

        The federation's name becomes a folder's: it must be the plan's, whose form the settings check.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError):
            raw = None
        if not isinstance(raw, dict):
            raise RefusedError("plan", "settings as one JSON object", "something else", site=self.site.name)
        plan = parse(Plan, raw)
        if federation != plan.name:
            raise RefusedError("federation", plan.name, federation[:80], site=self.site.name)
        check_allowed(plan, federation, self.site)
        return self._of_this_site(plan)

    def _of_this_site(self, plan: Plan) -> Plan:
        """The plan on this site's device, in the precision and with the private adapter that the site chose."""
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
        """Where the site keeps what belongs to one federation."""
        return Path(self.site.trainer.state) / plan.name

    def trainer(self, plan: Plan) -> Trainer:
        """The site's trainer by ``plan``, which takes seconds to minutes where the plan is a new one."""
        if self._current is None or self._current[0] != plan:
            self._current = None  # and the old bench goes before the new one comes
            gc.collect()
            rows, learns, prepared = self._rows(plan)
            bench, store = attach_adapters(self._base_of(plan.model), plan), StateStore(self.folder(plan), plan.name)
            self._current = plan, Trainer(bench, rows, store, trains=learns, artifacts=prepared)
        return self._current[1]

    def answer(self, plan: Plan, order: TrainRequest, watch: StepCallback) -> tuple[TrainReply, bool]:
        """The reply to an order, and whether it was stored before."""
        trainer = self.trainer(plan)
        stored = trainer.store.reply(order.round, order.key)
        return (stored, True) if stored else (trainer.handle(order, self._limited(watch)), False)

    def _rows(self, plan: Plan) -> tuple[SiteDataset, bool, TransferArtifacts | None]:
        """The site's own, or written ones in a federation that moved to another base model; whether it learns;
        and what it kept for the next move.

        Where it kept nothing to write by, it does as its file says: it learns anew from its own rows (``afresh``),
        tells only at the close what the adapter is worth on them (``evaluate``), or stays away by an error (``wait``).
        """
        if plan.transfer.of is not None:
            old = Path(self.site.trainer.state) / plan.transfer.of
            if self.site.on_unprepared == "wait" or is_prepared(old):
                self._base = None  # two base models need not be in memory
                gc.collect()
                rows, prepared = rows_on_new_base(plan, old, self.folder(plan) / "transfer")
                return rows, True, prepared
            return load_site_rows(self.site, plan.seed), self.site.on_unprepared == "retrain", None
        return load_site_rows(self.site, plan.seed), True, None

    def _base_of(self, settings: ModelSettings) -> BaseModel:
        if self._base is None or self._base[0] != settings:
            self._base = None
            gc.collect()
            self._base = settings, load_base_model(settings, generates=TASKS[self.site.data.task].needs_causal_lm)
        base = self._base[1]
        detach(base.backbone)
        return base

    def _limited(self, watch: StepCallback) -> StepCallback:
        """``watch`` that ends a training which takes longer than the site allows."""
        limit, began = self.site.allow.max_seconds, time.monotonic()

        def limited(done: int, total: int) -> None:
            nonlocal began
            began = began if done else time.monotonic()
            watch(done, total)
            if limit is not None and time.monotonic() - began > limit:
                found = f"more after {done} of {total} steps"
                raise RefusedError("allow.max_seconds", f"at most {limit:g} s", found, site=self.site.name)

        return limited
