"""Sampling of synthetic inputs: a causal model continues a numbered list that begins with the seed texts."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..common.config.schema import TransferGeneratorSettings
from ..common.models.base_model import BaseModel
from ..common.seeds import seed_from

LIST_ITEM = re.compile(r"^\s*(\d+)[.)]\s*(.*)$")
MIN_WORDS = 2  # shorter items are discarded


def list_prompt(seeds: Sequence[str]) -> str:
    """Return the paper's prompt (section 3.2): ``Here are 10 examples:``, five seeds as items 1 to 5, then ``6.``."""
    return f"{numbered_list(seeds, 2 * len(seeds))}\n{len(seeds) + 1}."


def numbered_list(texts: Sequence[str], announced: int) -> str:
    """Return ``Here are ANNOUNCED examples:`` and the texts, numbered, one a line."""
    lines = [f"{i}. {one_line(text)}" for i, text in enumerate(texts, 1)]
    return "\n".join([f"Here are {announced} examples:", *lines])


def parse_list(continuation: str, first: int, count: int, *, ended: bool) -> list[str]:
    """Read the list items ``first`` to ``first + count - 1`` from what a model generated after ``first.``.

    The last item counts only where the model completed it: with the next number, or with its end-of-text token
    (``ended``). Reading stops where the numbering breaks.
    """
    items: list[str] = []
    for line in f"{first}. {continuation.lstrip()}".split("\n"):
        match = LIST_ITEM.match(line)
        if match and int(match[1]) == first + len(items):
            items.append(match[2])
        elif items and line.strip() and not match:
            items[-1] += f" {line}"
        elif match:
            break
    complete = items if ended or len(items) > count else items[:-1]
    return [one_line(text) for text in complete[:count] if len(text.split()) >= MIN_WORDS]


def rotate_seeds(seeds: Sequence[str], seed: int, call: int, last: int) -> list[str]:
    """Shuffle the seeds and put seed ``last`` at the end: a model imitates most what it read last."""
    others = [text for i, text in enumerate(seeds) if i != last]
    return [*random.Random(seed_from(seed, "writing", call, last)).sample(others, len(others)), seeds[last]]


def generate_texts(
    base: BaseModel, seeds: Sequence[str], settings: TransferGeneratorSettings, seed: int, call: int
) -> Iterator[str]:
    """Generate the texts of one call; equal seeds and call numbers give equal texts on one machine.

    A call samples ``settings.batch_size`` continuations. Each seed in turn is the last of its prompt, and each of these
    different prompts is encoded once.
    """
    tokenizer, size = base.tokenizer, settings.batch_size
    last_seeds = [(call * size + i) % len(seeds) for i in range(size)]
    prompts = {
        last: tokenizer(list_prompt(rotate_seeds(seeds, seed, call, last)))["input_ids"]
        for last in sorted(set(last_seeds))
    }
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed_from(seed, "sampling", call))
        for length in sorted(set(map(len, prompts.values()))):  # nearly always one, as the prompts have the same seeds
            same_length = {last: ids for last, ids in prompts.items() if len(ids) == length}
            prompt = torch.tensor(list(same_length.values()), device=base.device)
            order = list(same_length)
            rows = torch.tensor([order.index(last) for last in last_seeds if last in same_length], device=base.device)
            for token_ids in _sample(base, prompt, rows, settings):
                ended = bool((token_ids == tokenizer.eos_token_id).any())
                text = tokenizer.decode(token_ids, skip_special_tokens=True)
                yield from parse_list(text, len(seeds) + 1, len(seeds), ended=ended)


def _sample(
    base: BaseModel, prompt: torch.Tensor, rows: torch.Tensor, settings: TransferGeneratorSettings
) -> torch.Tensor:
    """Sample continuations of the rows ``rows`` (n,) of ``prompt`` (m, length): token ids (n, longest)."""
    model: Any = base.language_model
    model.eval()
    out = model.generate(
        input_ids=prompt[rows],
        attention_mask=torch.ones_like(prompt)[rows],
        **_prompt_cache(base.backbone, prompt, rows),
        do_sample=True,
        top_k=settings.top_k,
        top_p=settings.top_p,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        pad_token_id=base.tokenizer.pad_token_id,
    )
    return out[:, prompt.shape[1] :]


def _prompt_cache(backbone: Any, prompt: torch.Tensor, rows: torch.Tensor) -> dict[str, Any]:
    """Return the key-value cache of these prompt rows without their last token; nothing where the model has none."""
    output: Any = backbone(input_ids=prompt[:, :-1], use_cache=True)
    name = "cache" if "cache" in output else "past_key_values"  # Transformers 5.24 renames it, here and in generate()
    cache: Any = getattr(output, name, None)
    layers = getattr(cache, "layers", ())
    if not layers or any(hasattr(layer, "conv_states") for layer in layers):  # linear attention: rows have no cache
        return {}
    cache.batch_select_indices(rows)
    return {name: cache}


class Deduplicator:
    """Accepts each text once and the known texts never, ignoring case, spaces and punctuation at both ends."""

    def __init__(self, known: Sequence[str]) -> None:
        self._seen = set(map(_normalize, known))

    def __call__(self, text: str) -> bool:
        """Return whether the text is new, and remember it."""
        normalized = _normalize(text)
        if not normalized or normalized in self._seen:
            return False
        self._seen.add(normalized)
        return True


def one_line(text: str) -> str:
    """Collapse all whitespace, line breaks included, to single spaces."""
    return " ".join(text.split())


def _normalize(text: str) -> str:
    return one_line(text).casefold().strip(" .,;:!?\"'()[]")
