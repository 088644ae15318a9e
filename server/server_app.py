"""The ServerApp. CoLoRA from the coordinator's side, as in the paper:

S_0: A Kaiming, B = 0                       (the cores start as the identity, at the sites)
for t = 1 … T:
    send S_{t-1} to the sites of round t
    every site trains A, B and its own core Λ_k, and returns A and B
    S_t = Σ p_k S_k                         (or a step of a server optimiser towards it)
every site refines Λ_k on S_T alone
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ..common.config.loader import recipe_from
from ..common.config.schema import Recipe, to_json
from .reporting.events import EventLog, Listener
from .rounds.checkpoint import Checkpoints, ServerState
from .rounds.run_options import RosterEntry, Run, RunOptions, StopRequested
from .rounds.strategy import AdapterStrategy

RECIPE, ROSTER, FOLDER = "recipe", "roster", "folder"  # keys of Flower's run config


def train_federation(grid: Grid, strategy: AdapterStrategy, checkpoints: Checkpoints) -> ServerState:
    """Runs a federation from its last checkpoint, or from S_0, to its end (or until it is asked to stop)."""
    recipe, last = strategy.recipe, checkpoints.latest()
    if last and last.finalized:
        return last
    if last:
        strategy.events.emit("resumed", round=last.round)
    state = strategy.join(grid, last, lambda classes: _first(recipe, classes))
    for t in range(state.round + 1, recipe.rounds + 1):
        if strategy.options.should_stop():
            raise StopRequested
        state = strategy.retry_until_quorum(
            lambda t=t, s=state: strategy.aggregate_train(t, s, strategy.configure_train(t, s))
        )
        checkpoints.write(state)
    state = strategy.retry_until_quorum(lambda s=state: strategy.aggregate_finalize(s, strategy.configure_finalize(s)))
    checkpoints.write(state)
    return state


def run_federation(
    grid: Grid, run: Run, listener: Listener | None = None, conduct: RunOptions | None = None
) -> ServerState:
    """A federation in its run folder, with its beginning and its end in the events."""
    recipe, folder, began = run.recipe, run.folder, time.monotonic()
    events = EventLog(folder / "events.jsonl", listener)
    about = {"federation": recipe.name, "method": recipe.method.name, "rounds": recipe.rounds}
    sites = [member.site for member in run.roster]
    events.emit("started", **about, model=recipe.model.source, sites=sites, recipe=recipe.identity)
    strategy = AdapterStrategy(recipe, run.roster, events, folder / "spool", conduct)
    state = train_federation(grid, strategy, Checkpoints(folder / "checkpoints", recipe))
    events.emit("finished", seconds=time.monotonic() - began)
    return state


def make_app(listener: Listener | None = None, conduct: RunOptions | None = None) -> ServerApp:
    """A ServerApp that reads recipe, roster and folder from Flower's run config."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        config = context.run_config
        recipe = recipe_from(json.loads(str(config[RECIPE])))
        roster = tuple(RosterEntry(*entry) for entry in json.loads(str(config[ROSTER])))
        run_federation(grid, Run(recipe, roster, Path(str(config[FOLDER]))), listener, conduct)

    return server


def run_config(recipe: Recipe, roster: tuple[RosterEntry, ...], folder: Path) -> dict[str, bool | float | int | str]:
    """What :func:`make_app` reads, in the scalars that Flower's run config takes."""
    members = [[member.site, member.from_round] for member in roster]
    return {RECIPE: to_json(recipe), ROSTER: json.dumps(members), FOLDER: str(folder)}


def _first(recipe: Recipe, classes: int) -> dict[str, np.ndarray]:
    from ..common.adapters.initialization import initial_shared_state  # torch only where S_0 is made

    return initial_shared_state(recipe.plan, classes)


app = ServerApp()
"""What ``colora server`` has Flower run: the federation of the folder that the environment names."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Leads the federation to its end, or to where it was asked to stop; what went wrong is in the events."""
    from .deployment.deployed_run import deployed  # the coordinator's own machine only

    with deployed() as (run, conduct):
        run_federation(grid, run, conduct=conduct)
