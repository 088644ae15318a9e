"""Recipes as frozen dataclasses (site files: ``site.py``); ``recipe.py`` reads the files.

A recipe is one TOML file. Its ``Plan`` is the part that every site must agree on and that is hashed into
each order; the rest (data, sites, server, simulation) is the coordinator's or the simulation's own business.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import field
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from ..dataset import TaskKind
from ..errors import ConfigError
from ..methods import GROUPS, METHODS, PRIVATE_KINDS, Method, Role
from .diagnostics import config_error, did_you_mean

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
T = TypeVar("T")

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
if TYPE_CHECKING:
    PrivateKind = str
else:
    PrivateKind = Literal[tuple(PRIVATE_KINDS)]
Group = Literal["A", "B", "core", "scale", "private", "head"]
Precision = Literal["fp32", "bf16", "fp16", "int8", "int4"]


@dataclass(frozen=True, config=STRICT)
class ModelSettings:
    """The base model: a Hugging Face hub id, a local folder, or ``asset:NAME``."""

    source: str
    revision: str | None = None
    max_length: Positive = 256  # tokens; longer texts are cut and counted
    precision: Precision = "fp32"  # of the base model's weights; adapters and heads stay fp32
    device: str = "auto"  # of a simulation; a site of its own says its device in its site file


@dataclass(frozen=True, config=STRICT)
class AdapterSettings:
    """The LoRA form: ΔW = s · B Λ A with s = alpha/rank (alpha/√rank with ``rslora``)."""

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] | str = ("query", "value")
    core: Literal["full", "diagonal", "residual"] = "full"
    rslora: bool = False
    modules: Positive = 3  # n, of a method with MultiLoRA modules; ``rank`` is that of each


@dataclass(frozen=True, config=STRICT)
class PrivateSettings:
    """A private adapter beside the shared one, on any method: it never leaves its site.

    ``lora``: s · B A. ``multilora``: s · Σ_i s_i ⊙ B_i A_i with ``modules`` modules of ``rank`` each.
    """

    kind: PrivateKind
    rank: Positive = 4
    alpha: Annotated[float, Field(gt=0)] = 8.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] | str | None = None  # as the shared adapter's when unset
    rslora: bool = False
    modules: Positive = 3

    @property
    def present(self) -> bool:
        """Whether there is one."""
        return self.kind != "none"

    @property
    def slices(self) -> int:
        """n of n·r: MultiLoRA's modules, or 1."""
        return self.modules if PRIVATE_KINDS[self.kind] else 1

    @property
    def total_rank(self) -> int:
        """n·r; 0 where there is none."""
        return self.rank * self.slices if self.present else 0


def _by_kind(value: object) -> object:
    """``private = "multilora"`` names the kind alone; a table's lists become the tuples that strict mode wants."""
    if isinstance(value, str):
        return {"kind": value}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()} if isinstance(value, dict) else value


Private = Annotated[PrivateSettings, BeforeValidator(_by_kind)]


@dataclass(frozen=True, config=STRICT)
class MethodSettings:
    """A row of the method table, and groups that this recipe moves to another role."""

    name: str = "colora"
    A: Literal["shared", "personal", "frozen"] | None = None
    B: Literal["shared", "personal"] | None = None
    core: Literal["personal", "absent"] | None = None
    head: Literal["shared", "personal"] | None = None

    def row(self) -> Method:
        """The table's row with this recipe's changes."""
        if self.name not in METHODS:
            raise ConfigError("method.name", f"one of {', '.join(METHODS)}", did_you_mean(self.name, METHODS))
        moved = {g: Role(v) for g in GROUPS if (v := getattr(self, g, None)) is not None}
        return dataclasses.replace(METHODS[self.name], **moved)


@dataclass(frozen=True, config=STRICT)
class PhaseSettings:
    """``steps`` optimiser steps on these parameter groups; what a method does not have or train is left out."""

    steps: Positive
    groups: tuple[Group, ...]


@dataclass(frozen=True, config=STRICT)
class TrainSettings:
    """What one round of training means at a site.

    ``joint`` takes ``steps`` steps on all trained groups. ``alternating`` takes ``personal_steps`` on the personal
    groups with the shared ones frozen, then ``shared_steps`` the other way round. ``phases`` takes the ``phase`` tables
    one after the other. After the last round ``final_steps`` go to the personal groups alone, or to ``final_groups``.
    """

    schedule: Literal["joint", "alternating", "phases"] = "joint"
    steps: Positive = 5
    personal_steps: Positive = 2
    shared_steps: Positive = 3
    phase: tuple[PhaseSettings, ...] = ()
    final_steps: Count = 0
    final_groups: tuple[Group, ...] | None = None  # of the personal ones; all of them when unset
    batch_size: Positive = 8  # examples of one optimiser step
    micro_batch: Positive | None = None  # of them at once; gradients add up. It is halved where the device is too small
    gradient_checkpointing: bool = False
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Rate = 1e-3  # A and B
    core_lr: Rate | None = None  # as lr when unset
    head_lr: Rate | None = None  # as lr when unset
    private_lr: Rate | None = None  # as lr when unset
    head_init: Literal["random", "probe"] | None = None  # probe: a site's own linear head begins as a regression on
    # what it sees (linear probing before fine-tuning, arXiv:2202.10054); when unset, where a federation moves
    weight_decay: Rate = 0.0
    max_grad_norm: Rate = 1.0  # 0 turns clipping off
    max_update_norm: Annotated[float, Field(gt=0)] | None = None  # the site scales longer updates down; unset: never
    lr_schedule: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "constant"
    warmup_steps: Count = 0
    persist_optimizer_state: bool = False

    @property
    def steps_per_round(self) -> int:
        """Optimiser steps of one site in one round."""
        return {
            "joint": self.steps,
            "alternating": self.personal_steps + self.shared_steps,
            "phases": sum(phase.steps for phase in self.phase),
        }[self.schedule]


@dataclass(frozen=True, config=STRICT)
class EvaluationSettings:
    """When and how sites measure what arrives. Round 1 and the end are always measured (``every`` > 0)."""

    every: Count = 1  # rounds; 0 measures at the end only
    batch_size: Positive = 32
    max_new_tokens: Positive = 32  # generation
    generate_at_end_only: bool = True  # token loss each time, generated text at the start and the end


@dataclass(frozen=True, config=STRICT)
class CommunicationSettings:
    """How coordinator and sites exchange shared arrays."""

    codec: Literal["safetensors", "fp16", "bf16"] = "safetensors"  # safetensors: fp32; the others send half the bytes


@dataclass(frozen=True, config=STRICT)
class TransferSettings:
    """Trans-LoRA (arXiv 2405.17258): what a site prepares once it has trained, and how it moves to another base model.

    ``generator`` names a causal model that writes texts and tells them from real ones where the base model is an
    encoder; a model that generates does both itself.
    """

    prepare: bool = False  # after the last round, keep seeds and train discriminator and tuned writer (all personal)
    of: Name | None = None  # a federation: its sites' models move to this plan's base model before round 1
    seeds: Positive = 5  # examples that the site agrees to keep
    about: str = ""  # what the discriminator's question calls the data; the federation's name when empty
    generator: str | None = None
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")  # of the discriminator
    rank: Positive = 8  # of discriminator and tuned writer
    lr: Rate = 1e-3
    steps: Positive = 60  # of the discriminator, half of each batch real and half written
    filter: Literal["discriminator", "titok", "none"] = "discriminator"
    writer: Literal["target", "source", "tuned"] = "target"  # of the texts, where both generate; tuned: the source's,
    # with a LoRA that learnt the site's texts in preparation (it may repeat some of them)
    writer_steps: Positive = 12  # of that LoRA, on all linear layers; two lists of ten texts each
    writer_lr: Rate = 3e-3
    samples: Positive | None = None  # texts wanted; as many as the site trained on when unset
    calls: Positive = 200  # of the writer at most, each of ``batch`` prompts
    batch: Positive = 8
    max_new_tokens: Positive = 160  # of one prompt, which asks for as many texts as there are seeds
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_k: Count = 50  # the likeliest tokens, of which one is drawn; 0: all
    top_p: Fraction = 1.0
    distil_epochs: Positive = 20  # over the written texts
    distil_lr: Rate = 1e-3


@dataclass(frozen=True, config=STRICT)
class Plan:
    """What all sites agree on: it travels to them with every order and is part of a round's identity."""

    name: Name
    rounds: Positive
    model: ModelSettings
    seed: int = 0
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    method: MethodSettings = field(default_factory=MethodSettings)
    private: Private = field(default_factory=lambda: PrivateSettings("none"))
    train: TrainSettings = field(default_factory=TrainSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    transfer: TransferSettings = field(default_factory=TransferSettings)
    communication: CommunicationSettings = field(default_factory=CommunicationSettings)

    def row(self) -> Method:
        """The method's row, with the private adapter where there is one."""
        row = self.method.row()
        return dataclasses.replace(row, private=Role.PERSONAL) if self.private.present else row

    @property
    def probes_head(self) -> bool:
        """Whether a head that is a site's own is fitted before its first step."""
        asked = self.train.head_init or ("random" if self.transfer.of is None else "probe")
        return asked == "probe" and self.row().head is Role.PERSONAL

    @property
    def total_steps(self) -> int:
        """Optimiser steps of a site that takes part in every round, the final personalisation included."""
        return self.rounds * self.train.steps_per_round + self.train.final_steps


@dataclass(frozen=True, config=STRICT)
class DataSettings:
    """Where rows come from and what they mean.

    ``source`` is a .jsonl, .csv, .tsv, .parquet or .npz file, ``asset:NAME/SPLIT``, or a hub data set id.
    """

    source: str = ""
    test_source: str | None = None  # else a part of ``source`` is held out
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    task: TaskKind = "classification"
    text: str = "text"
    label: str = "label"
    label_columns: tuple[str, ...] | None = None  # multilabel: a column of 0 and 1 for each label, instead of label
    labels: tuple[str, ...] | None = None  # keep only these; also their order
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str | None = None  # a column of chat messages, instead of prompt and completion
    chat: bool = False  # prompt and completion as a user and an assistant turn of the chat template
    where: dict[str, str] | None = None  # keep only rows whose columns have these values
    train: Positive | None = None  # at most this many rows a site
    test: Positive | None = None
    shuffle: bool = True  # by seed, site and source, before ``train`` and ``test`` are taken


@dataclass(frozen=True, config=STRICT)
class PartitionSettings:
    """How a simulation makes sites out of one data set."""

    by: Literal["column", "iid", "dirichlet"]
    column: str | None = None  # by = "column": one site per value
    sites: Positive = 8  # iid and dirichlet
    alpha: Annotated[float, Field(gt=0)] = 0.5  # dirichlet concentration over labels


@dataclass(frozen=True, config=STRICT)
class SimulatedSiteSettings:
    """A site of a simulation: its name, its data and the round it joins in."""

    name: Name
    data: DataSettings = field(default_factory=DataSettings)
    from_round: Positive = 1  # the run's rounds + 1: joins when all is trained, and trains its personal groups alone
    private: Private | None = None  # instead of the recipe's


@dataclass(frozen=True, config=STRICT)
class ServerSettings:
    """The coordinator: how replies are admitted, weighed and applied."""

    aggregator: Literal["mean", "median", "trimmed_mean"] = "mean"  # how admitted updates become one
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.1  # fraction of the sites that trimmed_mean leaves out on each side
    optimizer: Literal["mean", "momentum", "adam", "yogi"] = "mean"
    lr: Annotated[float, Field(gt=0)] | None = None  # unset: the rule's own default
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta_1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta_2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3
    weights: Literal["tokens", "examples", "uniform"] | None = None  # unset: tokens; uniform where tasks are mixed
    fraction: Fraction = 1.0  # of the roster, asked each round
    quorum: Positive | None = None  # admitted replies a round needs; unset: more than half of the asked
    timeout: Annotated[float, Field(gt=0)] | None = None  # seconds a round may take; unset: no limit
    max_attempts: Positive = 3  # times a site is asked in one round when its answer is an error
    retry_interval: Annotated[float, Field(gt=0)] = (
        10.0  # seconds until a round without its quorum is tried again (deployed)
    )
    max_update_norm: Annotated[float, Field(gt=0)] = 1e4


@dataclass(frozen=True, config=STRICT)
class SimulationSettings:
    """One machine playing all sites."""

    engine: Literal["local", "ray"] = "local"
    threads: Positive | None = None  # torch threads; unset: all cores (local), 1 (ray)
    source_run: str | None = None  # the run folder of the federation that ``transfer.of`` names
    baseline: bool = False  # also train every site alone, with the same number of steps


@dataclass(frozen=True, config=STRICT)
class Recipe(Plan):
    """A whole experiment, as read from TOML."""

    description: str = ""
    data: DataSettings = field(default_factory=DataSettings)
    partition: PartitionSettings | None = None
    site: tuple[SimulatedSiteSettings, ...] = ()
    server: ServerSettings = field(default_factory=ServerSettings)
    simulation: SimulationSettings = field(default_factory=SimulationSettings)

    @property
    def plan(self) -> Plan:
        """The part that sites see."""
        return Plan(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Plan)})

    @property
    def identity(self) -> str:
        """A hash of everything that can change a result: not of how the machine plays the sites."""
        return digest(to_json(dataclasses.replace(self, simulation=SimulationSettings(), description="")))


def parse(kind: type[T], raw: dict[str, Any]) -> T:
    """A settings dataclass from plain dictionaries, strictly; ConfigError names the first wrong key."""
    try:
        return _adapter(kind).validate_json(json.dumps(raw, default=str))
    except pydantic.ValidationError as error:
        raise config_error(kind, error) from None


def to_json(settings: object) -> str:
    """Settings as one JSON string with sorted keys: what Flower carries and what is hashed."""
    return json.dumps(to_dict(settings), sort_keys=True)


def to_dict(settings: Any) -> dict[str, Any]:
    """Settings as plain dictionaries without the unset values, as TOML wants them."""
    return _without_none(json.loads(json.dumps(dataclasses.asdict(settings))))


def digest(text: str) -> str:
    """A short SHA-256 of a text, for identities."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@cache
def _adapter(kind: type) -> TypeAdapter:
    return TypeAdapter(kind)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value
