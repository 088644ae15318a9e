"""Site files as frozen dataclasses; ``recipe.py`` reads them."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from .schema import STRICT, Count, DataSettings, Name, Positive, Precision, Private


@dataclass(frozen=True, config=STRICT)
class CoordinatorSettings:
    """Where a site finds its coordinator, and the key it is known by there. Relative paths start at the site file."""

    address: str  # host:port
    ca: str = "ca.crt"  # PEM
    key: str = "site.key"  # OpenSSH private key (ECDSA)
    insecure: bool = False  # neither TLS nor a key, for trials on one machine


@dataclass(frozen=True, config=STRICT)
class TrainerSettings:
    """The resident trainer of a site.

    ``listen`` is ``unix:PATH`` (the socket is the user's own, mode 0600) or ``HOST:PORT``, which needs the ``link``
    folder with ``ca.crt``, ``trainer.crt``, ``trainer.key``, ``node.crt`` and ``node.key`` for TLS on both sides.
    """

    listen: str = "unix:state/trainer.sock"
    link: str = "link"
    state: str = "state"  # folder of personal states and of the audit log
    device: str = "auto"
    threads: Positive | None = None  # torch threads; unset: all cores
    precision: Precision | None = None  # instead of what the recipe says, as may suit a small device
    gradient_checkpointing: bool | None = None
    micro_batch: Positive | None = None


@dataclass(frozen=True, config=STRICT)
class AllowSettings:
    """What a coordinator may ask of this site; the trainer refuses the rest. Unset: anything, as far as numbers go.

    Unset ``methods``: every method as the table has it, but no plan that shares a group which the table leaves here.
    """

    federations: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None  # sources as a recipe names them, transfer.generator.model too
    methods: tuple[str, ...] | None = None  # "colora"; "colora+head" where a recipe may share the head as well
    max_rank: Positive | None = None
    max_steps: Positive | None = None  # optimiser steps in one round, the final ones and a preparation's too
    max_seconds: Annotated[float, Field(gt=0)] | None = None  # of training in one round
    max_tokens: Positive | None = None  # tokens of one text (model.max_length)
    precision: tuple[Precision, ...] | None = None
    max_seeds: Count = 5  # of its texts that it keeps for a move to a new base model (transfer.seeds); 0: no such move
    tuned_generator: bool = False  # whether it also keeps a LoRA fine-tuned on its texts, which may repeat them


@dataclass(frozen=True, config=STRICT)
class SiteSettings:
    """A site file: who the site is, where its rows lie, whom it serves and what it allows.

    Relative paths start at the file's folder. A simulation needs no more than ``name`` and ``data``.
    """

    name: Name
    data: DataSettings
    coordinator: CoordinatorSettings | None = None
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    private: Private | None = None  # a private adapter of its own choice, instead of what the recipe says
    on_unprepared: Literal["wait", "evaluate", "retrain"] = "wait"  # in a move where it kept nothing; README
    allow: AllowSettings = field(default_factory=AllowSettings)
