"""Sites of a simulation that train in one batch. Each handles its own request; only the steps are taken together."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ..client.training.trainer import Trainer
from ..common.adapters.stacked import NotStackable
from ..common.protocol.types import TrainReply, TrainRequest
from ..common.training.loop import StepCallback, TrainOutcome, train
from ..common.training.stacked_loop import SiteTraining, check_stackable, compare_loss, compare_outputs, train_together
from .rendezvous import Rendezvous


class Cohort(Rendezvous):
    """Handles the requests of several sites side by side. Sites that cannot be stacked train one after the other, and
    so do differentially private rounds, whose batches hold copies for single examples already.

    A cohort runs again as a whole until the reply of every member is on disk, since the rounding of a result depends on
    who else is in the batch. So a run that was killed continues with equal bits.
    """

    def __init__(self, notify: Callable[[str], None] = lambda text: None) -> None:
        """``notify`` receives each reason why sites do not train together, once."""
        super().__init__()
        self._notify = notify
        self._told: set[str] = set()
        self._stackable: dict[object, str] = {}  # by kind of model: why not, or an empty text

    def handle(self, trainer: Trainer, request: TrainRequest, on_step: StepCallback | None) -> TrainReply:
        """Handle a request as a member. Returns the stored reply if there is one."""
        stored = trainer.store.reply(request.round, request.key)
        all_stored = self.together(_all, stored is not None)
        if stored is not None and all_stored:
            return stored
        trainer.take_steps = partial(self._take_steps, trainer)
        return trainer.handle(request, on_step, again=stored is not None)

    def _take_steps(self, trainer: Trainer, *arguments: Any) -> TrainOutcome:
        """Do what ``loop.train`` does with these arguments, together with the other members that are about to train."""
        parameters, began = trainer.parameters, time.perf_counter()
        values = {key: parameter.detach().clone() for key, parameter in parameters.items()}
        site = SiteTraining(*arguments, parameters=parameters, values=values)
        outcome, seconds = self.together(self._train, (trainer, site))
        trainer.model.select(trainer.private)
        site.load()
        trainer.waited += time.perf_counter() - began - seconds
        return outcome

    def _train(self, members: list[tuple[Trainer, SiteTraining]]) -> list[tuple[TrainOutcome, float]]:
        """Train the members, those of one kind together. Returns each one's outcome and its share of the seconds."""
        kinds: dict[object, list[int]] = {}
        for i, (_, site) in enumerate(members):
            kinds.setdefault(site.kind, []).append(i)
        results: dict[int, tuple[TrainOutcome, float]] = {}
        for chosen in kinds.values():
            began = time.perf_counter()
            outcomes = self._train_kind([members[i] for i in chosen])
            share = (time.perf_counter() - began) / len(chosen)
            results |= {i: (outcome, share) for i, outcome in zip(chosen, outcomes, strict=True)}
        return [results[i] for i in range(len(members))]

    def _train_kind(self, members: list[tuple[Trainer, SiteTraining]]) -> list[TrainOutcome]:
        """Train members of one kind in one batch, in two halves where it does not fit, or one after the other."""
        sites = [site for _, site in members]
        if len(members) == 1 or not sites[0].phases:
            return [_alone(trainer, site) for trainer, site in members]
        trainer = members[0][0]
        trainer.model.select(trainer.private)
        try:
            self._check(sites)
            return train_together(sites)
        except NotStackable as error:
            self._tell(f"Sites train one after the other: {error}.")
            return [_alone(trainer, site) for trainer, site in members]
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)
        half = (len(members) + 1) // 2
        self._tell(f"The batches of {len(members)} sites do not fit into memory. Smaller ones are used.")
        return self._train_kind(members[:half]) + self._train_kind(members[half:])

    def _check(self, sites: list[SiteTraining]) -> None:
        """Check once for each kind of model whether it can be stacked. Raises NotStackable."""
        check_stackable(sites[0])
        kind = sites[0].model_kind
        if kind not in self._stackable:
            try:
                compare_outputs(sites, [site.task.train.examples[: site.rows] for site in sites])
                compare_loss(sites[0])
                self._stackable[kind] = ""
            except NotStackable as error:
                self._stackable[kind] = str(error)
        if reason := self._stackable[kind]:
            raise NotStackable(reason)

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._notify(text)


def _alone(trainer: Trainer, site: SiteTraining) -> TrainOutcome:
    """Train one site as the local engine does."""
    trainer.model.select(trainer.private)
    site.load()
    outcome = train(site.task, site.trainable, site.phases, site.settings, site.cursor, site.callback)
    site.values = {key: parameter.detach().clone() for key, parameter in site.parameters.items()}
    return outcome


def _all(stored: list[bool]) -> list[bool]:
    return [all(stored)] * len(stored)
