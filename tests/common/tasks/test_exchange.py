"""Prompts and answers as tokens: boundaries, ends, templates that refuse a conversation, and what a cut keeps."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from colora.common.errors import DataError
from colora.common.models.tokenizer import end_ids
from colora.common.tasks.exchange import Exchange, ExchangeEncoder, RowRefused
from tests.conftest import WORDS

SPECIAL = ["[PAD]", "[UNK]", "<s>", "<user>", "<assistant>", "<system>", "<end>", "<think>", "."]
PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
ENDLESS = PLAIN.replace(" <end>", "")
STRICT = (  # as Gemma's and Mistral's: no system role, and roles that alternate
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<{{ m['role'] }}> {{ m['content'] }} <end>\n{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
LAST_THINKS = PLAIN.replace("{{ m['c", "{% if m['role'] == 'assistant' and loop.last %}<think> {% endif %}{{ m['c")
PROMPT_THINKS = PLAIN.replace("<assistant> {% endif %}", "<assistant> <think> {% endif %}")
U, A, S = ("user", "red sun"), ("assistant", "blue moon"), ("system", "be")
U2, A2 = ("user", "green hill"), ("assistant", "cat")


def tokenizer(template: str | None = None, *, bos: bool = False, spaced: bool = False) -> Any:
    """A word-level tokenizer; with ``spaced`` it puts a space before every text, as SentencePiece does."""
    words = [f"▁{word}" for word in (*SPECIAL, *WORDS, "be", "▁")] if spaced else [*SPECIAL, *WORDS, "be"]
    inner = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(dict.fromkeys([*SPECIAL, *words]))}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace() if spaced else pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.Metaspace() if spaced else decoders.WordPiece()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "<end>", "bos_token": "<s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    fast.chat_template = template
    return fast


def talk(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def exchange(tokens: Any, row: dict[str, Any], limit: int = 64, prompt_limit: int = 63) -> tuple[Exchange | None, bool]:
    return ExchangeEncoder(tokens, "m", end_ids(tokens)).exchange(row, limit, prompt_limit)


def words(tokens: Any, ids: list[int]) -> str:
    return " ".join(tokens.convert_ids_to_tokens(ids))


def parts(template: str, row: dict[str, Any]) -> tuple[str, str, str]:
    """The whole text, what is learned of it, and the prompt."""
    tokens = tokenizer(template)
    made, _ = exchange(tokens, row)
    assert made
    learned = [i for i, answer in zip(made.ids, made.answer, strict=True) if answer]
    return words(tokens, made.ids), words(tokens, learned), words(tokens, made.prompt)


CONVERSATIONS: dict[str, tuple[str, dict[str, Any], str, str, str]] = {
    "two turns": (
        PLAIN,
        talk(U, A),
        "<user> red sun <end> <assistant> blue moon <end>",
        "blue moon <end>",
        "<user> red sun <end> <assistant>",
    ),
    "every answer": (
        PLAIN,
        talk(S, U, A, U2, A2, U),
        "<system> be <end> <user> red sun <end> <assistant> blue moon <end> <user> green hill <end> "
        "<assistant> cat <end>",
        "blue moon <end> cat <end>",
        "<system> be <end> <user> red sun <end> <assistant> blue moon <end> <user> green hill <end> <assistant>",
    ),
    "an answer before any question": (
        PLAIN,
        talk(A, U, A2),
        "<assistant> blue moon <end> <user> red sun <end> <assistant> cat <end>",
        "cat <end>",
        "<assistant> blue moon <end> <user> red sun <end> <assistant>",
    ),
    "a template that needs a question first": (
        STRICT,
        talk(A, U, A2),
        "<user> red sun <end> <assistant> cat <end>",
        "cat <end>",
        "<user> red sun <end> <assistant>",
    ),
    "a template without a system role": (
        STRICT,
        talk(S, U, A),
        "<user> be red sun <end> <assistant> blue moon <end>",
        "blue moon <end>",
        "<user> be red sun <end> <assistant>",
    ),
    "thoughts in the last turn only": (
        LAST_THINKS,
        talk(U, A, U2, A2),
        "<user> red sun <end> <assistant> blue moon <end> <user> green hill <end> <assistant> <think> cat <end>",
        "<think> cat <end>",
        "<user> red sun <end> <assistant> blue moon <end> <user> green hill <end> <assistant>",
    ),
    "thoughts in the prompt only": (
        PROMPT_THINKS,
        talk(U, A),
        "<user> red sun <end> <assistant> <think> blue moon <end>",
        "blue moon <end>",
        "<user> red sun <end> <assistant> <think>",
    ),
    "a template without an end": (
        ENDLESS,
        talk(U, A),
        "<user> red sun <assistant> blue moon <end>",
        "blue moon <end>",
        "<user> red sun <assistant>",
    ),
}


@pytest.mark.parametrize("case", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_answers_are_learned_as_the_template_writes_them(case: tuple) -> None:
    template, row, *expected = case
    assert parts(template, row) == tuple(expected)


def test_a_learned_answer_follows_the_prompt_of_a_prediction() -> None:
    for template, row, *_ in CONVERSATIONS.values():
        tokens = tokenizer(template)
        made, _ = exchange(tokens, row)
        last = max(i for i, turn in enumerate(row["messages"]) if turn["role"] == "assistant")
        asked = {"messages": row["messages"][:last]}
        assert made
        assert ExchangeEncoder(tokens, "m").prompt(asked).ids == made.prompt == made.ids[: len(made.prompt)]


def test_a_refused_conversation_says_why() -> None:
    with pytest.raises(RowRefused, match="Conversation roles must alternate"):
        exchange(tokenizer(STRICT), talk(U, U, A))
    with pytest.raises(DataError, match="m has no chat template"):
        exchange(tokenizer(), talk(U, A))


def test_a_conversation_without_an_answer_to_a_question_has_nothing_to_learn() -> None:
    for row in (talk(U), talk(A), talk(S, A), talk(U, ("assistant", " "))):
        assert exchange(tokenizer(PLAIN), row) == (None, False)


def test_prompt_and_answer_have_the_tokens_of_the_whole_text() -> None:
    tokens = tokenizer(spaced=True, bos=True)
    made, _ = exchange(tokens, {"prompt": "red sun", "completion": " blue moon"})
    assert made
    whole = tokens("red sun blue moon")["input_ids"]
    assert made.ids == [*whole, tokens.eos_token_id]
    assert words(tokens, made.prompt) == "<s> ▁red ▁sun"
    assert made.reference == "blue moon"


def test_an_answer_that_joins_the_last_word_of_the_prompt_keeps_its_own_tokens() -> None:
    tokens = tokenizer()
    made, _ = exchange(tokens, {"prompt": "red sun", "completion": "blue moon"})
    assert made
    assert words(tokens, made.ids) == "red sun blue moon <end>"
    assert made.answer == [False, False, True, True, True]


def test_tokens_that_end_every_text_do_not_stand_between_prompt_and_answer() -> None:
    tokens = tokenizer()
    tokens._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <end>", special_tokens=[("<s>", 2), ("<end>", 6)]
    )
    made, _ = exchange(tokens, {"prompt": "red sun", "completion": " blue"})
    assert made
    assert words(tokens, made.ids) == "<s> red sun blue <end>"


def test_a_cut_keeps_the_first_token_and_the_end_of_the_prompt() -> None:
    tokens = tokenizer(bos=True)
    row = {"prompt": "a b c d e f g h", "completion": " red blue"}
    made, cut = exchange(tokens, row, limit=7, prompt_limit=4)
    assert made
    assert cut
    assert words(tokens, made.ids) == "<s> f g h red blue <end>"
    assert made.answer == [False] * 4 + [True] * 3
    assert words(tokens, made.prompt) == "<s> f g h"


def test_an_answer_that_is_too_long_keeps_its_beginning() -> None:
    tokens = tokenizer(bos=True)
    row = {"prompt": "a b c", "completion": " d e f g h i"}
    for limit, expected in ((5, "<s> c d e f"), (3, "<s> c d"), (2, "c d")):
        made, cut = exchange(tokens, row, limit=limit)
        assert made
        assert cut
        assert words(tokens, made.ids) == expected
        assert sum(made.answer) == limit - (2 if limit > 2 else 1)


def test_a_cut_keeps_the_system_turn() -> None:
    tokens = tokenizer(PLAIN)
    row = talk(S, ("user", "a b c d e f"), A)
    made, cut = exchange(tokens, row, limit=10, prompt_limit=7)
    assert made
    assert cut
    assert words(tokens, made.ids) == "<system> be <end> e f <end> <assistant> blue moon <end>"
    assert words(tokens, made.prompt) == "<system> be <end> e f <end> <assistant>"
