"""What a site keeps for a later transfer: seeds that it agrees to keep, and a discriminator (paper, section 3.1).

Where its recipe says so, a writer that has learnt its texts as well. All are personal state. Both LoRAs are trained on
inputs only; answers are read to draw seeds of many kinds.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from typing import Any

import torch

from ..common.adapters.inject import activate, inject
from ..common.config.schema import ModelSettings, Plan, TransferSettings
from ..common.dataset import TASKS as TASK_TABLE
from ..common.dataset import Row, SiteDataset
from ..common.errors import ColoraError, ConfigError, DataError, ModelError
from ..common.models.base_model import BaseModel, check_generates, load_base_model, load_tokenizer, skeleton
from ..common.seeds import seed_from
from ..common.training.loop import StepCallback
from .discriminator import Discriminator, answer_ids
from .sampling import Deduplicator, generate_texts, one_line
from .tuned_generator import TunedGenerator

TASKS = tuple(name for name, spec in TASK_TABLE.items() if spec.can_transfer)


@dataclass(frozen=True)
class TransferArtifacts:
    """Seeds, how many examples the site had, and the values of discriminator and writer (none where not needed)."""

    seeds: tuple[str, ...]
    dataset_name: str
    examples: int
    discriminator: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tuned_generator: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def satisfies(self, settings: TransferSettings) -> bool:
        """Whether a transfer with these settings has all that it needs."""
        judged = bool(self.discriminator) or settings.filter != "discriminator"
        return judged and (bool(self.tuned_generator) or settings.writer != "tuned")


def generator_settings(plan: Plan, task: str) -> ModelSettings:
    """The causal model beside a plan's base model: the base model itself where it generates, else the generator.

    Raises ModelError where an encoder has no generator named.
    """
    if TASK_TABLE[task].needs_causal_lm:
        return plan.model
    if plan.transfer.generator is None:
        wanted = "a causal model that writes texts, as the base model cannot"
        raise ModelError("transfer.generator", wanted, "nothing")
    return ModelSettings(plan.transfer.generator, device=plan.model.device, max_length=plan.model.max_length)


def prepare(
    base: BaseModel,
    plan: Plan,
    site: SiteDataset,
    seed: int,
    before: TransferArtifacts | None = None,
    watch: StepCallback | None = None,
) -> TransferArtifacts:
    """Draws seeds and trains writer and discriminator, as needed, on ``base``: the model that :func:`speaker` names.

    What was kept ``before`` stays. ``watch`` may end it. Raises DataError where there are not enough texts.
    """
    settings, answers = plan.transfer, dict(_inputs(base.tokenizer, site.train, plan.model.max_length))
    inputs, model = list(answers), generator_settings(plan, site.task)
    kept = before or TransferArtifacts(_seeds(answers, settings, seed), settings.about or plan.name, len(site.train))
    with with_generator(base, model, settings, kept.tuned_generator, seed) as writer:
        if writer and not kept.tuned_generator:
            writer.fit(inputs, len(kept.seeds), watch)
            kept = dataclasses.replace(kept, tuned_generator=writer.values())
        if kept.discriminator or settings.filter != "discriminator":
            return kept
        texts = generate_negatives(base, kept.seeds, inputs, settings, seed)
    if not texts:
        wanted = "a model that goes on with a list of examples"
        raise ModelError(_field(site.task), wanted, "no text that is new")
    with Discriminator(base, model, settings, kept.dataset_name, seed).attached() as found:
        found.fit(match_lengths(base.tokenizer, inputs, texts, plan.model.max_length, seed), texts, watch)
        return dataclasses.replace(kept, discriminator=found.values())


@contextmanager
def with_generator(
    base: BaseModel, model: ModelSettings, settings: TransferSettings, values: Mapping[str, torch.Tensor], seed: int = 0
) -> Iterator[TunedGenerator | None]:
    """``base`` with the tuned writer's LoRA and what it learnt, where the settings say so; else bare."""
    activate(base.backbone, [])
    if settings.writer != "tuned":
        yield None
        return
    with TunedGenerator(base, model, settings, seed).attached(values) as writer:
        yield writer


def check_preparation(plan: Plan, site: SiteDataset, before: TransferArtifacts | None = None) -> None:
    """Raises before the first round what :func:`prepare` would raise after the last, without loading weights.

    ConfigError for rows without texts; ModelError where nobody can write, or the writer cannot be a discriminator;
    DataError where there are not enough different texts. Each names the site.
    """
    try:
        _check(plan, site, before)
    except ColoraError as error:
        raise error.at_site(site.site) from None


def _check(plan: Plan, site: SiteDataset, before: TransferArtifacts | None) -> None:
    if site.task not in TASKS:
        raise ConfigError("transfer.prepare", f"false, or a task of {' or '.join(TASKS)}", site.task)
    model, settings = generator_settings(plan, site.task), plan.transfer
    field = _field(site.task)
    check_generates(model, field)
    tokenizer = load_tokenizer(model, field)
    if before is None:
        _check_enough(_inputs(tokenizer, site.train, plan.model.max_length), settings)
    if settings.filter == "discriminator":
        answer_ids(tokenizer, model.source, field)
        inject(skeleton(model), Discriminator.spec_of(settings), Discriminator.name)
    if settings.writer == "tuned":
        inject(skeleton(model), TunedGenerator.spec_of(settings), TunedGenerator.name)


def _field(task: str) -> str:
    """The key that names the speaker."""
    return "model.source" if TASK_TABLE[task].needs_causal_lm else "transfer.generator"


def _inputs(tokenizer: Any, rows: Sequence[Row], limit: int) -> Iterator[tuple[str, str | None]]:
    """The different inputs of rows, each with its answer; of a long one its first ``limit`` tokens."""
    seen: set[str] = set()
    for row in rows:
        text = shortened(tokenizer, one_line(input_of(row)), limit)
        if text not in seen:
            seen.add(text)
            yield text, answer_of(row)


def _check_enough(inputs: Iterable[Any], settings: TransferSettings) -> None:
    found = len(list(islice(inputs, settings.seeds)))
    if found < settings.seeds:
        raise DataError("transfer.seeds", f"{settings.seeds} different texts to choose from", found)


def _seeds(answers: Mapping[str, str | None], settings: TransferSettings, seed: int) -> tuple[str, ...]:
    """Inputs drawn at random, one of each answer in turn: what no seed is like, no written text will be like."""
    _check_enough(answers, settings)
    by_answer: dict[str | None, list[str]] = {}
    for text in random.Random(seed_from(seed, "seeds")).sample(list(answers), len(answers)):
        by_answer.setdefault(answers[text], []).append(text)
    turns = chain.from_iterable(zip_longest(*by_answer.values()))
    return tuple(islice((text for text in turns if text is not None), settings.seeds))


def generate_negatives(
    base: BaseModel, seeds: Sequence[str], inputs: Sequence[str], settings: TransferSettings, seed: int
) -> list[str]:
    """As many new texts as there are inputs, of the model as it stands, or what ``settings.calls`` calls give.

    A real text that was written again is not a written one.
    """
    texts: list[str] = []
    new = Deduplicator([*seeds, *inputs])
    for call in range(settings.calls):
        texts += [
            text for text in generate_texts(base, seeds, settings, seed_from(seed, "negatives"), call) if new(text)
        ]
        if len(texts) >= len(inputs):
            break
    return texts[: len(inputs)]


def match_lengths(tokenizer: Any, inputs: Sequence[str], texts: Sequence[str], limit: int, seed: int) -> list[str]:
    """Inputs, of which those that end only where they were cut (``limit``) become as long as some written text.

    Else a discriminator learns lengths alone: it would keep what rambles on, and nothing that ends.
    """
    rng, lengths = random.Random(seed_from(seed, "cuts")), [_tokens(tokenizer, text) for text in texts]
    return [
        text if _tokens(tokenizer, text) < limit - 1 else shortened(tokenizer, text, min(limit, rng.choice(lengths)))
        for text in inputs
    ]


def _tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def input_of(row: Row) -> str:
    """What a row asks: its text, its prompt, or the last turn before the answer."""
    if "messages" in row:
        return next(turn["content"] for turn in reversed(row["messages"]) if turn["role"] == "user")
    return str(row["text"] if "text" in row else row["prompt"])


def answer_of(row: Row) -> str | None:
    """What a row answers: its label, its completion, or its last turn."""
    return row["messages"][-1]["content"] if "messages" in row else row.get("label", row.get("completion"))


def shortened(tokenizer: Any, text: str, limit: int) -> str:
    """The first ``limit`` tokens of a text: what the site's model reads of it."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return text if len(ids) <= limit else tokenizer.decode(ids[:limit], skip_special_tokens=True)


def load_generator(plan: Plan, task: str) -> BaseModel:
    """The causal model that :func:`speaker` names, in memory."""
    return load_base_model(generator_settings(plan, task), generates=True)
