"""Synthetic inputs: a causal model goes on with a numbered list that begins with the seed examples."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..common.config.schema import TransferGeneratorSettings
from ..common.models.base_model import BaseModel
from ..common.seeds import seed_from

ITEM = re.compile(r"^\s*(\d+)[.)]\s*(.*)$")
SHORTEST = 2  # words of a text that counts


def list_prompt(seeds: Sequence[str]) -> str:
    """``Here are 10 examples:`` with the five seeds as items 1 to 5, and ``6.`` to go on from (paper, section 3.2)."""
    return f"{list_of(seeds, 2 * len(seeds))}\n{len(seeds) + 1}."


def list_of(texts: Sequence[str], announced: int) -> str:
    """``Here are … examples:`` and these texts, numbered, one a line."""
    lines = [f"{i}. {one_line(text)}" for i, text in enumerate(texts, 1)]
    return "\n".join([f"Here are {announced} examples:", *lines])


def parse_list(continuation: str, first: int, wanted: int, *, whole: bool) -> list[str]:
    """The list items ``first`` to ``first + wanted - 1`` of what a model wrote after ``first.``.

    The last item counts only where the model ended it itself: by the next number, or (``whole``) by its end of text.
    """
    found: list[str] = []
    for line in f"{first}. {continuation.lstrip()}".split("\n"):
        item = ITEM.match(line)
        if item and int(item[1]) == first + len(found):
            found.append(item[2])
        elif found and line.strip() and not item:
            found[-1] += f" {line}"
        elif item:
            break
    ended = found if whole or len(found) > wanted else found[:-1]
    return [one_line(text) for text in ended[:wanted] if len(text.split()) >= SHORTEST]


def rotate_seeds(seeds: Sequence[str], seed: int, call: int, last: int) -> list[str]:
    """The seeds in some order that ends with this one: a model goes on most like what it read last."""
    others = [text for i, text in enumerate(seeds) if i != last]
    return [*random.Random(seed_from(seed, "writing", call, last)).sample(others, len(others)), seeds[last]]


def generate_texts(
    base: BaseModel, seeds: Sequence[str], settings: TransferGeneratorSettings, seed: int, call: int
) -> Iterator[str]:
    """The texts of one call of the writer; equal seeds and call numbers give equal texts on one machine.

    A call asks ``settings.batch_size`` times, with each seed the last in turn, and reads each of these few prompts once.
    """
    tokenizer, turns = (
        base.tokenizer,
        [(call * settings.batch_size + i) % len(seeds) for i in range(settings.batch_size)],
    )
    prompts = {
        last: tokenizer(list_prompt(rotate_seeds(seeds, seed, call, last)))["input_ids"] for last in sorted(set(turns))
    }
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed_from(seed, "sampling", call))
        for length in sorted(set(map(len, prompts.values()))):  # nearly always one: the same seeds, in other orders
            alike = {last: ids for last, ids in prompts.items() if len(ids) == length}
            prompt = torch.tensor(list(alike.values()), device=base.device)
            which = torch.tensor([list(alike).index(last) for last in turns if last in alike], device=base.device)
            for row in _continued(base, prompt, which, settings):
                whole = bool((row == tokenizer.eos_token_id).any())
                text = tokenizer.decode(row, skip_special_tokens=True)
                yield from parse_list(text, len(seeds) + 1, len(seeds), whole=whole)


def _continued(
    base: BaseModel, prompt: torch.Tensor, which: torch.Tensor, settings: TransferGeneratorSettings
) -> torch.Tensor:
    """What the model says after the rows ``which`` (n,) of ``prompt`` (m, length): token ids (n, longest)."""
    model: Any = base.language_model
    model.eval()
    out = model.generate(
        input_ids=prompt[which],
        attention_mask=torch.ones_like(prompt)[which],
        **_read(base.backbone, prompt, which),
        do_sample=True,
        top_k=settings.top_k,
        top_p=settings.top_p,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        pad_token_id=base.tokenizer.pad_token_id,
    )
    return out[:, prompt.shape[1] :]


def _read(backbone: Any, prompt: torch.Tensor, which: torch.Tensor) -> dict[str, Any]:
    """The model's cache of all but the last token of these rows of prompts; nothing where it has none."""
    cache: Any = getattr(backbone(input_ids=prompt[:, :-1], use_cache=True), "past_key_values", None)
    if not hasattr(cache, "batch_select_indices"):
        return {}
    cache.batch_select_indices(which)
    return {"past_key_values": cache}


class Deduplicator:
    """Lets every text through once, whatever its case, spaces and punctuation at its ends; never a seed."""

    def __init__(self, known: Sequence[str]) -> None:
        self._seen = set(map(_essence, known))

    def __call__(self, text: str) -> bool:
        """Whether this is the first text of its kind."""
        essence = _essence(text)
        if not essence or essence in self._seen:
            return False
        self._seen.add(essence)
        return True


def one_line(text: str) -> str:
    """A text without line breaks, as an item of a list."""
    return " ".join(text.split())


def _essence(text: str) -> str:
    return one_line(text).casefold().strip(" .,;:!?\"'()[]")
