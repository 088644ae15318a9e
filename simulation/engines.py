"""Engines: the table of ways to exchange the messages of one federation on one machine."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from ..common.errors import ConfigError
from .cohort import Cohort
from .local_grid import RUN_ID, BatchedGrid, LocalGrid

RunConfig = dict[str, bool | float | int | str]


@dataclass(frozen=True)
class SimulationJob:
    """One federation, ready to run.

    ``config`` is Flower's run config, ``sites`` the number of sites and ``threads`` the CPU threads of a process.
    ``cohort`` and ``cohort_size`` are those of the batched engine.
    """

    server: ServerApp
    client: ClientApp
    config: RunConfig
    sites: int
    threads: int
    cohort: Cohort
    cohort_size: int


def run_local(job: SimulationJob) -> None:
    """Run the sites in this process, one after the other, on one shared base model."""
    job.server(LocalGrid(job.client, job.sites), _context(job))


def run_batched(job: SimulationJob) -> None:
    """Run the sites in this process on one shared base model, and train ``cohort_size`` of them in one batch."""
    import torch

    torch.set_num_threads(job.threads)  # of this thread, in which the sites train together
    job.server(BatchedGrid(job.client, job.sites, job.cohort, job.cohort_size), _context(job))


def run_ray(job: SimulationJob) -> None:
    """Run the sites on Flower's simulation runtime: several Ray processes, each with its own base model."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    start_ray(job.threads)
    errors: list[BaseException] = []

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            job.server(grid, _context(job))
        except BaseException as error:  # Flower would log it and raise an error without its text
            errors.append(error)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from flwr.simulation import run_simulation

        run_simulation(
            server_app=server,
            client_app=job.client,
            num_supernodes=job.sites,
            backend_config={"client_resources": {"num_cpus": job.threads, "num_gpus": 0.0}},
        )
    if errors:
        raise errors[0]


def start_ray(threads: int) -> None:
    """Start Ray, which Flower then uses; Flower itself would wait for ever where Ray cannot start.

    Raises ConfigError if Ray does not start, or has too few CPUs for one process of a site.
    """
    path = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH")]))
    try:
        import ray

        if not ray.is_initialized():
            ray.init(
                runtime_env={"env_vars": {"PYTHONPATH": path}},
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
            )
        cpus = int(ray.cluster_resources().get("CPU", 0))
    except Exception as error:  # Ray raises errors of many types, and plain ones
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        message = f"Ray does not start on this machine: {reason.rstrip('.')}."
        hint = 'Use simulation.engine = "local".'
        raise ConfigError("simulation.engine", "Ray", reason, message=message, hint=hint) from None
    if cpus < threads:
        message = f"simulation.threads is {threads}, but Ray has only {cpus} CPUs."
        raise ConfigError("simulation.threads", f"at most {cpus}", threads, message=message, hint="Lower it.")


ENGINES: dict[str, Callable[[SimulationJob], None]] = {
    "local": run_local,
    "batched": run_batched,
    "ray": run_ray,
}


def _context(job: SimulationJob) -> Context:
    return Context(RUN_ID, 0, {}, RecordDict(), job.config)
