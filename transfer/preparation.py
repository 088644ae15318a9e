"""What a site prepares for a later transfer: seed texts, a discriminator and, if configured, a tuned generator.

Trans-LoRA (arXiv 2405.17258), section 3.1. All three are personal state. Both LoRAs are trained on inputs only; labels
and answers are read only to draw diverse seeds.
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
from ..common.models.architecture import check_generates, skeleton
from ..common.models.base_model import BaseModel, load_base_model
from ..common.models.tokenizer import load_tokenizer
from ..common.seeds import seed_from
from ..common.training.loop import StepCallback
from .discriminator import Discriminator, answer_ids
from .sampling import Deduplicator, generate_texts, one_line
from .tuned_generator import TunedGenerator

TEXT_TASKS = tuple(name for name, spec in TASK_TABLE.items() if spec.can_transfer)


@dataclass(frozen=True)
class TransferArtifacts:
    """What a site keeps for a transfer.

    ``seeds`` are real inputs, ``examples`` is the number of training rows. ``discriminator`` and ``tuned_generator``
    hold LoRA values by parameter name; they are empty where the settings need none.
    """

    seeds: tuple[str, ...]
    dataset_name: str
    examples: int
    discriminator: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tuned_generator: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def satisfies(self, settings: TransferSettings) -> bool:
        """Whether a transfer with these settings has everything it needs."""
        can_filter = bool(self.discriminator) or settings.filter != "discriminator"
        return can_filter and (bool(self.tuned_generator) or settings.generator.mode != "tuned")


def generator_settings(plan: Plan, task: str) -> ModelSettings:
    """Return the settings of the causal model that generates texts.

    It is the base model itself for a generation task, else ``transfer.generator.model``. Raises ModelError where an
    encoder has no generator.
    """
    if TASK_TABLE[task].needs_causal_lm:
        return plan.model
    if plan.transfer.generator.model is None:
        raise ModelError(
            "transfer.generator.model",
            "a causal model that generates texts",
            "nothing",
            message="transfer.generator.model is not set, and the base model cannot generate texts.",
            hint="Set it to a causal language model.",
        )
    return ModelSettings(plan.transfer.generator.model, device=plan.model.device, max_length=plan.model.max_length)


def prepare(
    base: BaseModel,
    plan: Plan,
    site: SiteDataset,
    seed: int,
    previous: TransferArtifacts | None = None,
    on_step: StepCallback | None = None,
) -> TransferArtifacts:
    """Draw seeds, and train the tuned generator and the discriminator where the settings need them.

    ``base`` is the model that ``generator_settings`` describes. Parts of ``previous`` are kept, not trained again.
    An exception from ``on_step`` ends the preparation. Raises DataError where the site has too few different texts,
    ModelError where the generator produces no new text.
    """
    settings, answers = plan.transfer, dict(_inputs(base.tokenizer, site.train, plan.model.max_length))
    inputs, model = list(answers), generator_settings(plan, site.task)
    artifacts = previous or TransferArtifacts(
        _draw_seeds(answers, settings, seed), settings.dataset_name or plan.name, len(site.train)
    )
    with with_generator(base, model, settings, artifacts.tuned_generator, seed) as tuned:
        if tuned and not artifacts.tuned_generator:
            tuned.fit(inputs, len(artifacts.seeds), on_step)
            artifacts = dataclasses.replace(artifacts, tuned_generator=tuned.values())
        if artifacts.discriminator or settings.filter != "discriminator":
            return artifacts
        texts = generate_negatives(base, artifacts.seeds, inputs, settings, seed)
    if not texts:
        key = _generator_key(site.task)
        raise ModelError(
            key,
            "a model that continues a list of examples",
            "no new text",
            message=f"{key}: {model.source} generated no new text from the seeds.",
            hint="Choose a larger generator, or one that is trained to follow instructions.",
        )
    with Discriminator(base, model, settings, artifacts.dataset_name, seed).attached() as discriminator:
        real = match_lengths(base.tokenizer, inputs, texts, plan.model.max_length, seed)
        discriminator.fit(real, texts, on_step)
        return dataclasses.replace(artifacts, discriminator=discriminator.values())


@contextmanager
def with_generator(
    base: BaseModel, model: ModelSettings, settings: TransferSettings, values: Mapping[str, torch.Tensor], seed: int = 0
) -> Iterator[TunedGenerator | None]:
    """Attach the tuned generator's LoRA to ``base`` where the settings ask for one; else run the bare model."""
    activate(base.backbone, [])
    if settings.generator.mode != "tuned":
        yield None
        return
    with TunedGenerator(base, model, settings, seed).attached(values) as tuned:
        yield tuned


def check_preparation(plan: Plan, site: SiteDataset, previous: TransferArtifacts | None = None) -> None:
    """Raise before the first round what ``prepare`` would raise after the last, without loading weights.

    ConfigError for a task without texts. ModelError where no model generates texts or the generator cannot be a
    discriminator. DataError where there are too few different texts. Each error names the site.
    """
    try:
        _check(plan, site, previous)
    except ColoraError as error:
        raise error.at_site(site.site) from None


def _check(plan: Plan, site: SiteDataset, previous: TransferArtifacts | None) -> None:
    if site.task not in TEXT_TASKS:
        raise ConfigError(
            "transfer.prepare",
            f"false, or a task of {' or '.join(TEXT_TASKS)}",
            site.task,
            message=f"transfer.prepare needs a task of {' or '.join(TEXT_TASKS)}, but data.task is {site.task}.",
        )
    if any("text_pair" in row for row in site.train):
        message = "transfer.prepare needs single texts, but the site's rows are pairs of texts (data.text_pair)."
        raise ConfigError("transfer.prepare", "false, or single texts", "pairs of texts", message=message)
    model, settings = generator_settings(plan, site.task), plan.transfer
    key = _generator_key(site.task)
    check_generates(model, key)
    tokenizer = load_tokenizer(model, key)
    if previous is None:
        _check_enough(_inputs(tokenizer, site.train, plan.model.max_length), settings)
    if settings.filter == "discriminator":
        answer_ids(tokenizer, model.source, key)
        inject(skeleton(model), Discriminator.spec_of(settings), Discriminator.name)
    if settings.generator.mode == "tuned":
        inject(skeleton(model), TunedGenerator.spec_of(settings), TunedGenerator.name)


def _generator_key(task: str) -> str:
    """The recipe key that names the generator."""
    return "model.source" if TASK_TABLE[task].needs_causal_lm else "transfer.generator.model"


def _inputs(tokenizer: Any, rows: Sequence[Row], limit: int) -> Iterator[tuple[str, str | None]]:
    """Yield each different input that is not blank, truncated to ``limit`` tokens, with its answer."""
    seen: set[str] = set()
    for row in rows:
        text = truncate(tokenizer, one_line(input_of(row)), limit)
        if text and text not in seen:
            seen.add(text)
            yield text, answer_of(row)


def _check_enough(inputs: Iterable[Any], settings: TransferSettings) -> None:
    count = len(list(islice(inputs, settings.seeds)))
    if count < settings.seeds:
        raise DataError(
            "transfer.seeds",
            f"{settings.seeds} different texts to choose from",
            count,
            message=f"transfer.seeds needs {settings.seeds} different texts, but the site has only {count}.",
            hint="Lower transfer.seeds, or give the site more rows.",
        )


def _draw_seeds(answers: Mapping[str, str | None], settings: TransferSettings, seed: int) -> tuple[str, ...]:
    """Draw inputs at random, alternating between answers: generated texts resemble the seeds."""
    _check_enough(answers, settings)
    by_answer: dict[str | None, list[str]] = {}
    for text in random.Random(seed_from(seed, "seeds")).sample(list(answers), len(answers)):
        by_answer.setdefault(answers[text], []).append(text)
    alternating = chain.from_iterable(zip_longest(*by_answer.values()))
    return tuple(islice((text for text in alternating if text is not None), settings.seeds))


def generate_negatives(
    base: BaseModel, seeds: Sequence[str], inputs: Sequence[str], settings: TransferSettings, seed: int
) -> list[str]:
    """Generate as many new texts as there are inputs, or as many as ``max_calls`` calls of the generator give.

    Texts that repeat a real input are left out.
    """
    texts: list[str] = []
    is_new = Deduplicator([*seeds, *inputs])
    sampling_seed = seed_from(seed, "negatives")
    for call in range(settings.generator.max_calls):
        texts += [t for t in generate_texts(base, seeds, settings.generator, sampling_seed, call) if is_new(t)]
        if len(texts) >= len(inputs):
            break
    return texts[: len(inputs)]


def match_lengths(tokenizer: Any, inputs: Sequence[str], texts: Sequence[str], limit: int, seed: int) -> list[str]:
    """Shorten inputs that were truncated to ``limit`` tokens to the length of a randomly chosen synthetic text.

    Otherwise the discriminator learns length alone, and accepts only texts that do not end.
    """
    rng, lengths = random.Random(seed_from(seed, "cuts")), [_count_tokens(tokenizer, text) for text in texts]
    return [
        text
        if _count_tokens(tokenizer, text) < limit - 1
        else truncate(tokenizer, text, min(limit, rng.choice(lengths)))
        for text in inputs
    ]


def _count_tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def input_of(row: Row) -> str:
    """Return a row's text, its prompt, or the last user turn of its messages ("" without one)."""
    if "messages" in row:
        return next((turn["content"] for turn in reversed(row["messages"]) if turn["role"] == "user"), "")
    return str(row["text"] if "text" in row else row["prompt"])


def answer_of(row: Row) -> str | None:
    """Return a row's label, its completion, or the last turn of its messages."""
    return row["messages"][-1]["content"] if "messages" in row else row.get("label", row.get("completion"))


def truncate(tokenizer: Any, text: str, limit: int) -> str:
    """Return the first ``limit`` tokens of a text: the part that the site's model reads."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return text if len(ids) <= limit else tokenizer.decode(ids[:limit], skip_special_tokens=True)


def load_generator(plan: Plan, task: str) -> BaseModel:
    """Load the model that ``generator_settings`` describes."""
    return load_base_model(generator_settings(plan, task), generates=True)
