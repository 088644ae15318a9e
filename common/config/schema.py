"""Recipes as frozen dataclasses. ``loader.py`` reads the files; ``site_schema.py`` describes site files.

A recipe is one TOML file. Its ``Plan`` is the part that every site must agree on: it travels with each request and is
hashed into it. The rest (data, sites, server, simulation) concerns only the coordinator or the simulation.

Every key has an attribute docstring; ``docs/scripts/recipe_reference.py`` turns them into the reference pages.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import field
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from ..digest import digest
from ..errors import ConfigError
from ..methods import Method, Role
from .data_schema import DataSettings, PartitionSettings, SimulatedSiteSettings
from .diagnostics import SETTINGS, config_error
from .field_types import STRICT, Count, Fraction, Name, Positive, PositiveFloat, Precision, Probability, Rate
from .model_schema import AdapterSettings, MethodSettings, ModelSettings, Private, PrivateSettings
from .privacy_schema import PrivacySettings, SitePrivacySettings
from .training_schema import EvaluationSettings, PhaseSettings, TrainSettings
from .transfer_schema import (
    DiscriminatorSettings,
    DistillationSettings,
    TransferGeneratorSettings,
    TransferSettings,
)

__all__ = [
    "STRICT",
    "AdapterSettings",
    "Count",
    "CommunicationSettings",
    "DataSettings",
    "DiscriminatorSettings",
    "DistillationSettings",
    "EvaluationSettings",
    "Fraction",
    "MethodSettings",
    "ModelSettings",
    "Name",
    "PartitionSettings",
    "PhaseSettings",
    "Plan",
    "Positive",
    "Precision",
    "PrivacySettings",
    "Private",
    "PrivateSettings",
    "Rate",
    "Recipe",
    "SimulatedSiteSettings",
    "SimulationSettings",
    "SitePrivacySettings",
    "TrainSettings",
    "ServerSettings",
    "TrackingSettings",
    "TransferGeneratorSettings",
    "TransferSettings",
    "parse",
    "to_dict",
    "to_json",
]

T = TypeVar("T")


@dataclass(frozen=True, config=STRICT)
class CommunicationSettings:
    """How coordinator and sites exchange shared arrays."""

    codec: Literal["safetensors", "fp16", "bf16"] = "safetensors"
    """Encoding of the arrays. ``safetensors`` sends fp32, ``fp16`` and ``bf16`` send half the bytes."""

    update_bits: Literal[2, 4, 8] | None = None
    """Bits for each number of an update that a site sends, with a scale for every 256 numbers. What rounding leaves out
    is added to the site's next update (error feedback). Unset: as ``codec`` says."""

    broadcast_bits: Literal[2, 4, 8] | None = None
    """Bits for each number of the shared adapter that the coordinator sends to a site of the round before, as the
    difference to what that site received then. What rounding leaves out is added to the next difference (error
    feedback). A site that lacks the adapter of that round receives the whole one in fp32, so ``codec`` must be
    ``safetensors``. Unset: as ``codec`` says."""


@dataclass(frozen=True, config=STRICT)
class Plan:
    """What all sites agree on. It travels to them with every request and is part of the identity of a round."""

    name: Name
    """Name of the federation: a letter or digit, then at most 63 letters, digits, ``.``, ``_`` or ``-``."""

    rounds: Positive
    """Number of rounds."""

    model: ModelSettings
    """The base model."""

    seed: int = 0
    """Seed of the federation. All other seeds derive from it, the sites' names and the round."""

    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    """The shared adapter."""

    method: MethodSettings = field(default_factory=MethodSettings)
    """The federated method."""

    private: Private = field(default_factory=lambda: PrivateSettings("none"))
    """Private adapter of every site: a kind, or a table. Without this key there is none."""

    train: TrainSettings = field(default_factory=TrainSettings)
    """Local training."""

    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """Evaluation."""

    transfer: TransferSettings = field(default_factory=TransferSettings)
    """Transfer to a new base model."""

    communication: CommunicationSettings = field(default_factory=CommunicationSettings)
    """How shared arrays travel."""

    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    """Differential privacy of what sites send."""

    def row(self) -> Method:
        """Return the row of the method table with this recipe's changes, and with the private adapter if any."""
        row = self.method.row()
        return dataclasses.replace(row, private=Role.PERSONAL) if self.private.present else row

    @property
    def probes_head(self) -> bool:
        """Whether a personal head is fitted to frozen features before its first optimizer step."""
        head_init = self.train.head_init or ("random" if self.transfer.source_federation is None else "probe")
        return head_init == "probe" and self.row().head is Role.PERSONAL

    @property
    def fits_final_head(self) -> bool:
        """Whether a personal head is fitted to the final features after the final steps."""
        final_head = self.train.final_head or ("probe" if self.privacy.enabled else "trained")
        return final_head == "probe" and self.row().head is Role.PERSONAL

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of a site with so many training examples in all rounds, including the final steps."""
        return self.rounds * self.train.steps_per_round(examples) + self.train.final_steps


@dataclass(frozen=True, config=STRICT)
class ServerSettings:
    """How the coordinator samples sites, admits and weights their replies, and updates the shared adapter."""

    aggregator: Literal["mean", "product", "median", "trimmed_mean", "krum"] = "mean"
    """How the admitted updates are combined. ``mean`` is the weighted mean of A and of B, and folds replies one by one.
    The others hold all replies of a round: ``product`` is the weighted mean of the products B·A, truncated to the rank
    of the adapter; ``median`` and ``trimmed_mean`` are coordinate-wise and unweighted; ``krum`` is the unweighted mean
    of the updates that are close to others."""

    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Fraction of the sites that ``trimmed_mean`` leaves out on each side: at least one site if three or more
    replied. Fraction of the sites that ``krum`` leaves out: at least one if five or more replied."""

    optimizer: Literal["mean", "momentum", "adam", "yogi"] = "mean"
    """Server optimizer, applied to what the aggregator returns."""

    lr: PositiveFloat | None = None
    """Learning rate of the server optimizer. Unset: 1.0 for ``mean`` and ``momentum``, 0.1 for ``adam``, 0.01 for
    ``yogi``."""

    momentum: Probability = 0.9
    """Momentum coefficient of ``momentum``."""

    beta_1: Probability = 0.9
    """Decay of the first moment, with ``adam`` and ``yogi``."""

    beta_2: Probability = 0.99
    """Decay of the second moment, with ``adam`` and ``yogi``."""

    tau: PositiveFloat = 1e-3
    """Adaptivity of ``adam`` and ``yogi``: a constant added to the denominator."""

    weights: Literal["tokens", "examples", "uniform", "benefit"] | None = None
    """What a reply weighs in the mean: loss terms (tokens or labelled texts), examples, or one. ``benefit`` gives more
    weight to sites that the shared adapter helps, by one number that each site reports. Unset: ``tokens``, or
    ``uniform`` if the sites have different tasks. With ``tokens``, a site whose task is not the one that the recipe
    declares for it is refused, since a generation example has up to ``model.max_length`` loss terms."""

    groups: Literal["none", "similarity"] = "none"
    """Which sites share an adapter. ``none``: all of them. ``similarity``: before round 1 all sites train once from the
    same start. Sites whose updates have similar directions form a group with its own shared adapter, if a
    permutation test supports the division. At least six sites are needed to find two groups."""

    fraction: Fraction = 1.0
    """Fraction of the roster that is sampled each round, at least one site."""

    quorum: Positive | None = None
    """Admitted replies that a round needs. Unset: more than half of the sampled sites."""

    timeout: PositiveFloat | None = None
    """Maximum duration of a round in seconds. A simulation counts the seconds of each site alone. Unset: no limit."""

    keep: Literal["last", "best"] = "last"
    """The round whose shared adapter and personal models the run ends with. ``best``: the round with the lowest loss on
    the sites' validation rows, as the mean over sites. It needs ``data.validation_fraction``."""

    patience: Positive | None = None
    """End the run early if the loss on the sites' validation rows, as the mean over sites, has not improved for so many
    rounds. It needs ``data.validation_fraction``. Unset: all rounds."""

    max_attempts: Positive = 3
    """Number of times a site is tried in one round when it answers with an error."""

    retry_interval: PositiveFloat = 10.0
    """Seconds before a round that missed its quorum is retried, in a deployment."""

    max_update_norm: PositiveFloat = 1e4
    """Maximum Frobenius norm of a site's update over all arrays. A reply beyond it is refused."""

    max_relative_norm: Annotated[float, Field(gt=1, le=1e9)] = 3.0
    """Largest norm of an update, relative to the median norm of its round. A larger update is scaled down, and the run
    says so. It applies to rounds of at least three updates; 1e9 turns it off."""

    fingerprints: dict[Literal["model", "tokenizer", "chat_template"], str] | None = None
    """SHA-256 fingerprints that every site's base model must have, as the event ``agreed`` of a run shows them. Unset:
    those of the coordinator's own copy of the model or, without one, those that most sites have."""

    privacy: SitePrivacySettings | None = None
    """Differential privacy for each site as a whole. Without this table there is none."""

    @property
    def validates(self) -> bool:
        """Whether the coordinator compares rounds by the loss on the sites' validation rows."""
        return self.keep == "best" or self.patience is not None


@dataclass(frozen=True, config=STRICT)
class SimulationSettings:
    """How one machine runs all sites."""

    engine: Literal["local", "batched", "ray"] = "local"
    """``local`` runs all sites in one process, one after the other. ``batched`` trains several of them in one batch.
    ``ray`` runs them on Flower's simulation runtime, in several processes."""

    cohort: Positive = 8
    """Number of sites that the batched engine trains in one batch."""

    threads: Positive | None = None
    """Torch threads per process. Unset: all cores with ``local``, 1 with ``ray``."""

    source_run: str | None = None
    """Run folder of the federation whose models are transferred. Required in a simulated transfer."""

    baseline: bool = False
    """Also train every site alone, for the same number of steps."""


@dataclass(frozen=True, config=STRICT)
class TrackingSettings:
    """Experiment trackers that log the metrics of the run."""

    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Names of trackers. Each needs its own package."""

    project: Name | None = None
    """The project at ``wandb`` and ``trackio``, and the experiment at ``mlflow``. Unset: ``colora``."""


@dataclass(frozen=True, config=STRICT)
class Recipe(Plan):
    """A whole experiment, as read from TOML."""

    description: str = ""
    """Free text; the final report begins with it."""

    data: DataSettings = field(default_factory=DataSettings)
    """Rows. A ``[[site]]`` inherits every key that it does not set."""

    partition: PartitionSettings | None = None
    """Sites made out of one data set. Either this table or ``[[site]]`` tables are required."""

    site: tuple[SimulatedSiteSettings, ...] = ()
    """The sites, as ``[[site]]`` tables."""

    server: ServerSettings = field(default_factory=ServerSettings)
    """The coordinator."""

    simulation: SimulationSettings = field(default_factory=SimulationSettings)
    """The simulation."""

    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    """Experiment trackers."""

    @property
    def plan(self) -> Plan:
        """The part of the recipe that sites receive."""
        train, evaluation = self.train, self.evaluation
        if self.server.weights == "benefit":
            train = dataclasses.replace(train, report_benefit=True)
        if self.server.keep == "best":
            train = dataclasses.replace(train, keep_states="all")
        if self.server.validates:
            evaluation = dataclasses.replace(evaluation, validation_loss=True)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Plan)}
        return Plan(**{**fields, "train": train, "evaluation": evaluation})

    @property
    def identity(self) -> str:
        """Hash of what a run cannot change: all but ``rounds``, ``description``, ``[simulation]``, ``[tracking]``."""
        free = {"simulation": SimulationSettings(), "tracking": TrackingSettings(), "description": ""}
        return digest(to_json(dataclasses.replace(self, rounds=1, **free)))

    @property
    def rounds_matter(self) -> str | None:
        """The key by which a round depends on the number of rounds; None if no round does."""
        if self.train.lr_schedule not in ("constant", "constant_with_warmup"):
            return f'train.lr_schedule = "{self.train.lr_schedule}"'
        if self.train.lr_schedule == "constant_with_warmup" and self.train.warmup_ratio:
            return f"train.warmup_ratio = {self.train.warmup_ratio:g}"
        if self.server.validates:
            return 'server.keep = "best"' if self.server.keep == "best" else f"server.patience = {self.server.patience}"
        return 'server.weights = "benefit"' if self.server.weights == "benefit" else None


def parse(kind: type[T], raw: dict[str, Any]) -> T:
    """Build a settings dataclass from plain dictionaries. Raises ConfigError for the first wrong key."""
    try:
        return _adapter(kind).validate_json(json.dumps(raw, default=str))
    except pydantic.ValidationError as error:
        raise config_error(kind, error) from None
    except RecursionError:
        message = "The settings are nested too deeply."
        raise ConfigError(SETTINGS, "tables in tables", "deeper ones", message=message) from None


def to_json(settings: object) -> str:
    """Return settings as JSON with sorted keys: the text that Flower carries and that is hashed."""
    return json.dumps(to_dict(settings), sort_keys=True)


def to_dict(settings: Any) -> dict[str, Any]:
    """Return settings as plain dictionaries without unset values, since TOML has no null."""
    return _without_none(json.loads(json.dumps(dataclasses.asdict(settings))))


@cache
def _adapter(kind: type) -> TypeAdapter:
    return TypeAdapter(kind)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value
