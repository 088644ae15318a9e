"""Settings of local training and evaluation."""

from __future__ import annotations

import math
from typing import Literal

from pydantic.dataclasses import dataclass

from .field_types import STRICT, Count, Group, Positive, PositiveFloat, Probability, Rate

Optimizer = Literal["adamw", "adam", "sgd"]
DEFAULT_STEPS = 5  # of a round with ``joint``, where neither ``steps`` nor ``epochs`` is set
ROUNDING = 1e-9  # of a step, so that 0.1 epochs of 30 rows are 3 rows and not a little more


@dataclass(frozen=True, config=STRICT)
class PhaseSettings:
    """One phase of ``schedule = "phases"``."""

    steps: Positive
    """Number of optimizer steps."""

    groups: tuple[Group, ...]
    """Parameter groups that are trained. Groups that the method does not have or train are skipped."""


@dataclass(frozen=True, config=STRICT)
class TrainSettings:
    """Local training at a site.

    With ``joint``, all trained groups take ``steps`` steps. With ``alternating``, the personal groups take
    ``personal_steps`` while the shared ones are frozen, then the shared groups take ``shared_steps`` while the personal
    ones are frozen. With ``phases``, the ``[[train.phase]]`` tables run one after the other.
    """

    schedule: Literal["joint", "alternating", "phases"] = "joint"
    """Which groups are trained when, within a round."""

    steps: Positive | None = None
    """Optimizer steps per round with ``joint``. Unset: 5, or those of ``epochs``."""

    epochs: PositiveFloat | None = None
    """Passes over a site's own training examples per round, instead of ``steps``; fractions are allowed. A site with
    more examples takes more steps. Requires ``joint``."""

    personal_steps: Positive = 2
    """Optimizer steps per round on the personal groups with ``alternating``."""

    shared_steps: Positive = 3
    """Optimizer steps per round on the shared groups with ``alternating``."""

    phase: tuple[PhaseSettings, ...] = ()
    """The phases of a round, as ``[[train.phase]]`` tables. Required with ``phases``, not allowed otherwise."""

    final_steps: Count = 0
    """Optimizer steps on personal groups after the last round."""

    final_groups: tuple[Group, ...] | None = None
    """Personal groups that the final steps train. Unset: all personal groups."""

    batch_size: Positive = 8
    """Examples per optimizer step."""

    micro_batch: Positive | None = None
    """Examples per forward and backward pass; gradients are accumulated. Unset: ``batch_size``. Halved automatically
    when the device runs out of memory."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""

    optimizer: Optimizer = "adamw"
    """Local optimizer."""

    lr: Rate = 1e-3
    """Learning rate of A and B."""

    core_lr: Rate | None = None
    """Learning rate of the cores. Unset: ``lr``."""

    head_lr: Rate | None = None
    """Learning rate of the head. Unset: ``lr``."""

    private_lr: Rate | None = None
    """Learning rate of the private adapter. Unset: ``lr``."""

    head_init: Literal["random", "probe"] | None = None
    """Initial values of a personal linear head. ``probe`` fits a regression to the frozen features of the site's
    training examples (arXiv 2202.10054). Unset: ``probe`` in a transfer to a new base model, else ``random``."""

    final_head: Literal["trained", "probe"] | None = None
    """A personal linear head after the final steps. ``probe`` replaces it with a logistic regression on the final
    features of the site's training examples. Unset: ``probe`` with ``[privacy]``, else ``trained``."""

    weight_decay: Rate = 0.0
    """Weight decay of the optimizer. MultiLoRA scales are exempt."""

    max_grad_norm: Rate = 1.0
    """Maximum gradient norm, by clipping. 0 turns clipping off."""

    max_update_norm: PositiveFloat | None = None
    """Maximum Frobenius norm of a site's update over all shared arrays. The site scales longer updates down. Unset: no
    limit."""

    class_weights: Literal["balanced"] | None = None
    """Weights of examples in classification. ``balanced`` gives every label of a site the same total weight. In
    multi-label classification, it gives the texts with a label the same total weight as the texts without it. Unset:
    all examples have the same weight."""

    label_smoothing: Probability = 0.0
    """Label smoothing in classification: fraction of the target probability that the training loss spreads over all
    labels. In multi-label classification, every label is a binary target: the fraction is spread over both values."""

    lr_schedule: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "constant"
    """Learning rate schedule over the optimizer steps of all rounds and the final steps."""

    warmup_steps: Count = 0
    """Optimizer steps of linear warm-up at the start of the schedule."""

    warmup_ratio: Probability = 0.0
    """Fraction of all optimizer steps that is warm-up, instead of ``warmup_steps``."""

    report_benefit: bool = False
    """Report in every round the ratio of the loss with the shared adapter to the loss without it, on the site's own
    examples. ``server.weights = "benefit"`` turns it on. It takes one pass over at most 64 examples for a task with a
    linear head, and several passes otherwise."""

    fallback: Literal["local"] | None = None
    """``local`` also trains a local model at each site, alone, for as many steps on the same rows. At the end the site
    keeps it if its mean loss on the site's validation rows is lower by more than one standard error. It needs
    ``data.validation_fraction`` and doubles the training time. Unset: the collaborative model is kept."""

    keep_states: Literal["newest", "all"] = "newest"
    """Which states a site keeps on disk. ``newest``: the last one and the few that it was trained from. ``all``: one
    for every round, which ``--round`` of ``colora export`` and ``colora predict`` selects. ``server.keep = "best"``
    turns it on."""

    persist_optimizer_state: bool = False
    """Keep a site's optimizer state from round to round. Otherwise every round starts with a new optimizer."""

    @property
    def models(self) -> int:
        """Number of models that a site trains."""
        return 1 if self.fallback is None else 2

    @property
    def by_epochs(self) -> bool:
        """Whether the number of steps in a round depends on the site's number of training examples."""
        return self.epochs is not None and self.schedule == "joint"

    def steps_per_round(self, examples: int) -> int:
        """Optimizer steps of one round at a site with so many training examples.

        A pass over n examples takes n / ``batch_size`` steps. The steps of a round are rounded up.
        """
        if self.schedule == "alternating":
            return self.personal_steps + self.shared_steps
        if self.schedule == "phases":
            return sum(phase.steps for phase in self.phase)
        if self.epochs is None:
            return self.steps or DEFAULT_STEPS
        batch = min(self.batch_size, examples)
        return math.ceil(self.epochs * examples / batch - ROUNDING) if batch else 0

    def examples_per_round(self, examples: int) -> int:
        """The most examples, with repetitions, that one round at a site with so many examples trains on."""
        batch = min(self.batch_size, examples) if self.by_epochs else self.batch_size
        return self.steps_per_round(examples) * batch

    @property
    def learning_rates(self) -> dict[str, float]:
        """The learning rates that are set, by key."""
        rates = {name: getattr(self, name) for name in ("lr", "core_lr", "head_lr", "private_lr")}
        return {name: rate for name, rate in rates.items() if rate is not None}


@dataclass(frozen=True, config=STRICT)
class EvaluationSettings:
    """When and how sites evaluate the model that arrives."""

    every: Count = 1
    """Rounds between evaluations. Round 1 and the end are always evaluated; with 0, only the end is."""

    batch_size: Positive = 32
    """Examples per batch."""

    max_new_tokens: Positive = 32
    """Maximum number of tokens generated per example, in generation tasks."""

    validation_loss: bool = False
    """Measure the mean loss of the personal model on the site's validation rows after every round. ``server.keep =
    "best"`` and ``server.patience`` turn it on. It needs ``data.validation_fraction``."""

    generate_at_end_only: bool = True
    """Generate text only at the start and the end; evaluations in between measure the token loss."""
