"""Instruction data in the formats of published data sets: the expected rows are written by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from colora.common.config.schema import DataSettings
from colora.common.dataset import Row
from colora.common.errors import DataError
from colora.common.tasks.columns import RawRow
from colora.common.tasks.conversations import parse_example, parse_input

USER, ANSWER = {"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}
SYSTEM = {"role": "system", "content": "be brief"}
HUMAN, GPT = {"from": "human", "value": "why"}, {"from": "gpt", "value": "because"}
FUNCTION_CALL = {"from": "function_call", "value": "f()"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "w"}, {"type": "text", "text": "hy"}]}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}], "x": None}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
SHORT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nadd\n\n### Response:\n"
)
LONG = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n"
)


def talk(*turns: dict[str, Any]) -> Row:
    return {"messages": list(turns)}


EXAMPLES: dict[str, tuple[dict[str, Any], Row, Row]] = {  # settings, row, expected
    "prompt": ({}, {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "c"}),
    "prompt of turns": ({}, {"prompt": [USER], "completion": [ANSWER]}, talk(USER, ANSWER)),
    "alpaca": ({}, {"instruction": "add", "input": "", "output": "3"}, {"prompt": SHORT, "completion": "3"}),
    "alpaca without input": ({}, {"instruction": "add", "output": "3"}, {"prompt": SHORT, "completion": "3"}),
    "alpaca with input": (
        {"format": "alpaca"},
        {"instruction": "add", "input": "1 2", "output": "3"},
        {"prompt": LONG, "completion": "3"},
    ),
    "alpaca as chat": (
        {"chat": True},
        {"instruction": "why", "input": None, "output": "because", "system": "be brief", "history": []},
        talk(SYSTEM, USER, ANSWER),
    ),
    "alpaca with history": (
        {"chat": True},
        {"instruction": "so", "output": "yes", "history": [["why", "because"]]},
        talk(USER, ANSWER, {"role": "user", "content": "so"}, {"role": "assistant", "content": "yes"}),
    ),
    "alpaca with history as JSON": (
        {"chat": True},
        {"instruction": "so", "output": "yes", "history": '[["why", "because"]]'},
        talk(USER, ANSWER, {"role": "user", "content": "so"}, {"role": "assistant", "content": "yes"}),
    ),
    "messages beside a prompt": ({}, {"prompt": "p", "prompt_id": "1", "messages": [USER, ANSWER]}, talk(USER, ANSWER)),
    "sharegpt": ({}, {"id": 1, "conversations": [HUMAN, GPT]}, talk(USER, ANSWER)),
    "sharegpt as JSON": ({"format": "sharegpt"}, {"conversation": json.dumps([HUMAN, GPT])}, talk(USER, ANSWER)),
    "sharegpt with a system column": (
        {},
        {"conversations": [HUMAN, GPT], "system": "be brief"},
        talk(SYSTEM, USER, ANSWER),
    ),
    "other names of roles": (
        {"messages": "m"},
        {"m": [{"from": "Prompter", "value": "why"}, {"from": "bing", "value": "because"}]},
        talk(USER, ANSWER),
    ),
    "observations": (
        {},
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": "f()"},
                {"from": "observation", "value": "1"},
                GPT,
            ]
        },
        talk(USER, {"role": "assistant", "content": "f()"}, {"role": "tool", "content": "1"}, ANSWER),
    ),
    "messages": ({}, {"messages": [SYSTEM, USER, ANSWER]}, talk(SYSTEM, USER, ANSWER)),
    "messages as JSON": ({"messages": "m"}, {"m": json.dumps([USER, ANSWER])}, talk(USER, ANSWER)),
    "content in parts": ({}, {"messages": [PARTS, ANSWER]}, talk(USER, ANSWER)),
    "tool calls": (
        {},
        {"messages": [USER, CALL, {"role": "tool", "content": "1", "name": "f"}], "tools": json.dumps(TOOLS)},
        {**talk(USER, CALLED, {"role": "tool", "content": "1", "name": "f"}), "tools": TOOLS},
    ),
    "another system column": (
        {"system": "persona"},
        {"messages": [USER, ANSWER], "persona": "be brief"},
        talk(SYSTEM, USER, ANSWER),
    ),
    "no system message": ({"system": "persona"}, {"messages": [USER, ANSWER], "persona": ""}, talk(USER, ANSWER)),
    "system before a prompt": (
        {"system": "s"},
        {"prompt": "p", "completion": "c", "s": "be brief"},
        {"prompt": "be brief\n\np", "completion": "c"},
    ),
    "a template": (
        {"prompt": "{instruction}\n{input}", "completion": "output"},
        {"instruction": "add", "input": 1, "output": "3"},
        {"prompt": "add\n1", "completion": "3"},
    ),
    "prompt before messages": (
        {},
        {"prompt": "p", "completion": "c", "messages": [USER]},
        {"prompt": "p", "completion": "c"},
    ),
}


@pytest.mark.parametrize("case", EXAMPLES.values(), ids=EXAMPLES)
def test_every_format_becomes_a_prompt_or_messages(case: tuple[dict[str, Any], Row, Row]) -> None:
    settings, row, expected = case
    assert parse_example(RawRow(row, 1, "ada"), DataSettings(task="generation", **settings)) == expected


REFUSED: dict[str, tuple[dict[str, Any], Row, str]] = {
    "no output": ({}, {"instruction": "add"}, "data.format: expected a column 'output', found only instruction"),
    "no such format": (
        {"format": "alpaca"},
        {"text": "x"},
        "data.format: expected a column 'instruction', found only text",
    ),
    "an image": (
        {},
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER]},
        "data.messages: expected text, found image content",
    ),
    "a number": ({}, {"messages": [{"role": "user", "content": 5}, ANSWER]}, "data.messages: expected text, found int"),
    "no turns": ({}, {"messages": []}, "data.messages: expected a list of {role, content}, found an empty one"),
    "two system messages": (
        {},
        {"messages": [SYSTEM, USER, ANSWER], "system": "be long"},
        "data.system: expected one system message, found a column and another message in the conversation",
    ),
    "history of another form": (
        {"chat": True},
        {"instruction": "so", "output": "yes", "history": [["why"]]},
        "data.format: expected a history of [instruction, output] pairs, found [['why']]",
    ),
    "history without chat": (
        {},
        {"instruction": "so", "output": "yes", "history": [["why", "because"]]},
        "data.format: expected no history, which needs data.chat = true, found 1 earlier turns",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_row_of_another_form_is_refused_by_its_number(case: tuple[dict[str, Any], Row, str]) -> None:
    settings, row, message = case
    with pytest.raises(DataError) as error:
        parse_example(RawRow(row, 7, "ada"), DataSettings(task="generation", **settings))
    assert str(error.value) == f"site ada: {message} in row 7"


def test_an_unknown_role_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"expected one of the roles user, human, .* found 'narrator' in row 7"):
        parse_example(RawRow({"messages": [{"role": "narrator", "content": "x"}]}, 7, "ada"), DataSettings())


INPUTS: dict[str, tuple[dict[str, Any], Row, Row | None]] = {
    "a prompt": ({}, {"prompt": "p"}, {"prompt": "p"}),
    "a blank prompt": ({}, {"prompt": " "}, None),
    "no prompt": ({}, {"prompt": None}, None),
    "a prompt of a chat": ({"chat": True, "messages": "messages"}, {"prompt": "why"}, talk(USER)),
    "messages": ({"messages": "messages"}, {"messages": [USER, ANSWER]}, talk(USER)),
    "messages in a table": ({}, {"messages": json.dumps([SYSTEM, USER])}, talk(SYSTEM, USER)),
    "messages before a prompt": ({"messages": "messages"}, {"prompt": "p", "messages": [USER]}, talk(USER)),
    "another form than in training": ({"messages": "talk"}, {"conversations": [HUMAN, GPT]}, talk(USER)),
    "nothing asked": ({"messages": "m"}, {"m": [SYSTEM, ANSWER]}, None),
    "alpaca": ({}, {"instruction": "add", "input": ""}, {"prompt": SHORT}),
    "sharegpt": ({}, {"conversations": [HUMAN, GPT]}, talk(USER)),
    "a prompt of turns": ({}, {"prompt": [USER]}, talk(USER)),
}


@pytest.mark.parametrize("case", INPUTS.values(), ids=INPUTS)
def test_an_input_is_a_row_without_its_answer(case: tuple[dict[str, Any], Row, Row | None]) -> None:
    settings, row, expected = case
    assert parse_input(RawRow(row, 1, "ada"), DataSettings(task="generation", **settings)) == expected
