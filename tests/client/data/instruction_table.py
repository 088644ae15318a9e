"""Files of instructions and conversations as people have them, with the verdict on each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.client.data.file_table import PAIRS, ROWS, FileCase, lines

ALPACA = [{"instruction": t, "input": "" if i % 2 else "x", "output": label} for i, (t, label) in enumerate(PAIRS)]
SHAREGPT = [{"conversations": [{"from": "human", "value": t}, {"from": "gpt", "value": label}]} for t, label in PAIRS]
MESSAGES = [{"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": a}]} for t, a in PAIRS]
PROMPTS = [{"prompt": t, "completion": a} for t, a in PAIRS]
QUESTIONS = [{"question": t, "answer": a} for t, a in PAIRS]


def first_message(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversations, the third of which begins with another message."""
    return [{"messages": [*([message] if i == 2 else []), *row["messages"]]} for i, row in enumerate(MESSAGES)]


def _cases() -> Iterator[FileCase]:
    def talk(name: str, rows: Any, count: int = len(ROWS), **data: Any) -> FileCase:
        content = json.dumps(rows) if name.endswith(".json") else lines(rows)
        return FileCase(name, content, count, (), data={"task": "generation", **data})

    def refused(name: str, rows: Any, error: str, **data: Any) -> FileCase:
        return FileCase(name, lines(rows), error=error, data={"task": "generation", **data})

    for name, rows in (("alpaca", ALPACA), ("sharegpt", SHAREGPT), ("messages", MESSAGES), ("prompts", PROMPTS)):
        yield talk(f"{name}.json", rows)
        yield talk(f"{name}.jsonl", rows)
        form = {"prompts": "prompt-completion"}.get(name, name)
        yield talk(f"{name}-told.jsonl", rows, format=form)
    yield talk("alpaca-without-input.json", [{k: v for k, v in row.items() if k != "input"} for row in ALPACA])
    yield talk("alpaca-with-text.json", [{**row, "text": "all of it"} for row in ALPACA])
    yield talk("template.jsonl", QUESTIONS, prompt="Q: {question}", completion="{answer}")
    yield talk("named.jsonl", QUESTIONS, prompt="question", completion="answer")
    yield talk("system.jsonl", [{**row, "tone": "be brief"} for row in PROMPTS], system="tone")
    yield talk("system-message.jsonl", first_message({"role": "system", "content": "be brief"}))
    yield talk("assistant-first.jsonl", first_message({"role": "assistant", "content": "hello"}))
    yield talk("as-text.jsonl", [{"messages": json.dumps(row["messages"])} for row in MESSAGES])
    yield talk(
        "parts.jsonl",
        [
            {"messages": [{"role": "user", "content": [{"type": "text", "text": t}]}, row["messages"][1]]}
            for (t, _), row in zip(PAIRS, MESSAGES, strict=True)
        ],
    )
    yield talk(
        "human-assistant.json",
        [{"conversations": [{"from": "user", "value": t}, {"from": "assistant", "value": a}]} for t, a in PAIRS],
    )
    yield talk("prompt-lists.jsonl", [{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in MESSAGES])
    yield refused("unlike.jsonl", QUESTIONS, "data.")
    yield refused("other-format.jsonl", PROMPTS, "data.format", format="alpaca")
    yield refused("bad-role.jsonl", first_message({"role": "narrator", "content": "x"}), "row 3")
    yield refused("no-content.jsonl", first_message({"role": "user"}), "row 3")
    yield refused("no-list.jsonl", [{"messages": "hello"} for _ in ROWS], "messages")
    yield refused("empty-list.jsonl", [{"messages": []} for _ in ROWS], "messages")
    yield refused("number.jsonl", [{"prompt": "a", "completion": 7} for _ in ROWS], "completion")
    yield refused("bad-template.jsonl", QUESTIONS, "data.prompt", prompt="Q: {frage}", completion="{answer}")


INSTRUCTIONS = list(_cases())
