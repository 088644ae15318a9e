"""Convert a Big-Bench task file to JSON lines with ``prompt`` and ``completion``, for transfer_writing.py.

python benchmarks/bigbench.py TASK.json [ANSWER …] > FILE.jsonl

Only examples with exactly one answer are used. With ANSWERs named, the answer must be one of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def rows_of(examples: Sequence[dict[str, Any]], accepted: Sequence[str]) -> Iterator[dict[str, str]]:
    for example in examples:
        scores, target = example.get("target_scores"), example.get("target", [])
        answers = [word for word, score in scores.items() if score] if scores else target
        answers = [answers] if isinstance(answers, str) else answers
        answer = answers[0].strip(" .") if len(answers) == 1 else ""
        if answer and (not accepted or answer in accepted):
            yield {"prompt": " ".join(example["input"].split()), "completion": f" {answer}"}


def main() -> None:
    file, *accepted = sys.argv[1:]
    for row in rows_of(json.loads(Path(file).read_text(encoding="utf-8"))["examples"], accepted):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
