"""The sites of a simulation in one process: what the ClientApp of a simulation connects to."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from flwr.app import Context

from ..client.artifacts.transfer import rows_on_new_base
from ..client.client_app import Connect, Site
from ..client.data.selection import load_site_rows
from ..client.training.adapted_model import AdaptedModel, attach_adapters
from ..client.training.private_rounds import without_metrics
from ..client.training.secure_rounds import SecureRounds, without_update
from ..client.training.smaller_rank import plan_at_rank
from ..client.training.state_store import StateStore
from ..client.training.trainer import Trainer
from ..common.config.loader import load_site
from ..common.config.schema import Plan, parse
from ..common.config.site_schema import SiteSettings
from ..common.dataset import TASKS
from ..common.errors import ColoraError
from ..common.models.base_model import load_base_model
from ..common.protocol.types import Arrays, SiteInfo, SumReply, SumRequest, TrainReply, TrainRequest
from .cohort import Cohort
from .secure_keys import seed_of, simulated_identities

logger = logging.getLogger("colora.site")
SiteStep = Callable[[str, int, int], None]  # (site, optimizer steps done, steps of the round)


@dataclass(frozen=True)
class SitePaths:
    """Names and folders of a simulation's sites.

    ``sites`` holds their data and ``state`` their personal states, one folder per site. ``threads`` is the number of
    CPU threads, ``log`` the sites' log file, and ``source_run`` the run folder that a transfer starts from.
    """

    sites: Path
    state: Path
    names: tuple[str, ...]
    threads: int
    log: Path
    source_run: Path | None = None

    def data_of(self, name: str) -> Path:
        """The folder of a site's ``site.toml`` and rows."""
        return self.sites / name

    def state_of(self, name: str) -> Path:
        """The folder of a site's personal states."""
        return self.state / name / "state"

    def source_state_of(self, name: str) -> Path:
        """The folder of a site's personal states in ``source_run``."""
        assert self.source_run is not None
        return self.source_run / "sites" / name / "state"

    def synthetic_data_of(self, name: str) -> Path:
        """The folder of the synthetic texts of a transfer."""
        return self.state / name / "transfer"


class SitePool:
    """The trainers of one process, one per site, on one adapted model for each rank that the sites have."""

    def __init__(self, paths: SitePaths, plan: Plan) -> None:
        import torch

        torch.set_num_threads(paths.threads)
        _log_to(paths.log)
        self.paths, self.plan = paths, plan
        self.settings: dict[str, SiteSettings] = {
            name: load_site(paths.data_of(name) / "site.toml") for name in paths.names
        }
        self.models: dict[int, AdaptedModel] = {}
        self.trainers: dict[str, Trainer] = {}

    def trainer(self, name: str) -> Trainer:
        """Return the trainer of a site, which the first call creates."""
        if name not in self.trainers:
            site, paths = self.settings[name], self.paths
            store, artifacts = StateStore(paths.state_of(name), self.plan.name), None
            if self.plan.transfer.source_federation is None:
                rows = load_site_rows(site, self.plan.seed)
            else:
                source, folder = paths.source_state_of(name), paths.synthetic_data_of(name)
                rows, artifacts = rows_on_new_base(self.plan, source, folder)
            model = self._model(site.allow.max_rank)
            self.trainers[name] = Trainer(model, rows, store, site.private, artifacts=artifacts)
            self.trainers[name].measurer.base_metrics = self._base_metrics(name)
        return self.trainers[name]

    def _model(self, max_rank: int | None) -> AdaptedModel:
        """Return the base model with an adapter of at most this rank, which the first call loads."""
        rank = plan_at_rank(self.plan, max_rank).adapter.rank
        if rank not in self.models:
            generates = any(TASKS[site.data.task].needs_causal_lm for site in self.settings.values())
            base = load_base_model(self.plan.model, generates=generates)
            self.models[rank] = attach_adapters(base, self.plan, max_rank)
        return self.models[rank]

    def secure_rounds(self, name: str) -> SecureRounds:
        """Return a site's part in secure sums. Its secrets derive from the seed, so that a run can be repeated."""
        seed = seed_of(self.plan)
        identity = simulated_identities(seed, self.paths.names)[name]
        return SecureRounds(
            self.plan, identity, f"{seed}|{name}", StateStore(self.paths.state_of(name), self.plan.name)
        )

    def _base_metrics(self, name: str) -> Mapping[str, float] | None:
        """The base model's metrics from the run that a baseline belongs to: same model, same rows."""
        if self.paths.sites == self.paths.state:
            return None
        state = StateStore(self.paths.sites / name / "state", self.plan.name).newest()
        return state.base if state else None


@dataclass(frozen=True)
class SimulatedSite(Site):
    """A site of the pool. Every message names its plan, and the plan determines the pool."""

    name: str
    paths: SitePaths
    on_step: SiteStep
    cohort: Cohort | None = None  # with which it trains

    def site_info(self, federation: str, plan: str) -> SiteInfo:
        """Return the site's metadata for the first round."""
        with _named(self.name):
            return _site_pool(self.paths, plan).trainer(self.name).site_info()

    def received(self, federation: str, plan: str, number: int) -> Arrays:
        """Return the shared adapter that the site received in a round; see ``Trainer.received``."""
        with _named(self.name):
            return _site_pool(self.paths, plan).trainer(self.name).received(number)

    def handle(self, request: TrainRequest) -> TrainReply:
        """Train as requested and return the reply."""
        with _named(self.name):
            pool = _site_pool(self.paths, request.plan)
            trainer, secure = pool.trainer(self.name), pool.plan.privacy.secure_aggregation
            if secure:
                pool.secure_rounds(self.name).prepare(request)
            on_step = partial(self.on_step, self.name)
            reply = self.cohort.handle(trainer, request, on_step) if self.cohort else trainer.handle(request, on_step)
            reply = without_update(reply) if secure else reply
            return without_metrics(reply) if trainer.plan.privacy.withholds_metrics else reply

    def sum(self, request: SumRequest) -> SumReply:
        """Take a step of a secure sum."""
        with _named(self.name):
            return _site_pool(self.paths, request.plan).secure_rounds(self.name).answer(request)


@contextmanager
def _named(site: str) -> Iterator[None]:
    """Name the site in the log of an error: the base model's errors, for example, name none."""
    try:
        yield
    except ColoraError as error:
        raise error.at_site(site) from None
    except Exception as error:
        logger.error("site %s: %s", site, " ".join(f"{type(error).__name__}: {error}".split()))
        raise


def ignore(site: str, done: int, total: int) -> None:
    """The callback of a simulation whose steps nobody watches."""


def connect_to(paths: SitePaths, on_step: SiteStep, cohort: Cohort | None = None) -> Connect:
    """Return a ``connect`` for the ClientApp: partition k is the k-th site. ``on_step`` is called while it trains."""

    def connect(context: Context) -> Site:
        return SimulatedSite(paths.names[int(context.node_config["partition-id"])], paths, on_step, cohort)

    return connect


@lru_cache(maxsize=1)  # one federation in memory; the next one replaces it
def _site_pool(paths: SitePaths, plan: str) -> SitePool:
    return SitePool(paths, parse(Plan, json.loads(plan)))


def _log_to(path: Path) -> None:
    """Send the sites' log to a file: it may quote their data, which the coordinator must not see."""
    logger = logging.getLogger("colora")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger.addHandler(handler)


def close() -> None:
    """Release the base model."""
    _site_pool.cache_clear()
