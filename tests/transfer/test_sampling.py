"""The list prompt of the paper, and the texts that are parsed from its continuation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, MambaModel

from colora.common.config.schema import ModelSettings, TransferGeneratorSettings
from colora.common.models.base_model import load_base_model
from colora.transfer import sampling
from colora.transfer.sampling import Deduplicator, list_prompt, parse_list, rotate_seeds


def test_the_prompt_is_that_of_the_paper() -> None:
    seeds = ["one is", "two\nlines", "three", "four", "five"]
    assert list_prompt(seeds) == ("Here are 10 examples:\n1. one is\n2. two lines\n3. three\n4. four\n5. five\n6.")


@pytest.mark.parametrize(
    ("continuation", "ended", "expected"),
    [
        (" a b\n7. c d\n8. e f\n9. g h\n10. i j\n11. k l", False, ["a b", "c d", "e f", "g h", "i j"]),
        (" a b\n7. c d\n8. cut o", False, ["a b", "c d"]),
        (" a b\n7. c d\n8. e f", True, ["a b", "c d", "e f"]),
        (" a b\n  continues\n7. c d\n8.", False, ["a b continues", "c d"]),
        (" a b\n7. c d\n9. e f\n10. g h", False, ["a b"]),  # the list ends where the numbering breaks
        (" a b\n7. word\n8. c d\n9.", False, ["a b", "c d"]),  # one word is too short
        ("", True, []),
    ],
)
def test_items_are_parsed_up_to_where_the_list_breaks(continuation: str, ended: bool, expected: list[str]) -> None:
    assert parse_list(continuation, 6, 5, ended=ended) == expected


def test_a_text_is_new_once_and_a_seed_never() -> None:
    is_new = Deduplicator(["A seed text."])
    texts = ["a seed text", "B  text!", "b text", "c text", ""]
    assert [is_new(text) for text in texts] == [False, True, False, True, False]


def test_each_seed_in_turn_is_the_last() -> None:
    seeds = ["one", "two", "three", "four", "five"]
    orders = [rotate_seeds(seeds, 0, call, last) for call in range(2) for last in range(5)]
    assert [order[-1] for order in orders] == seeds * 2
    assert all(sorted(order) == sorted(seeds) for order in orders)
    assert len(set(map(tuple, orders))) > 5


def test_the_prompt_cache_does_not_change_the_texts(generating_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base_model(ModelSettings(str(generating_llama), max_length=32), generates=True)
    monkeypatch.setattr(sampling, "parse_list", lambda text, first, count, *, ended: [text])
    settings, seeds = TransferGeneratorSettings(batch_size=4, max_new_tokens=12), ["a b", "c d", "e f", "g h", "a d"]
    prompt_cache, caches = sampling._prompt_cache, []
    monkeypatch.setattr(sampling, "_prompt_cache", lambda *args: caches.append(prompt_cache(*args)) or caches[-1])
    cached = [list(sampling.generate_texts(base, seeds, settings, 3, call)) for call in range(2)]
    assert all(cache.get_seq_length() > 5 for options in caches for cache in options.values())
    assert all(caches)
    monkeypatch.setattr(sampling, "_prompt_cache", lambda *args: {})
    uncached = [list(sampling.generate_texts(base, seeds, settings, 3, call)) for call in range(2)]
    assert len(caches) == 2
    assert cached == uncached
    assert len({text for call in cached for text in call}) > 4


def test_a_model_without_attention_reads_every_prompt_itself() -> None:
    """Its cache has no rows to select; since Transformers 5.24 it has the same name as an attention cache."""
    model = MambaModel(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=2)).eval()
    assert sampling._prompt_cache(model, torch.ones(1, 5, dtype=torch.long), torch.tensor([0, 0])) == {}
