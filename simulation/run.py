"""``colora simulate``: run a recipe in a run folder, with a local-only baseline if the recipe asks for it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..client.artifacts.transfer import is_prepared
from ..client.client_app import make_app as make_client_app
from ..common.adapters.initialization import initial_shared_state
from ..common.atomic_io import write_atomically
from ..common.config.schema import MethodSettings, PrivacySettings, Recipe
from ..common.dataset import SiteDataset
from ..common.errors import ConfigError, QuorumError, StateError
from ..common.event_log import Event
from ..server.reporting.run_folder import RunFolder
from ..server.reporting.tracking import track
from ..server.rounds.run_options import Replay, RosterEntry, RunOptions
from ..server.server_app import make_app as make_server_app
from ..server.server_app import run_config
from . import site_pool
from .cohort import Cohort
from .comparison import compare
from .engines import ENGINES, SimulationJob
from .partition import make_sites, write_site
from .secure_keys import simulated_public_keys
from .site_errors import SiteErrors
from .validation import check_simulation

BASELINE = "local"  # method of the local-only baseline


@dataclass(frozen=True)
class LocalObserver:
    """What the terminal of this machine is told beside the events.

    ``on_sites`` receives the rows of a new run's sites. ``on_step`` receives the steps of a site while it trains, but
    not with Ray. ``on_notice`` receives what the engine has to say.
    """

    on_sites: Callable[[Sequence[SiteDataset]], None] = lambda sites: None
    on_step: site_pool.SiteStep = site_pool.ignore
    on_notice: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class RunPaths:
    """Folders of one federation: its run folder, and the run folder that holds the rows of its sites.

    They differ for the baseline, which trains on the rows of the run that it belongs to.
    """

    folder: Path
    data: Path


def simulate(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool,
    listener: Callable[[Event], None] | None = None,
    replay: Replay | None = None,
    terminal: LocalObserver | None = None,
) -> RunFolder:
    """Run a recipe to its end in ``folder`` and return the run folder. All checks come before the first write.

    ``replay`` limits every round to the sites that the log of an earlier run lists as admitted. ``terminal``
    receives the sites' rows and the progress of their training.

    Raises ConfigError, DataError, ModelError or AssetError for bad input, StateError when the folder holds something
    else, and QuorumError.
    """
    run, trackers, terminal = RunFolder(folder), track(recipe, folder, listener), terminal or LocalObserver()
    if not run.recipe.exists() or not resume:
        run.check_new()
    else:
        run.resume(recipe, listener)
    if not run.recipe.exists():
        initialize_run(run, recipe, terminal.on_sites)
    roster = tuple(RosterEntry(*entry) for entry in run.read_roster())
    with trackers:
        options = RunOptions(replay=replay, public_keys=simulated_public_keys(recipe, tuple(r.site for r in roster)))
        federate(recipe, RunPaths(folder, folder), roster, listener, options, terminal)
        if recipe.simulation.baseline:
            mark = (lambda event: listener({**event, "baseline": True})) if listener else None
            federate(local_only(recipe), RunPaths(run.baseline, folder), roster, mark, terminal=terminal)
            compare(run, recipe, [entry.site for entry in roster], mark)
    return run


def initialize_run(
    run: RunFolder, recipe: Recipe, on_sites: Callable[[Sequence[SiteDataset]], None] = lambda sites: None
) -> None:
    """Create the sites, check the recipe against them, and write the run folder."""
    if recipe.transfer.source_federation is not None:
        return _initialize_transfer(run, recipe)
    sites = make_sites(recipe)
    on_sites([site.rows for site in sites])
    check_simulation(recipe, sites)
    for site in sites:
        write_site(site, run.path / "sites" / site.settings.name)
    _write_run(run, recipe, [(site.settings.name, site.settings.from_round) for site in sites])


def _initialize_transfer(run: RunFolder, recipe: Recipe) -> None:
    """Write the run folder of a transfer: the sites of the source run, without their data."""
    source = _source_run(recipe)
    roster = [(site, 1) for site, _ in source.read_roster()]
    for site, _ in roster:
        states = source.path / "sites" / site / "state"
        if not is_prepared(states):
            raise StateError(
                str(states),
                "a state that is prepared for a transfer",
                "no seeds",
                site=site,
                message=f"The state in {states} is not prepared for a transfer: it has no seeds.",
                hint="Finish the source run with transfer.prepare = true (use --resume if it was interrupted).",
            )
    initial_shared_state(recipe.plan, 2)
    for site, _ in roster:
        site_file = (source.path / "sites" / site / "site.toml").read_bytes()
        write_atomically(run.path / "sites" / site / "site.toml", site_file)
    _write_run(run, recipe, roster)


def _source_run(recipe: Recipe) -> RunFolder:
    """Return the run folder that a transfer starts from. Raises ConfigError if there is none."""
    path, federation = recipe.simulation.source_run, recipe.transfer.source_federation
    source = RunFolder(Path(path or ""))
    if path and source.recipe.exists():
        return source
    raise ConfigError(
        "simulation.source_run",
        f"the run folder of {federation}",
        path or "nothing",
        message=f"simulation.source_run is {f'{path}, which is not a run folder' if path else 'not set'}.",
        hint=f"Set it to the run folder of {federation}.",
    )


def _write_run(run: RunFolder, recipe: Recipe, roster: list[tuple[str, int]]) -> None:
    """Write roster and recipe. The recipe comes last."""
    write_atomically(run.roster, json.dumps(roster).encode())
    run.write_recipe(recipe)


def local_only(recipe: Recipe) -> Recipe:
    """Return the recipe of the baseline: every site trains alone for as many steps on the same data.

    All groups train jointly and without noise, since nothing is shared. The baseline is evaluated at its end and
    prepares no transfer.
    """
    evaluation = dataclasses.replace(recipe.evaluation, every=0)
    steps = None if recipe.train.by_epochs else recipe.train.steps_per_round(0)
    train = dataclasses.replace(recipe.train, schedule="joint", steps=steps, phase=(), final_groups=None)
    init = "kaiming" if recipe.adapter.init == "spectral" else recipe.adapter.init
    method, adapter = MethodSettings(name=BASELINE), dataclasses.replace(recipe.adapter, init=init)
    transfer = dataclasses.replace(recipe.transfer, prepare=False)
    changed = {"method": method, "adapter": adapter, "evaluation": evaluation, "train": train, "transfer": transfer}
    changed["privacy"] = PrivacySettings()
    return dataclasses.replace(recipe, **changed)


def federate(
    recipe: Recipe,
    paths: RunPaths,
    roster: tuple[RosterEntry, ...],
    listener: Callable[[Event], None] | None,
    options: RunOptions | None = None,
    terminal: LocalObserver = LocalObserver(),
) -> None:
    """Run one federation to its end, from the last checkpoint in its folder if there is one."""
    simulation = recipe.simulation
    threads = simulation.threads or (1 if simulation.engine == "ray" else os.cpu_count() or 1)
    site_paths = site_pool.SitePaths(
        sites=(paths.data / "sites").resolve(),
        state=(paths.folder / "sites").resolve(),
        names=tuple(entry.site for entry in roster),
        threads=threads,
        log=(paths.data / "log.txt").resolve(),
        source_run=Path(simulation.source_run).resolve() if simulation.source_run else None,
    )
    errors = SiteErrors(site_paths.log, listener)
    watched = site_pool.ignore if simulation.engine == "ray" else terminal.on_step  # Ray's sites: other processes
    cohort = Cohort(terminal.on_notice)
    connect = site_pool.connect_to(site_paths, watched, cohort if simulation.engine == "batched" else None)
    job = SimulationJob(
        server=make_server_app(errors, options),
        client=make_client_app(connect),
        config=run_config(recipe, roster, paths.folder.resolve()),
        sites=len(roster),
        threads=threads,
        cohort=cohort,
        cohort_size=simulation.cohort,
    )
    try:
        ENGINES[simulation.engine](job)
    except QuorumError as error:
        raise errors.quorum_error(error) from None
    finally:
        site_pool.close()
