"""All sites of one machine around one base model: what the ClientApp of a simulation connects to."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from ..client.artifacts.transfer import rows_on_new_base
from ..client.client_app import Connect, Site
from ..client.data.selection import load_site_rows
from ..client.training.adapted_model import AdaptedModel, attach_adapters
from ..client.training.state_store import StateStore
from ..client.training.trainer import Trainer
from ..common.config.loader import load_site
from ..common.config.schema import Plan, parse
from ..common.config.site_schema import SiteSettings
from ..common.dataset import TASKS
from ..common.models.base_model import load_base_model
from ..common.protocol.types import SiteInfo, TrainReply, TrainRequest


@dataclass(frozen=True)
class SitePaths:
    """Where a simulation's sites lie: their data below ``sites``, their state below ``state``."""

    sites: Path
    state: Path
    names: tuple[str, ...]
    threads: int
    log: Path
    moved_from: Path | None = None  # the run folder of the federation that these sites had before

    def data_of(self, name: str) -> Path:
        """A site's folder with ``site.toml`` and rows."""
        return self.sites / name

    def state_of(self, name: str) -> Path:
        """A site's folder of personal states."""
        return self.state / name / "state"


class SitePool:
    """One process's bench, and a trainer for each site that has worked at it."""

    def __init__(self, premises: SitePaths, plan: Plan) -> None:
        import torch

        torch.set_num_threads(premises.threads)
        _log_to(premises.log)
        self.premises, self.plan = premises, plan
        self.files: dict[str, SiteSettings] = {
            name: load_site(premises.data_of(name) / "site.toml") for name in premises.names
        }
        generates = any(TASKS[site.data.task].needs_causal_lm for site in self.files.values())
        self.bench: AdaptedModel = attach_adapters(load_base_model(plan.model, generates=generates), plan)
        self.trainers: dict[str, Trainer] = {}

    def trainer(self, name: str) -> Trainer:
        """The trainer of one site, made at the first call."""
        if name not in self.trainers:
            site, premises = self.files[name], self.premises
            store, prepared = StateStore(premises.state_of(name), self.plan.name), None
            if self.plan.transfer.of is None:
                rows = load_site_rows(site, self.plan.seed)
            else:
                assert premises.moved_from is not None
                old = premises.moved_from / "sites" / name / "state"
                rows, prepared = rows_on_new_base(self.plan, old, premises.state / name / "transfer")
            self.trainers[name] = Trainer(self.bench, rows, store, site.private, artifacts=prepared)
        return self.trainers[name]


@dataclass(frozen=True)
class SimulatedSite(Site):
    """One site's door: it finds its workshop by the plan that a message names."""

    name: str
    premises: SitePaths

    def site_info(self, federation: str, plan: str) -> SiteInfo:
        """Introduces the site."""
        return _site_pool(self.premises, plan).trainer(self.name).site_info()

    def handle(self, order: TrainRequest) -> TrainReply:
        """Answers an order."""
        return _site_pool(self.premises, order.plan).trainer(self.name).handle(order)


def connect_to(premises: SitePaths) -> Connect:
    """A ``connect`` for the ClientApp: partition k is the k-th site."""

    def connect(context: Context) -> Site:
        return SimulatedSite(premises.names[int(context.node_config["partition-id"])], premises)

    return connect


@lru_cache(maxsize=1)  # one base model in memory: another federation replaces it
def _site_pool(premises: SitePaths, plan: str) -> SitePool:
    return SitePool(premises, parse(Plan, json.loads(plan)))


def _log_to(path: Path) -> None:
    """The sites' log: what a site may know and the coordinator may not."""
    logger = logging.getLogger("colora")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    logger.addHandler(logging.FileHandler(path, delay=True))


def close() -> None:
    """Lets go of the base model."""
    _site_pool.cache_clear()
