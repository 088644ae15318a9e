"""What the events add up to."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from colora.server.reporting.console import LiveDisplay
from colora.server.reporting.events import Event
from colora.server.reporting.summary import summarize


def event(name: str, **fields: Any) -> Event:
    return {"time": 0.0, "event": name, **fields}


def reply(site: str, t: int, **metrics: float) -> Event:
    named = {key.replace("__", "."): value for key, value in metrics.items()}
    return event("reply", site=site, round=t, metrics=named, bytes_up=10, bytes_down=20, seconds=1.0, fresh=False)


START = [
    event("started", federation="f", method="colora", model="m", rounds=2, sites=["ada", "bob"]),
    *(
        event("joined", site=site, task="classification", train=4, test=2, truncated=0, dropped=0)
        for site in ("ada", "bob")
    ),
]


def test_a_round_that_was_done_again_after_a_restart_counts_once() -> None:
    board = summarize([*START, reply("ada", 1), reply("ada", 1), reply("ada", 2)])
    assert (board.rows["ada"].bytes_up, board.rows["ada"].bytes_down, board.rows["ada"].seconds) == (20, 40, 2.0)


def test_a_trouble_that_a_later_answer_mended_is_taken_back() -> None:
    failed = event("failed", site="ada", round=1, reason="RuntimeError")
    assert summarize([*START, failed]).rows["ada"].failures == {1: "RuntimeError"}
    assert summarize([*START, failed, reply("ada", 1)]).rows["ada"].failures == {}


def test_a_node_that_could_not_join_is_told_and_leaves_the_means_alone() -> None:
    failed = event("failed", site="node 3", round=0, reason="RuntimeError")
    replies = [reply("ada", 1, personal__accuracy=0.5), reply("bob", 1, personal__accuracy=1.0)]
    board = summarize([*START, failed, *replies])
    assert board.mean("personal") == 0.75
    assert board.failures == ["node 3: RuntimeError"]


def test_who_is_ready_is_told_while_sites_do_what_takes_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    screen = LiveDisplay(Console(force_terminal=False, width=200))
    moving = event("moving", of="old", sites=["ada", "bob"])
    closing = event("closing", round=2, sites=["ada", "bob"], prepares=True)
    met = [event("met", site=site) for site in ("ada", "bob", "bob")]
    start, *joined = START
    for each in (start, moving, *met, *joined, event("round_started", round=1, sites=[]), reply("ada", 1), closing):
        screen(each)
    for each in (met[0], reply("bob", 3), {**met[0], "baseline": True}, start, met[0]):  # it came back: no sign of this
        screen(each)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "2 sites write texts and answer them as they did in old: minutes a site without a GPU",
        "1 of 2 sites are ready (ada)",
        "2 of 2 sites are ready (bob)",
        "closing: 2 sites personalise and measure, and prepare a later move: minutes a site without a GPU",
        "1 of 2 sites are ready (bob)",
        "f: colora on m, 2 sites",
    ]


def test_the_baseline_fills_the_column_alone_and_nothing_else() -> None:
    alone = {**reply("ada", 1, personal__accuracy=0.25), "baseline": True}
    board = summarize([*START, reply("ada", 1, personal__accuracy=0.5), alone])
    assert (board.rows["ada"].metric("personal"), board.rows["ada"].metric("alone")) == (0.5, 0.25)
    assert board.rows["ada"].bytes_up == 10
