"""Synthetic inputs: a causal model goes on with a numbered list that begins with the seed examples."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..common.model import BaseModel
from ..common.seeds import seed_from
from ..common.settings import TransferSettings

ITEM = re.compile(r"^\s*(\d+)[.)]\s*(.*)$")
SHORTEST = 2  # words of a text that counts


def list_prompt(seeds: Sequence[str]) -> str:
    """``Here are 10 examples:`` with the five seeds as items 1 to 5, and ``6.`` to go on from (paper, section 3.2)."""
    lines = [f"{i}. {one_line(seed)}" for i, seed in enumerate(seeds, 1)]
    return "\n".join([f"Here are {2 * len(seeds)} examples:", *lines, f"{len(seeds) + 1}."])


def items_of(continuation: str, first: int, wanted: int, *, whole: bool) -> list[str]:
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


def in_turn(seeds: Sequence[str], seed: int, call: int) -> list[str]:
    """The seeds in some order that ends with seed ``call`` mod n: a model goes on most like what it read last."""
    last = call % len(seeds)
    others = [text for i, text in enumerate(seeds) if i != last]
    return [*random.Random(seed_from(seed, "writing", call)).sample(others, len(others)), seeds[last]]


def write(base: BaseModel, seeds: Sequence[str], settings: TransferSettings, seed: int, call: int) -> Iterator[str]:
    """The texts of one call of the writer; equal seeds and call numbers give equal texts on one machine.

    A call asks ``settings.batch`` times with one order of the seeds, so that the model reads them once.
    """
    model, tokenizer, times = base.language_model, base.tokenizer, settings.batch
    assert model is not None
    order = in_turn(seeds, seed, call)
    prompt = torch.tensor([tokenizer(list_prompt(order))["input_ids"]], device=base.device)
    model.eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed_from(seed, "sampling", call))
        out = model.generate(  # type: ignore[operator]
            input_ids=prompt.expand(times, -1),
            attention_mask=torch.ones_like(prompt).expand(times, -1),
            **_read(base.backbone, prompt, times),
            do_sample=True,
            top_k=settings.top_k,
            top_p=settings.top_p,
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    for row in out[:, prompt.shape[1] :]:
        whole = bool((row == tokenizer.eos_token_id).any())
        text = tokenizer.decode(row, skip_special_tokens=True)
        yield from items_of(text, len(seeds) + 1, len(seeds), whole=whole)


def _read(backbone: Any, prompt: torch.Tensor, times: int) -> dict[str, Any]:
    """All of a prompt but its last token as the model's cache, for so many continuations; nothing where it has none."""
    cache: Any = getattr(backbone(input_ids=prompt[:, :-1], use_cache=True), "past_key_values", None)
    if not hasattr(cache, "batch_repeat_interleave"):
        return {}
    cache.batch_repeat_interleave(times)
    return {"past_key_values": cache}


class Novel:
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
