"""The ServerApp: CoLoRA at the coordinator, as in the paper.

S_0: A ~ Kaiming, B = 0                  (at the sites, cores Λ_k start as the identity; or a spectral start)
                                         (with server.groups, what follows holds for each group of sites)
for t = 1 … T:                           (or until the loss on the sites' validation rows stops improving)
    send S_{t-1} to the sites of round t
    each site k trains A, B and its core Λ_k, and returns S_k = (A, B)
    S_t = Σ p_k S_k                      (or a server optimizer's step towards it; with secure aggregation the
                                          coordinator gets the sum only)
each site refines Λ_k on S_T, without communication
"""

from __future__ import annotations

import dataclasses
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ..common.config.loader import recipe_from
from ..common.config.schema import Recipe, to_dict, to_json
from ..common.event_log import EventLog, Listener
from ..common.versions import installed_versions
from .rounds import early_stopping, preparation, secure_sums
from .rounds.checkpoint import Checkpoints, ServerState
from .rounds.run_options import RosterEntry, Run, RunOptions, StopRequested
from .rounds.strategy import AdapterStrategy

RECIPE, ROSTER, FOLDER = "recipe", "roster", "folder"  # keys of Flower's run config


def train_federation(grid: Grid, strategy: AdapterStrategy, checkpoints: Checkpoints) -> ServerState:
    """Run a federation from its last checkpoint, or from S_0, to its end.

    Raises StopRequested between rounds, and QuorumError where missing sites are not waited for.
    """
    recipe, last = strategy.recipe, checkpoints.latest()
    if last and last.finalized and early_stopping.is_over(strategy, last):
        return last
    if last:
        strategy.events.emit("resumed", round=last.round, damaged=checkpoints.damaged)
    if last and last.spent and strategy.privacy:
        lost = strategy.privacy.with_lost_rounds(last.spent, last.round, checkpoints.damaged)
        last = dataclasses.replace(last, spent=lost)
    state = strategy.join(grid, last, lambda classes: _initial_state(recipe, classes))
    if preparation.is_needed(strategy) and not last:
        state = preparation.prepare(strategy, state)
        checkpoints.write(state)
    if early_stopping.is_due(strategy, state):  # the coordinator ended between a round and its validation
        state = early_stopping.validate(strategy, state)
        checkpoints.write(state)
    secure = recipe.privacy.secure_aggregation
    aggregate = partial(secure_sums.aggregate, strategy) if secure else strategy.aggregate_train
    while not early_stopping.is_over(strategy, state):
        if strategy.options.should_stop():
            raise StopRequested
        t = state.round + 1
        state = strategy.retry_until_quorum(lambda t=t, s=state: aggregate(t, s, strategy.configure_train(t, s)))
        checkpoints.write(state)
        if early_stopping.is_due(strategy, state):
            state = early_stopping.validate(strategy, state)
            checkpoints.write(state)
    if strategy.budget_is_spent(state):
        strategy.events.emit("budget_spent", round=state.round)
    state = early_stopping.select(strategy, checkpoints, state)
    state = strategy.retry_until_quorum(lambda s=state: strategy.aggregate_finalize(s, strategy.configure_finalize(s)))
    checkpoints.write(state)
    return state


def run_federation(
    grid: Grid, run: Run, listener: Listener | None = None, options: RunOptions | None = None
) -> ServerState:
    """Run a federation in its run folder, and record its start and its end as events."""
    recipe, folder, began = run.recipe, run.folder, time.monotonic()
    events = EventLog(folder / "events.jsonl", listener)
    settings = {"federation": recipe.name, "method": recipe.method.name, "rounds": recipe.rounds}
    sites = [entry.site for entry in run.roster]
    rates = recipe.train.learning_rates
    events.emit(
        "started",
        **settings,
        model=recipe.model.source,
        sites=sites,
        learning_rates=rates,
        recipe=recipe.identity,
        settings=to_dict(recipe),
        versions=installed_versions(),
    )
    strategy = AdapterStrategy(recipe, run.roster, events, folder / "spool", options)
    state = train_federation(grid, strategy, Checkpoints(folder / "checkpoints", recipe))
    events.emit("finished", seconds=time.monotonic() - began)
    return state


def make_app(listener: Listener | None = None, options: RunOptions | None = None) -> ServerApp:
    """Build a ServerApp that reads recipe, roster and run folder from Flower's run config."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        config = context.run_config
        recipe = recipe_from(json.loads(str(config[RECIPE])))
        roster = tuple(RosterEntry(*entry) for entry in json.loads(str(config[ROSTER])))
        run_federation(grid, Run(recipe, roster, Path(str(config[FOLDER]))), listener, options)

    return server


def run_config(recipe: Recipe, roster: tuple[RosterEntry, ...], folder: Path) -> dict[str, bool | float | int | str]:
    """Encode the input of ``make_app``; Flower's run config takes scalars only."""
    entries = [[entry.site, entry.from_round] for entry in roster]
    return {RECIPE: to_json(recipe), ROSTER: json.dumps(entries), FOLDER: str(folder)}


def _initial_state(recipe: Recipe, classes: int) -> dict[str, np.ndarray]:
    from ..common.adapters.initialization import initial_shared_state  # imports torch, which only S_0 needs

    return initial_shared_state(recipe.plan, classes)


app = ServerApp()
"""The ServerApp that ``colora server`` runs. An environment variable names its run folder."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation until it ends or is asked to stop. Errors are recorded as events."""
    from .deployment.deployed_run import deployed  # not needed in a simulation

    with deployed() as (run, options):
        run_federation(grid, run, options=options)
