"""``colora simulate``: a recipe becomes a run folder, a federation, a local-only baseline and a table."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from ..client.artifacts.transfer import is_prepared
from ..client.client_app import make_app as make_client_app
from ..common.adapters.initialization import head_layout, initial_shared_state
from ..common.adapters.inject import inject, private_spec
from ..common.atomic_io import write_atomically
from ..common.config.schema import MethodSettings, Recipe, to_dict
from ..common.errors import ConfigError, QuorumError, StateError
from ..common.methods import SHARED
from ..common.models.base_model import skeleton
from ..server.reporting.events import Event
from ..server.reporting.run_folder import RunFolder
from ..server.rounds.run_options import Replay, RosterEntry, RunOptions
from ..server.server_app import make_app as make_server_app
from ..server.server_app import run_config
from ..transfer.preparation import check_preparation
from . import site_pool as workshop
from .engines import ENGINES, SimulationJob
from .partition import SiteShare, make_sites, write_site

BASELINE = "local"  # the method of the local-only baseline


def simulate(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool,
    listener: Callable[[Event], None] | None = None,
    replay: Replay | None = None,
) -> RunFolder:
    """Runs a recipe to its end in ``folder`` and returns it. Nothing is written before everything is checked.

    With ``replay`` only those sites are asked that a log says were admitted, round by round.

    Raises ConfigError, DataError, ModelError, AssetError (bad input), StateError (a foreign folder), QuorumError.
    """
    run = RunFolder(folder)
    if not run.recipe.exists() or not resume:
        run.check_new()
    else:
        run.check_same(recipe)
    if not run.recipe.exists():
        initialize_run(run, recipe)
    roster = tuple(RosterEntry(*entry) for entry in json.loads(run.roster.read_text()))
    federate(recipe, RunPaths(folder, folder), roster, listener, RunOptions(replay=replay))
    if recipe.simulation.baseline:
        told = (lambda event: listener({**event, "baseline": True})) if listener else None
        federate(local_only(recipe), RunPaths(run.baseline, folder), roster, told)
    return run


def initialize_run(run: RunFolder, recipe: Recipe) -> None:
    """Makes the sites, checks all that can be checked, and writes the folder."""
    if recipe.transfer.source_federation is not None:
        return _initialize_transfer(run, recipe)
    sites = make_sites(recipe)
    _check(recipe, sites)
    for site in sites:
        write_site(site, run.path / "sites" / site.plan.name)
    _write_run(run, recipe, [(site.plan.name, site.plan.from_round) for site in sites])


def _initialize_transfer(run: RunFolder, recipe: Recipe) -> None:
    """The sites of an earlier run, without their data: what they know is in their states."""
    old = RunFolder(Path(recipe.simulation.source_run or ""))
    if not recipe.simulation.source_run or not old.recipe.exists():
        wanted = f"the run folder of {recipe.transfer.source_federation}"
        raise ConfigError("simulation.source_run", wanted, recipe.simulation.source_run or "nothing")
    roster = [(site, 1) for site, _ in json.loads(old.roster.read_text())]
    for site, _ in roster:
        states = old.path / "sites" / site / "state"
        if not is_prepared(states):
            wanted = "a site that prepared (transfer.prepare = true, and the run has ended: --resume)"
            raise StateError(str(states), wanted, "no seeds", site=site)
    initial_shared_state(recipe.plan, 2)
    for site, _ in roster:
        copy = (old.path / "sites" / site / "site.toml").read_bytes()
        write_atomically(run.path / "sites" / site / "site.toml", copy)
    _write_run(run, recipe, roster)


def _write_run(run: RunFolder, recipe: Recipe, roster: list[tuple[str, int]]) -> None:
    """Roster, and the recipe last: with it the folder is a run."""
    write_atomically(run.roster, json.dumps(roster).encode())
    write_atomically(run.recipe, tomli_w.dumps(to_dict(recipe)).encode())


def local_only(recipe: Recipe) -> Recipe:
    """The same recipe with every site alone: as many steps, the same data, nothing shared, measured at the end.

    All groups train together: there is nothing to take turns with. Nothing is prepared for a move.
    """
    evaluation = dataclasses.replace(recipe.evaluation, every=0)
    steps = recipe.train.steps_per_round
    train = dataclasses.replace(recipe.train, schedule="joint", steps=steps, phase=(), final_groups=None)
    method = MethodSettings(name=BASELINE)
    transfer = dataclasses.replace(recipe.transfer, prepare=False)
    return dataclasses.replace(recipe, method=method, evaluation=evaluation, train=train, transfer=transfer)


@dataclass(frozen=True)
class RunPaths:
    """The run folder of one federation, and the folder below which its sites have their rows."""

    folder: Path
    home: Path


def federate(
    recipe: Recipe,
    places: RunPaths,
    roster: tuple[RosterEntry, ...],
    listener: Callable[[Event], None] | None,
    conduct: RunOptions | None = None,
) -> None:
    """One federation; goes on where its folder stands."""
    folder, home = places.folder, places.home
    threads = recipe.simulation.threads or (1 if recipe.simulation.engine == "ray" else os.cpu_count() or 1)
    premises = workshop.SitePaths(
        (home / "sites").resolve(),
        (folder / "sites").resolve(),
        tuple(m.site for m in roster),
        threads,
        (home / "log.txt").resolve(),
        Path(recipe.simulation.source_run).resolve() if recipe.simulation.source_run else None,
    )
    job = SimulationJob(
        server=make_server_app(listener, conduct),
        client=make_client_app(workshop.connect_to(premises)),
        config=run_config(recipe, roster, folder.resolve()),
        sites=len(roster),
        threads=threads,
    )
    try:
        ENGINES[recipe.simulation.engine](job)
    finally:
        workshop.close()


def _check(recipe: Recipe, sites: list[SiteShare]) -> None:
    """What can be known before anything is written: quorum, model, targets, rank, a shared head's labels."""
    quorum = recipe.server.quorum or 1
    starting = sum(site.plan.from_round == 1 for site in sites)
    asked = max(1, round(recipe.server.fraction * starting)) if starting else 0
    if asked < quorum:
        raise QuorumError("server.quorum", f"at least {quorum} sites asked in round 1", asked)
    late = next((site for site in sites if site.plan.from_round > recipe.rounds + 1), None)
    if late:
        wanted = f"a round of the run, or {recipe.rounds + 1} to join when it is trained"
        raise ConfigError("from_round", wanted, late.plan.from_round, site=late.plan.name)
    if any(site.plan.from_round > recipe.rounds for site in sites) and not recipe.train.final_steps:
        wanted = "some, as a site that joins when all is trained has no other steps"
        raise ConfigError("train.final_steps", wanted, 0)
    labels = {site.rows.labels for site in sites if site.rows.labels}
    if recipe.method.row().head is SHARED and len(labels) > 1:
        raise ConfigError("method.head", "one list of labels at all sites for a shared head", "different lists")
    if labels:
        head_layout(skeleton(recipe.model), 2)
    initial_shared_state(recipe.plan, max(map(len, labels), default=0))
    if recipe.transfer.prepare:
        for site in sites:
            check_preparation(recipe.plan, site.rows)
    for private in {recipe.private, *(site.plan.private for site in sites if site.plan.private)}:
        if private.present:
            inject(skeleton(recipe.model), private_spec(private, recipe.adapter), "private")
