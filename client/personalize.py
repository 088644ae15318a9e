"""``colora client --join-core``: a site that comes when all is trained fits its own groups to the shared adapter.

With CoLoRA those are the cores, r² numbers a layer, and the head; A and B stand still, and nothing leaves the site.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..common.config.schema import Plan, to_json
from ..common.config.site_schema import SiteSettings
from ..common.errors import StateError
from ..common.methods import PERSONAL, group_of
from ..common.models.saved import SavedModel
from ..common.models.sources import check_fingerprint
from ..common.protocol.types import TrainRequest
from ..common.training.loop import StepCallback
from .trainer_service import listener as door
from .trainer_service.session import TrainerSession
from .training.state_store import StateStore


@dataclass(frozen=True)
class PersonalizationResult:
    """What came of it. ``trained`` counts numbers by parameter group."""

    state: Path
    trained: Mapping[str, int]
    steps: int
    seconds: float
    metrics: Mapping[str, float]


def personalize(
    site: SiteSettings, saved: SavedModel, *, steps: int | None = None, watch: StepCallback | None = None
) -> PersonalizationResult:
    """Trains the site's personal groups on a finished shared adapter and writes its state, as a closing round does.

    ``steps`` is by default the recipe's ``train.final_steps``, or, where it has none, the steps of all its rounds.
    Asked again for the same adapter and steps, it finds its work done. Raises RefusedError for a plan that the site
    does not allow, StateError for an adapter that cannot be joined.
    """
    if not saved.plan.method.row().shares:
        raise StateError(str(saved.path), "a method that shares something", saved.plan.method.name)
    train = saved.plan.train
    steps = steps or train.final_steps or saved.plan.rounds * train.steps_per_round
    plan = dataclasses.replace(saved.plan, train=dataclasses.replace(train, final_steps=steps))
    resident = TrainerSession(site)
    resident.start()
    accepted: Plan = resident.accept(plan.name, to_json(plan))
    check_fingerprint(plan.model, saved.metadata.fingerprint)
    with door.exclusive_state_dir(Path(site.trainer.state)):
        store = StateStore(resident.folder(accepted), plan.name)
        _make_room(store, plan.rounds + 1, to_json(accepted), site.name)
        order = TrainRequest(
            plan.name, plan.rounds + 1, "finalize", 0, to_json(plan), dict(saved.shared), evaluate=True
        )
        trainer, began = resident.trainer(accepted), time.monotonic()
        reply, _ = resident.answer(accepted, order, watch or (lambda done, total: None))
    counts: dict[str, int] = {}
    for key, parameter in trainer.method.having(trainer.parameters, PERSONAL).items():
        counts[group_of(key)] = counts.get(group_of(key), 0) + parameter.numel()
    return PersonalizationResult(store.path(order.round), counts, steps, time.monotonic() - began, reply.metrics)


def _make_room(store: StateStore, t: int, plan: str, site: str) -> None:
    """Leaves a join by the same settings as it is, and removes one by others; a participant's states are not touched.

    Raises StateError where the site took part in the federation.
    """
    states = sorted(store.folder.glob("round-*.safetensors"))
    if not states:
        return
    last = store.state(t)
    if last is None or last.previous or len(states) > 1:
        found = f"its states of {len(states)} rounds in {store.folder}"
        raise StateError("--join-core", "a site that took no part in the federation", found, site=site)
    if last.plan != plan:
        store.path(t).unlink()


def print_result(joined: PersonalizationResult, console: Console) -> None:
    """One line each: what was trained, how long, and what it brought."""
    counts = ", ".join(f"{group} {count:,}" for group, count in sorted(joined.trained.items()))
    total = sum(joined.trained.values())
    console.print(
        f"{total:,} numbers trained ({counts}), {joined.steps} steps, {joined.seconds:.1f} s", highlight=False
    )
    for name, value in sorted(joined.metrics.items()):
        console.print(f"  {name} {value:.4g}", highlight=False)
    console.print(f"{joined.state}: for colora export and colora predict", highlight=False, soft_wrap=True)
