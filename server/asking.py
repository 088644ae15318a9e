"""Asking sites and waiting for their answers: again after an error, and never beyond the deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid


@dataclass(frozen=True)
class Patience:
    """``timeout`` seconds for all answers (None: no limit), ``attempts`` a site, a look every ``interval`` seconds."""

    timeout: float | None
    attempts: int
    interval: float = 0.1


def ask(
    grid: Grid, questions: Mapping[str, Callable[[], Message]], patience: Patience
) -> Iterator[tuple[str, Message]]:
    """Yields (site, answer) as answers come; an answer may be an error after the last attempt.

    A message that was claimed is never delivered again by Flower, so every attempt is a new one. Sites that
    do not answer in time are not yielded.
    """
    ends = None if patience.timeout is None else time.monotonic() + patience.timeout
    tries = dict.fromkeys(questions, 0)
    waiting: dict[str, str] = {}

    def send(site: str) -> None:
        tries[site] += 1
        for message_id in grid.push_messages([questions[site]()]):
            waiting[message_id] = site

    for site in questions:
        send(site)
    while waiting and (ends is None or time.monotonic() < ends):
        answers = list(grid.pull_messages(list(waiting)))
        for message in answers:
            site = waiting.pop(message.metadata.reply_to_message_id)
            if message.has_error() and tries[site] < patience.attempts:
                send(site)
            else:
                yield site, message
        if not answers:
            time.sleep(patience.interval)
