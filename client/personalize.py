"""``colora personalize``: fit a new site's personal groups to the shared adapter of a finished federation.

With CoLoRA these are the cores, r² values a layer, and the head. A and B are frozen, and nothing leaves the site.
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
from ..common.models.saved import FILES, SavedModel
from ..common.models.sources import check_fingerprint
from ..common.protocol.types import TrainRequest
from ..common.training.loop import StepCallback
from .trainer_service.listener import exclusive_state_dir
from .trainer_service.session import TrainerSession
from .training.smaller_rank import plan_at_rank
from .training.state_store import StateStore


@dataclass(frozen=True)
class PersonalizationResult:
    """The site's new state, and the metrics on its test data. ``trained`` counts parameters by group."""

    state: Path
    trained: Mapping[str, int]
    steps: int
    seconds: float
    metrics: Mapping[str, float]


def personalize(
    site: SiteSettings,
    saved: SavedModel,
    *,
    steps: int | None = None,
    replace: bool = False,
    on_step: StepCallback | None = None,
) -> PersonalizationResult:
    """Train the site's personal groups on a finished shared adapter and write its state, as the final request does.

    ``steps`` defaults to the recipe's ``train.final_steps`` or, where that is 0, to the steps of all rounds. A repeated
    call with the same adapter and settings returns the stored result; with others it needs ``replace``. Raises
    RefusedError for a plan that the site does not allow, StateError for a method that shares nothing, for another
    stored result and for a site that took part in the federation.
    """
    method = saved.plan.method
    if not method.row().shares:
        raise StateError(
            str(saved.path),
            "a method that shares something",
            method.name,
            message=f"{saved.path}: method {method.name} shares no adapter that a new site could use.",
        )
    # Nothing leaves the site, so its seeds need no secret and a repetition gives the same bits.
    session = TrainerSession(dataclasses.replace(site, trainer=dataclasses.replace(site.trainer, seeds="recipe")))
    session.start()
    train = saved.plan.train
    steps = steps or train.final_steps or _steps_of_all_rounds(session, saved.plan)
    plan = dataclasses.replace(saved.plan, train=dataclasses.replace(train, final_steps=steps))
    accepted: Plan = session.accept(plan.name, to_json(plan))
    check_fingerprint(plan.model, saved.metadata.fingerprint)
    final_round = plan.rounds + 1
    with exclusive_state_dir(Path(site.trainer.state)):
        store = StateStore(session.folder(accepted), plan.name)
        shared = dict(saved.shared)
        request = TrainRequest(plan.name, final_round, "finalize", 0, to_json(plan), shared, evaluate=True)
        own = plan_at_rank(accepted, site.allow.max_rank)
        if other := _other_result(store, request, to_json(own), site.name):
            if not replace:
                raise other
            store.path(final_round).unlink()
        trainer, started = session.trainer(accepted), time.monotonic()
        reply, _ = session.answer(accepted, request, on_step or (lambda done, total: None))
    counts: dict[str, int] = {}
    for key, parameter in trainer.method.having(trainer.parameters, PERSONAL).items():
        counts[group_of(key)] = counts.get(group_of(key), 0) + parameter.numel()
    return PersonalizationResult(store.path(final_round), counts, steps, time.monotonic() - started, reply.metrics)


def _steps_of_all_rounds(session: TrainerSession, plan: Plan) -> int:
    """The steps of a participant with the site's rows, which count only where the plan has epochs."""
    by_epochs = plan.train.by_epochs
    examples = session.trainer(session.accept(plan.name, to_json(plan))).examples if by_epochs else 0
    return plan.rounds * plan.train.steps_per_round(examples)


def _other_result(store: StateStore, request: TrainRequest, plan: str, site: str) -> StateError | None:
    """Return an error if the store holds a result of another adapter or other settings; None if it may be written.

    Raises StateError where the site took part in the federation.
    """
    states = sorted(store.folder.glob(FILES))
    if not states:
        return None
    last = store.state(request.round)
    if last is None or last.previous or len(states) > 1:
        found = f"its states of {len(states)} rounds in {store.folder}"
        raise StateError(
            "colora personalize",
            "a site that took no part in the federation",
            found,
            site=site,
            message=f"colora personalize needs a site that took no part in the federation, but found {found}.",
            hint="A participant's own model is its state after the last round.",
        )
    if last.plan == plan and store.reply(request.round, request.key):
        return None
    path = store.path(request.round)
    return StateError(
        str(path),
        "no result yet, or one of this adapter and these settings",
        "another result",
        site=site,
        message=f"{path} holds a result of another adapter or of other settings.",
        hint="Use --replace to overwrite it, or set trainer.state in the site file to another folder.",
    )


def print_result(result: PersonalizationResult, console: Console) -> None:
    """Print the trained parameters, the time, the metrics and the state file, one a line."""
    counts = ", ".join(f"{group} {count:,}" for group, count in sorted(result.trained.items()))
    total = sum(result.trained.values())
    console.print(
        f"{total:,} parameters trained ({counts}), {result.steps} steps, {result.seconds:.1f} s", highlight=False
    )
    for name, value in sorted(result.metrics.items()):
        console.print(f"  {name} {value:.4g}", highlight=False)
    console.print(f"{result.state}: use it with colora export and colora predict", highlight=False, soft_wrap=True)
