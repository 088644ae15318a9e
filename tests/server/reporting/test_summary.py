"""Summaries of events, and the lines that are printed for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from colora.common.errors import QuorumError, RefusedError
from colora.common.event_log import Event, EventLog
from colora.server.deployment.run_phase import phase_of
from colora.server.deployment.run_problems import site_problems
from colora.server.reporting.console import LiveDisplay
from colora.server.reporting.events import EventRecorder, read_events
from colora.server.reporting.summary import note_of, summarize


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


def test_a_round_that_is_repeated_after_a_restart_counts_once() -> None:
    summary = summarize([*START, reply("ada", 1), reply("ada", 1), reply("ada", 2)])
    assert (summary.rows["ada"].bytes_up, summary.rows["ada"].bytes_down, summary.rows["ada"].seconds) == (20, 40, 2.0)


def test_a_failure_is_removed_when_a_later_reply_is_admitted() -> None:
    failed = event("failed", site="ada", round=1, reason="RuntimeError")
    assert summarize([*START, failed]).rows["ada"].failures == {1: "RuntimeError"}
    assert summarize([*START, failed, reply("ada", 1)]).rows["ada"].failures == {}


def test_a_node_that_could_not_join_is_reported_and_does_not_change_the_means() -> None:
    failed = event("failed", site="node 3", round=0, reason="RuntimeError")
    replies = [reply("ada", 1, personal__accuracy=0.5), reply("bob", 1, personal__accuracy=1.0)]
    summary = summarize([*START, failed, *replies])
    assert summary.mean("personal") == 0.75
    assert summary.failures == ["node 3: RuntimeError"]


def test_ready_sites_are_counted_while_sites_generate_or_prepare(capsys: pytest.CaptureFixture[str]) -> None:
    display = LiveDisplay(Console(force_terminal=False, width=200))
    transfer = event("transfer_started", source_federation="old", sites=["ada", "bob"])
    finalizing = event("finalizing", round=2, sites=["ada", "bob"], prepares=True)
    ready = [event("site_ready", site=site) for site in ("ada", "bob", "bob")]
    start, *joined = START
    started = event("round_started", round=1, sites=[])
    for each in (start, transfer, *ready, *joined, started, reply("ada", 1), finalizing):
        display(each)
    # `site_ready` after a reconnection does not count while replies are awaited
    for each in (ready[0], reply("bob", 3), {**ready[0], "baseline": True}, start, ready[0]):
        display(each)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "2 sites generate texts and label them with their models from old (takes minutes per site without a GPU)",
        "1 of 2 sites are ready (ada)",
        "2 of 2 sites are ready (bob)",
        "finalizing: 2 sites personalize and evaluate, and prepare a later transfer "
        "(takes minutes per site without a GPU)",
        "1 of 2 sites are ready (bob)",
        "f: colora on m, 2 sites",
    ]


def test_the_baseline_fills_the_column_alone_and_nothing_else() -> None:
    alone = {**reply("ada", 1, personal__accuracy=0.25), "baseline": True}
    summary = summarize([*START, reply("ada", 1, personal__accuracy=0.5), alone])
    assert (summary.rows["ada"].metric("personal"), summary.rows["ada"].metric("alone")) == (0.5, 0.25)
    assert summary.rows["ada"].bytes_up == 10


def test_a_round_that_the_privacy_budgets_refuse_is_told_in_words(tmp_path: Path) -> None:
    """The coordinator goes on waiting, and the terminal and ``colora status`` say for what."""
    recorder = EventRecorder(EventLog(tmp_path / "events.jsonl"))
    for site in ("ada", "bob"):
        recorder.failed(3, site, RefusedError("privacy.epsilon", "at most 8", 8.1).public())
    with pytest.raises(QuorumError) as caught:
        recorder.require_quorum(2, [], "round 3")
    recorder.emit("waiting", when=caught.value.field, reason=str(caught.value))
    events = read_events(tmp_path / "events.jsonl")
    why = "the round would spend more than the privacy budget of the site (privacy.epsilon)"
    assert f"First failure: ada: {why}" in note_of(events[-1])
    phase, about = phase_of(events, summarize(events), None)
    assert phase == "waiting"
    assert why in about
    assert [why in problem for problem in site_problems(events, ["ada", "bob"], 0.0)] == [True, True]
