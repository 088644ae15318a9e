"""Seeded mutations of what one side sends to the other."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from colora.common.protocol import flower_messages as messages
from colora.common.protocol.codec import DEFAULT

NUMBERS: tuple[Any, ...] = (
    *(float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 5e-324, 0.0, -0.0, -1.0, 1e16),
    *(0, -1, 1, 2**31, 2**62, -(2**63), 2**63 - 1, 10**12 + 1, True, False),
)
TEXTS = (
    *("", " ", "[/bold]", "[link=http://x]", "\x1b[2J\x1b]0;owned\x07", "\x00", "a\nb\r\nc", "\u202egpj", "\ud800"),
    *("<script>alert(1)</script>", "](javascript:x)", "| a | b |", "../../etc/passwd", "%s%n{0}", "NaN", "x" * 20_000),
)


def value(rng: random.Random) -> Any:
    """A number, a text, bytes or a list."""
    kind = rng.randrange(8)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(TEXTS)
    return rng.randbytes(rng.randrange(9)) if kind == 6 else [rng.choice((1.5, 2.5))] * rng.randrange(1, 3)


def _config(content: RecordDict, rng: random.Random) -> None:
    record = content.config_records["colora"]
    record[rng.choice([*record, rng.choice(TEXTS)])] = value(rng)


def _drop_field(content: RecordDict, rng: random.Random) -> None:
    record = content.config_records["colora"]
    del record[rng.choice(list(record))]


def _metric(content: RecordDict, rng: random.Random) -> None:
    if "metrics" in content:
        names = ["personal.loss", "train.loss", "base.accuracy", *["validation.loss"] * 4, rng.choice(TEXTS)]
        name = rng.choice(names)
        content.metric_records["metrics"][name] = rng.choice(NUMBERS)


def _record(content: RecordDict, rng: random.Random) -> None:
    kinds: list[Callable[[], Any]] = [
        *(lambda: ConfigRecord({"x": 1}), lambda: MetricRecord({"x": 1}), lambda: ArrayRecord({})),
    ]
    content[rng.choice(["colora", "metrics", "shared", rng.choice(TEXTS)])] = rng.choice(kinds)()


def _drop_record(content: RecordDict, rng: random.Random) -> None:
    del content[rng.choice(list(content))]


def _arrays(content: RecordDict, rng: random.Random) -> None:
    if "shared" not in content or messages.ALL not in content.array_records["shared"]:
        return
    data = bytearray(content.array_records["shared"][messages.ALL].data)
    match rng.randrange(4):
        case 0:
            data = data[: rng.randrange(len(data) + 1)]
        case 1 if data:
            data[rng.randrange(min(len(data), 400))] ^= 1 << rng.randrange(8)  # mostly in the header
        case 2:
            data = bytearray(rng.randbytes(rng.randrange(200)))
        case _:
            data += rng.randbytes(rng.randrange(1, 9))
    stype = rng.choice([DEFAULT, DEFAULT, "fp16", "pickle", rng.choice(TEXTS)])
    content.array_records["shared"][messages.ALL] = Array("uint8", (len(data),), stype, bytes(data))


MUTATIONS = (_config, _config, _config, _drop_field, *[_metric] * 4, _record, _drop_record, _arrays, _arrays)


def mutate(content: RecordDict, rng: random.Random) -> None:
    """Apply one to three mutations, in place. Flower's records refuse some of them."""
    for _ in range(rng.randrange(1, 4)):
        try:
            rng.choice(MUTATIONS)(content, rng)
        except (TypeError, ValueError, KeyError, IndexError):
            continue
