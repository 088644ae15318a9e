"""Site files as frozen dataclasses; ``loader.py`` reads them."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from pydantic.dataclasses import dataclass

from .field_types import PositiveFloat, Probability
from .schema import STRICT, Count, DataSettings, Name, Positive, Precision, Private, TrackingSettings
from .training_schema import Optimizer


@dataclass(frozen=True, config=STRICT)
class CoordinatorSettings:
    """How the site reaches its coordinator. Relative paths start at the site file."""

    address: str
    """``HOST:PORT`` of the coordinator's gateway."""

    ca: str = "ca.crt"
    """Certificate of the authority that signed the coordinator's certificate, in PEM format."""

    key: str = "site.key"
    """The site's private key, in OpenSSH format (ECDSA)."""

    insecure: bool = False
    """Use neither TLS nor a key. For trials on one machine."""


@dataclass(frozen=True, config=STRICT)
class TrainerSettings:
    """The trainer, the process that holds the base model, the data and the personal state."""

    listen: str = "unix:state/trainer.sock"
    """``unix:PATH`` for a socket that only this user can open, or ``HOST:PORT`` for TLS with the certificates in
    ``link``."""

    link: str = "link"
    """Folder of the certificates for ``HOST:PORT``: ``ca.crt``, ``trainer.crt``, ``trainer.key``, ``node.crt`` and
    ``node.key``."""

    state: str = "state"
    """Folder of personal states and the audit log."""

    aggregation_key: str = "aggregation.key"
    """The site's private key for secure aggregation, in OpenSSH format (ECDSA P-384)."""

    roster: str = "roster.pub"
    """Public keys of all sites for secure aggregation: lines in OpenSSH format, each with the name of a site."""

    device: str = "auto"
    """Torch device. ``auto`` takes a GPU if there is one."""

    threads: Positive | None = None
    """Torch threads. Unset: all cores."""

    precision: Precision | None = None
    """Precision of the base model's weights at this site. Unset: the recipe's."""

    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass to save memory. Unset: the recipe's."""

    micro_batch: Positive | None = None
    """Examples per forward and backward pass. Unset: the recipe's."""

    seeds: Literal["secret", "recipe"] = "secret"
    """Where the order of the examples, dropout and the first values of personal parameters come from. ``secret`` is a
    random number that never leaves the site. ``recipe`` is the recipe's seed, which the coordinator knows; a simulation
    can then repeat the run bit for bit."""


@dataclass(frozen=True, config=STRICT)
class AllowSettings:
    """What a coordinator may ask of this site. The trainer refuses everything else."""

    federations: tuple[str, ...] | None = None
    """Names of federations. Unset: any."""

    models: tuple[str, ...] | None = None
    """Base models and generators, named as in a recipe. An entry allows the default branch of a hub repository;
    ``NAME@REVISION`` allows a recipe's ``model.revision``. Unset: any model and revision."""

    methods: tuple[str, ...] | None = None
    """Methods; an entry such as ``colora+head`` also allows a recipe to share that group. Unset: every method, with the
    shared groups of the method table only."""

    max_rank: Positive | None = None
    """Maximum rank of an adapter, all MultiLoRA modules together. Unset: any. Where the recipe's ``adapter.rank`` is
    up to 8 times as large, the site trains an adapter of this rank if the method shares A and B. Other recipes are
    refused."""

    max_steps: Positive | None = None
    """Maximum number of optimizer steps in one round, in the final steps, and in the preparation of a transfer. With
    ``train.epochs`` the steps are those of this site's rows. With ``train.fallback`` the steps of both models count.
    Unset: any."""

    max_seconds: PositiveFloat | None = None
    """Maximum time in seconds of one round's training and evaluation, and of a transfer. Unset: any."""

    max_rounds: Positive | None = None
    """Maximum number of rounds of a federation. Unset: any."""

    max_batch_size: Positive | None = None
    """Maximum batch size in training, evaluation and generation. Unset: any."""

    max_new_tokens: Positive | None = None
    """Maximum number of tokens generated per example or prompt. Unset: any."""

    max_calls: Positive | None = None
    """Maximum number of generator calls in a transfer. Unset: any."""

    max_samples: Positive | None = None
    """Maximum number of synthetic texts in a transfer. Unset: any."""

    max_epochs: Positive | None = None
    """Maximum number of passes over the synthetic texts in a transfer. Unset: any."""

    max_disk: PositiveFloat = 20.0
    """Maximum size of one federation's state folder in GB. At this size the site refuses all requests of the
    federation."""

    max_tokens: Positive | None = None
    """Maximum ``model.max_length`` in tokens. Unset: any."""

    precision: tuple[Precision, ...] | None = None
    """Precisions of the base model's weights. Unset: any."""

    max_seeds: Count = 5
    """Maximum number of texts that the site keeps for a transfer to a new base model. 0 refuses the preparation."""

    tuned_generator: bool = False
    """Whether the site may also keep a generator fine-tuned on its texts, which can repeat parts of them."""

    min_examples: Positive | None = None
    """Minimum number of examples behind one update, repetitions included: the optimizer steps of a round on a shared
    group, times the batch size. Unset: any."""

    min_batch_size: Positive | None = None
    """Minimum ``train.batch_size``. Unset: any."""

    min_max_length: Positive | None = None
    """Minimum ``model.max_length`` in tokens. Unset: any."""

    optimizers: tuple[Optimizer, ...] | None = None
    """Optimizers. Unset: any."""

    require_clipping: bool = False
    """Whether a recipe must set ``train.max_update_norm``."""

    max_epsilon: PositiveFloat | None = None
    """Maximum privacy budget ε of all federations together, at the recipe's δ. A recipe without ``[privacy]`` is then
    refused. Unset: any."""

    max_delta: Probability = 1e-5
    """Maximum δ of differential privacy."""

    min_noise: PositiveFloat | None = None
    """Minimum noise multiplier of differential privacy. A recipe without ``[privacy]`` is then refused. Unset: any."""

    require_secure_aggregation: bool = False
    """Whether a recipe must set ``privacy.secure_aggregation``."""

    min_sites: Positive = 3
    """Minimum ``privacy.min_sites``: the smallest number of sites in a secure sum."""

    metrics: Literal["all", "rounded", "none"] = "all"
    """Which metrics a reply holds. ``rounded`` rounds them as far as the number of examples makes them uncertain.
    ``none`` holds none, not even the training loss, and refuses a recipe with ``train.report_benefit`` or
    ``evaluation.validation_loss``."""

    max_evaluations: Positive | None = None
    """Maximum number of different requests of one round, and of one validation after a round, that are answered with
    metrics. Unset: any."""

    max_requests_per_day: Positive | None = None
    """Maximum number of different requests of all federations in a day (UTC). A repeated request does not count. Unset:
    any."""


ORDINARY = AllowSettings(
    max_rank=32,
    min_examples=24,
    min_batch_size=8,
    min_max_length=32,
    optimizers=("adamw", "adam"),
    max_evaluations=1,
    max_requests_per_day=500,
)
"""The limits that ``colora provision`` writes, and that ``colora client --check`` compares plans with."""


@dataclass(frozen=True, config=STRICT)
class SiteSettings:
    """A site file. Relative paths start at its folder."""

    name: Name
    """The site's name in the roster."""

    data: DataSettings
    """Rows. The keys are those of a recipe's ``[data]``."""

    coordinator: CoordinatorSettings | None = None
    """The coordinator. Not needed in a simulation."""

    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    """The trainer."""

    private: Private | None = None
    """Private adapter of the site's own choice: a kind, or a table. Unset: the recipe's."""

    on_unprepared: Literal["wait", "evaluate", "retrain"] = "wait"
    """What to do in a transfer to a new base model that the site did not prepare. ``wait`` takes no part. ``evaluate``
    evaluates the new shared adapter on the site's rows after the last round. ``retrain`` trains on the site's rows."""

    allow: AllowSettings = field(default_factory=AllowSettings)
    """Limits on requests."""

    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    """Experiment trackers that log what this site does and measures."""
