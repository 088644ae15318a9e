"""The list prompt of the paper, and what is read out of its continuation."""

from __future__ import annotations

from pathlib import Path

import pytest

from colora.common.config.schema import ModelSettings, TransferGeneratorSettings
from colora.common.models.base_model import load_base_model
from colora.transfer import sampling as writing
from colora.transfer.sampling import Deduplicator, list_prompt, parse_list, rotate_seeds


def test_the_prompt_is_the_papers() -> None:
    seeds = ["one is", "two\nlines", "three", "four", "five"]
    assert list_prompt(seeds) == ("Here are 10 examples:\n1. one is\n2. two lines\n3. three\n4. four\n5. five\n6.")


@pytest.mark.parametrize(
    ("continuation", "whole", "expected"),
    [
        (" a b\n7. c d\n8. e f\n9. g h\n10. i j\n11. k l", False, ["a b", "c d", "e f", "g h", "i j"]),
        (" a b\n7. c d\n8. cut o", False, ["a b", "c d"]),
        (" a b\n7. c d\n8. e f", True, ["a b", "c d", "e f"]),
        (" a b\n  goes on\n7. c d\n8.", False, ["a b goes on", "c d"]),
        (" a b\n7. c d\n9. e f\n10. g h", False, ["a b"]),  # where the numbers break, the list ends
        (" a b\n7. word\n8. c d\n9.", False, ["a b", "c d"]),  # one word is no example
        ("", True, []),
    ],
)
def test_items_are_read_up_to_where_the_list_breaks(continuation: str, whole: bool, expected: list[str]) -> None:
    assert parse_list(continuation, 6, 5, whole=whole) == expected


def test_a_text_passes_once_and_a_seed_never() -> None:
    new = Deduplicator(["A seed text."])
    texts = ["a seed text", "B  text!", "b text", "c text", ""]
    assert [new(text) for text in texts] == [False, True, False, True, False]


def test_every_seed_is_the_last_in_turn() -> None:
    seeds = ["one", "two", "three", "four", "five"]
    orders = [rotate_seeds(seeds, 0, call, last) for call in range(2) for last in range(5)]
    assert [order[-1] for order in orders] == seeds * 2
    assert all(sorted(order) == sorted(seeds) for order in orders)
    assert len(set(map(tuple, orders))) > 5


def test_reading_the_seeds_once_changes_no_text(speaking_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base_model(ModelSettings(str(speaking_llama), max_length=32), generates=True)
    monkeypatch.setattr(writing, "parse_list", lambda text, first, wanted, *, whole: [text])
    settings, seeds = TransferGeneratorSettings(batch_size=4, max_new_tokens=12), ["a b", "c d", "e f", "g h", "a d"]
    read, caches = writing._read, []
    monkeypatch.setattr(writing, "_read", lambda *given: caches.append(read(*given)) or caches[-1])
    once = [list(writing.generate_texts(base, seeds, settings, 3, call)) for call in range(2)]
    assert all(cache["past_key_values"].get_seq_length() > 5 for cache in caches)
    monkeypatch.setattr(writing, "_read", lambda *given: {})
    again = [list(writing.generate_texts(base, seeds, settings, 3, call)) for call in range(2)]
    assert len(caches) == 2
    assert once == again
    assert len({text for call in once for text in call}) > 4
