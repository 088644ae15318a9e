"""The recipe table ``[transfer]``: Trans-LoRA (arXiv 2405.17258), the transfer to a new base model without the data."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from pydantic.dataclasses import dataclass

from .field_types import STRICT, Count, Fraction, Name, Positive, PositiveFloat, Rate


@dataclass(frozen=True, config=STRICT)
class TransferGeneratorSettings:
    """The causal model that generates synthetic texts, and how it samples them."""

    model: str | None = None
    """Source of the generator. Required where the base model is an encoder."""

    mode: Literal["target", "source", "tuned"] = "target"
    """Which model generates. ``target``: the new base model. ``source``: the old one. ``tuned``: the old one with a
    LoRA that the preparation fine-tuned on the site's texts, which it may repeat. An encoder uses ``model`` always."""

    max_calls: Positive = 200
    """Maximum number of generator calls, each with ``batch_size`` prompts."""

    batch_size: Positive = 8
    """Prompts per call."""

    max_new_tokens: Positive = 160
    """Tokens generated per prompt. A prompt asks for as many texts as there are seeds."""

    temperature: PositiveFloat = 1.0
    """Sampling temperature."""

    top_k: Count = 50
    """Number of most likely tokens to sample from. 0: all."""

    top_p: Fraction = 1.0
    """Nucleus sampling: the smallest set of tokens whose probabilities add up to this."""

    tuning_steps: Positive = 12
    """Optimizer steps of the tuned generator's LoRA, each on two lists of ten texts."""

    tuning_lr: Rate = 3e-3
    """Learning rate of the tuned generator's LoRA."""


@dataclass(frozen=True, config=STRICT)
class DiscriminatorSettings:
    """The discriminator: a LoRA on the generator that tells a site's texts from generated ones."""

    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    """Modules of the discriminator's LoRA. The tuned generator's LoRA is on all linear layers."""

    rank: Positive = 8
    """Rank of the discriminator's LoRA and of the tuned generator's LoRA."""

    lr: Rate = 1e-3
    """Learning rate."""

    steps: Positive = 60
    """Optimizer steps. Half of each batch is real, half is generated."""


@dataclass(frozen=True, config=STRICT)
class DistillationSettings:
    """Training of the new adapter on synthetic texts with the old model's answers."""

    epochs: Positive = 20
    """Passes over the synthetic texts."""

    lr: Rate = 1e-3
    """Learning rate."""


@dataclass(frozen=True, config=STRICT)
class TransferSettings:
    """Transfer to a new base model (Trans-LoRA, arXiv 2405.17258): what a site prepares, and how it transfers."""

    prepare: bool = False
    """After the last round, keep seeds, and train a discriminator and a tuned generator where they are used. All of it
    is personal state."""

    source_federation: Name | None = None
    """Federation whose sites transfer their models to this recipe's base model before round 1. Set by
    ``--transfer-to``."""

    dataset_name: str = ""
    """Name of the data in the discriminator's question. Unset: the federation's name."""

    seeds: Positive = 5
    """Number of real texts that the site keeps."""

    samples: Positive | None = None
    """Number of synthetic texts to accept. Unset: as many as the site trained on."""

    filter: Literal["discriminator", "titok", "none"] = "discriminator"
    """Which synthetic texts are kept. ``titok`` (arXiv 2510.04682) is for generation tasks only."""

    generator: TransferGeneratorSettings = field(default_factory=TransferGeneratorSettings)
    discriminator: DiscriminatorSettings = field(default_factory=DiscriminatorSettings)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
