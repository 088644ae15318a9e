"""Texts are tokenized once, and the classifiers that read an end token find as many in every text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from colora.common.errors import ModelError
from colora.common.tasks import tokens as module
from colora.common.tasks.tokens import TextEncoder
from tests.conftest import _tokenizer
from tests.families import append_end

END = 8


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    _tokenizer(tmp_path, chat=False)
    return AutoTokenizer.from_pretrained(tmp_path)


@pytest.fixture
def ending(tmp_path: Path) -> Any:
    _tokenizer(tmp_path, chat=False)
    append_end(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_texts_are_cut_and_counted_in_one_pass(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    texts = ["red", "red cat dog", "red cat dog sun", "", "a b c d e f g h"]
    calls: list[int] = []
    original = type(tokenizer).__call__

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(args[0]))
        return original(self, *args, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    found = TextEncoder(tokenizer, 3)([{"text": text} for text in texts])
    assert calls == [2, 2, 1]
    assert [each.truncated for each in found] == [False, False, True, False, True]
    assert [list(each) for each in found] == [tokenizer.encode(text)[:3] for text in texts]


def test_pairs_lose_the_end_of_the_longer_text(ending: Any) -> None:
    found = TextEncoder(ending, 6)([{"text": "a b c d e", "text_pair": "red"}, {"text": "a", "text_pair": "b"}])
    assert [each.truncated for each in found] == [True, False]
    assert list(found[0]) == ending.encode("a b c", "red")


def test_a_classifier_that_reads_an_end_token_needs_one(tokenizer: Any) -> None:
    TextEncoder(tokenizer, 8).check_end("bert")
    with pytest.raises(ModelError, match="Classifiers of the family t5 read a text at <end>, which"):
        TextEncoder(tokenizer, 8, END).check_end("t5")


def test_an_end_token_inside_a_text_is_left_out(ending: Any) -> None:
    """Otherwise the examples of a batch have different numbers of them, which the classifier refuses."""
    encoder = TextEncoder(ending, 16, END)
    encoder.check_end("t5")
    rows = [{"text": "red <end> cat <end>"}, {"text": "red cat"}]
    assert list(map(list, encoder(rows))) == [ending.encode("red cat")] * 2
    pairs = [{"text": "red <end> cat", "text_pair": "dog"}, {"text": "red cat", "text_pair": "dog"}]
    assert [each.count(END) for each in encoder(pairs)] == [2, 2]
