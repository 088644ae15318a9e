"""Rows of instruction data: prompt and completion, Alpaca, ShareGPT and chat messages.

Every format becomes ``{"prompt", "completion"}`` or ``{"messages": [{"role", "content"}, …]}``, the latter perhaps with
``"tools"``. A DataError names the key of ``[data]`` and the row.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from ..config.schema import DataSettings
from ..dataset import Row
from .columns import RECOGNIZED, RawRow

Turn = dict[str, Any]
TURNS = "a list of {role, content}"
ROLES = {  # names of roles in published data, by lower-case name
    **dict.fromkeys(("user", "human", "prompter", "usr"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai", "function_call"), "assistant"
    ),
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
    **dict.fromkeys(("system", "developer"), "system"),
}
KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content")  # further keys of a turn that templates read
ALPACA = (  # the prompts of the Alpaca data, without and with an input
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
)


def parse_example(raw: RawRow, data: DataSettings) -> Row:
    """Convert a row in the format ``data.format`` or, unset, in the one that its columns show."""
    row = FORMATS[format_of(raw, data)](raw, data)
    if "completion" in row and not row["completion"].strip():
        raw.remark("The completion is empty")
    return row


def parse_input(raw: RawRow, data: DataSettings) -> Row | None:
    """Convert the input of a row without its answer: ``{"prompt"}``, or the ``{"messages"}`` before the last answer.

    None for a row without an input.
    """
    if data.messages not in raw.values and any(name in raw.values for name in (data.prompt, *RECOGNIZED)):
        data = dataclasses.replace(data, messages=None)  # the file has another form than the training rows
    name = format_of(raw, data)
    answer = {"alpaca": "output", "prompt-completion": data.completion}.get(name)
    values = {**raw.values, answer: ""} if answer else dict(raw.values)
    if name == "prompt-completion" and isinstance(values.get(data.prompt), list):  # turns
        name, data = "messages", dataclasses.replace(data, messages=data.prompt)
    if any(values.get(key, "") is None for key in (data.prompt, data.messages or "messages", "instruction")):
        return None
    row = FORMATS[name](dataclasses.replace(raw, values=values), data)
    if "messages" not in row:
        return {"prompt": row["prompt"]} if row["prompt"].strip() else None
    turns = row["messages"]
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    asked = any(turn["content"].strip() for turn in turns if turn["role"] != "system")
    return {**row, "messages": turns} if asked else None


def format_of(raw: RawRow, data: DataSettings) -> str:
    """Return ``data.format`` or, unset, the format that the settings or the row's columns show."""
    if data.format:
        return data.format
    if data.messages and (raw.values.get(data.messages) is not None or data.prompt not in raw.values):
        return "messages"
    if (data.prompt in raw.values and data.completion in raw.values) or data.prompt != DataSettings.prompt:
        return "prompt-completion"  # not from a column of prompts beside whole conversations
    return next((name for column, name in RECOGNIZED.items() if column in raw.values), "prompt-completion")


def _prompt_completion(raw: RawRow, data: DataSettings) -> Row:
    prompt, completion = (raw.values.get(name) for name in (data.prompt, data.completion))
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(raw, data, [*_turns(raw, prompt), *_turns(raw, completion)])
    return _pair(raw, data, raw.text(data.prompt, "prompt"), raw.text(data.completion, "completion"))


def _alpaca(raw: RawRow, data: DataSettings) -> Row:
    instruction, output = raw.text("instruction", "format"), raw.text("output", "format")
    context = raw.text("input", "format") if raw.values.get("input") is not None else ""
    history = _decoded(raw.values.get("history")) or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise raw.error("format", "a history of [instruction, output] pairs", repr(history)[:40])
    if data.chat:
        earlier = [turn for pair in history for turn in zip(("user", "assistant"), pair, strict=True)]
        prompt = f"{instruction}\n{context}" if context.strip() else instruction
        turns = [*earlier, ("user", prompt), ("assistant", output)]
        return _conversation(raw, data, [{"role": role, "content": content} for role, content in turns])
    if history:
        raise raw.error("format", "no history, which needs data.chat = true", f"{len(history)} earlier turns")
    return _pair(raw, data, ALPACA[bool(context.strip())].format(instruction=instruction, input=context), output)


def _sharegpt(raw: RawRow, data: DataSettings) -> Row:
    key = "conversations" if "conversations" in raw.values else "conversation"
    return _conversation(raw, data, _turns(raw, raw.column(data.messages or key, "messages")))


def _messages(raw: RawRow, data: DataSettings) -> Row:
    return _conversation(raw, data, _turns(raw, raw.column(data.messages or "messages", "messages")))


FORMATS: dict[str, Callable[[RawRow, DataSettings], Row]] = {
    "prompt-completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
}


def _pair(raw: RawRow, data: DataSettings, prompt: str, completion: str) -> Row:
    """A prompt and its completion, as two turns with ``data.chat``."""
    if data.chat:
        turns = (("user", prompt), ("assistant", completion))
        return _conversation(raw, data, [{"role": role, "content": content} for role, content in turns])
    system = _system(raw, data) if data.system else ""
    return {"prompt": f"{system}\n\n{prompt}" if system else prompt, "completion": completion}


def _conversation(raw: RawRow, data: DataSettings, turns: list[Turn]) -> Row:
    """Messages, begun by the message of the system column, with the row's tools."""
    system = _system(raw, data)
    if system and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    elif system and turns[0]["content"] != system:
        raise raw.error("system", "one system message", "a column and another message in the conversation")
    tools = _decoded(raw.values.get("tools"))
    if tools and not isinstance(tools, list):
        raise raw.error("messages", "a list of tools", type(tools).__name__)
    return {"messages": turns, "tools": tools} if tools else {"messages": turns}


def _system(raw: RawRow, data: DataSettings) -> str:
    """The text of ``data.system`` or of a column ``system``; empty without one."""
    if data.system is None and not isinstance(raw.values.get("system"), str):
        return ""
    value = raw.column(data.system or "system", "system")
    return "" if value is None else raw.text(data.system or "system", "system").strip()


def _turns(raw: RawRow, value: Any) -> list[Turn]:
    """Turns with ``role`` and ``content``, from a list or its JSON. The names of ShareGPT are accepted everywhere."""
    turns = _decoded(value)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise raw.error("messages", TURNS, type(turns).__name__)
    if not turns:
        raise raw.error("messages", TURNS, "an empty one")
    return [_turn(raw, turn) for turn in turns]


def _turn(raw: RawRow, turn: Turn) -> Turn:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or ("content" not in turn and "value" not in turn and not turn.get("tool_calls")):
        raise raw.error("messages", TURNS, "list")
    if role.lower() not in ROLES:
        raise raw.error("messages", f"one of the roles {', '.join(ROLES)}", repr(role)[:40])
    extra = {key: turn[key] for key in KEPT if turn.get(key)}
    name = role if role in ("developer", "function") else ROLES[role.lower()]
    return {"role": name, "content": _content(raw, content), **extra}


def _content(raw: RawRow, content: Any) -> str:
    """The text of a turn, joined where it comes in parts."""
    if content is None:  # beside tool calls
        return ""
    if isinstance(content, str):
        return content
    parts: Sequence[Any] = content if isinstance(content, list) else [None]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    other = next((part for part, text in zip(parts, texts, strict=True) if not isinstance(text, str)), "")
    if other != "":
        kind = f"{other.get('type')} content" if isinstance(other, dict) else type(content).__name__
        raise raw.error("messages", "text", kind)
    return "".join(map(str, texts))


def _decoded(value: Any) -> Any:
    """The value of a JSON text; another value, or a text that is no JSON, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
