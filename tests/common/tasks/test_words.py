"""ROUGE's words: those of rouge_score for English, and words of other scripts, whose ROUGE would be 0 otherwise."""

from __future__ import annotations

import pytest
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from colora.common.tasks.words import WordTokenizer

ENGLISH = [
    "The quick brown foxes' tails were wagging, 3.5 times!",
    "snake_case and CamelCase; don't   stop\n(ever)",
    "",
]


@pytest.mark.parametrize("text", ENGLISH)
def test_english_words_are_those_of_rouge_score(text: str) -> None:
    assert WordTokenizer().tokenize(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Größe café", ["größe", "café"]),
        ("Всё хорошо, спасибо", ["всё", "хорошо", "спасибо"]),
        ("包裹来晚了。abc 12", ["包", "裹", "来", "晚", "了", "abc", "12"]),
        ("とても良い", list("とても良い")),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("배송이 늦었습니다", ["배송이", "늦었습니다"]),
        ("مرحبا بك", ["مرحبا", "بك"]),
        ("👍 !", ["👍", "!"]),
    ],
)
def test_words_of_other_scripts(text: str, words: list[str]) -> None:
    assert WordTokenizer().tokenize(text) == words


@pytest.mark.parametrize("text", ["包裹来晚了", "Всё хорошо", "สวัสดี", "👍"])
def test_a_perfect_answer_in_any_script_has_rouge_1(text: str) -> None:
    scorer = RougeScorer(["rougeL"], tokenizer=WordTokenizer())
    assert scorer.score(text, text)["rougeL"].fmeasure == 1
    assert scorer.score(text, "wrong")["rougeL"].fmeasure == 0
