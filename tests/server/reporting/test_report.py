"""What the final report says of a run with a baseline."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from colora.common.protocol.types import EPSILON
from colora.common.standard_error import mean_and_error
from colora.server.reporting.console import LiveDisplay
from colora.server.reporting.report import print_report
from colora.server.reporting.summary import RunSummary, summarize

STARTED = {"event": "started", "federation": "f", "method": "colora", "model": "m", "rounds": 2}


def run_of(
    gains: list[float], error: float | None, losses: tuple[float, float] = (1.0, 0.1), alone: float = 0.1
) -> RunSummary:
    """A classification run whose sites gain so much over local-only training, each with this standard error."""
    sites = [f"s{i}" for i in range(len(gains))]
    events: list[dict] = [{**STARTED, "sites": sites, "learning_rates": {"lr": 0.005}}]
    for site, gain in zip(sites, gains, strict=True):
        joined = {"task": "classification", "train": 8, "test": 100, "truncated": 0, "dropped": 0}
        events.append({"event": "joined", "site": site, **joined})
        cost = {"bytes_up": 1, "bytes_down": 1, "seconds": 1.0, "site": site}
        for t, loss in enumerate(losses, 1):
            events.append({"event": "reply", **cost, "round": t, "metrics": {"train.loss": loss}})
        events.append({"event": "reply", **cost, "round": 3, "metrics": {"personal.accuracy": 0.5 + gain}})
        metrics = {"personal.accuracy": 0.5, "train.loss": alone}
        events.append({"event": "reply", **cost, "round": 3, "metrics": metrics, "baseline": True})
        if error is not None:
            compared = {"event": "compared", "gain": gain, "standard_error": error, "rows": 100}
            events.append({**compared, "site": site, "baseline": True})
    return summarize([events[0], {**STARTED, "sites": sites, "baseline": True}, *events[1:]])


def report_of(summary: RunSummary, folder: Path) -> str:
    """The report as text, without line breaks."""
    console = Console(file=io.StringIO(), width=80, record=True)
    print_report(summary, folder, console)
    return console.export_text()


def test_mean_and_error() -> None:
    mean, error = mean_and_error([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2)
    assert error == pytest.approx(0.1 / 3**0.5)
    assert mean_and_error([0.1]) == (0.1, None)


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.08, 0.06, 0.07, 0.09], "Collaboration helps: the personal models gain +0.075 ±0.006"),
        ([0.08, -0.06, 0.01, 0.00], "It is not clear whether collaboration helps"),
        ([-0.08, -0.06, -0.07, -0.09], "Collaboration hurts: the personal models gain -0.075 ±0.006"),
        ([0.05, 0.08], "It is not clear whether collaboration helps"),  # 4.3 standard errors, of two sites
        ([0.05, 0.08, 0.06, 0.07], "Collaboration helps: the personal models gain +0.065 ±0.006"),
        ([0.08], "It is not clear whether collaboration helps"),
    ],
)
def test_the_verdict_needs_a_mean_gain_that_the_sites_agree_on(
    gains: list[float], verdict: str, tmp_path: Path
) -> None:
    assert verdict in " ".join(report_of(run_of(gains, 0.02), tmp_path).split())


def test_only_clear_differences_count(tmp_path: Path) -> None:
    """Gains of 0.03 and -0.03 with a standard error of 0.02 count for nobody."""
    text = " ".join(report_of(run_of([0.08, 0.05, 0.03, -0.03, -0.05], 0.02), tmp_path).split())
    assert "Beyond 2 standard errors, 2 of 5 sites are better and 1 worse." in text
    assert "Both were trained at train.lr = 0.005." in text
    assert "Beyond" not in report_of(run_of([0.08, 0.06], None), tmp_path), "no error is known"


@pytest.mark.parametrize(
    ("losses", "alone", "advised"),
    [((1.0, 0.1), 0.1, False), ((1.0, 0.6), 0.6, True), ((1.0, 0.3), 0.1, True), ((1.0, 0.3), 0.3, False)],
)
def test_a_loss_that_stays_high_is_told(
    losses: tuple[float, float], alone: float, advised: bool, tmp_path: Path
) -> None:
    text = " ".join(report_of(run_of([0.08, 0.06], 0.02, losses, alone), tmp_path).split())
    assert ("use more rounds or a larger train.lr" in text) == advised


def test_the_recipe_describes_itself_below_the_table(tmp_path: Path) -> None:
    started = {**STARTED, "sites": ["ada"], "settings": {"description": "Two [bold]words[/bold]."}}
    assert "\nTwo [bold]words[/bold].\nrows: training + test." in report_of(summarize([started]), tmp_path)


def test_a_second_start_without_settings_keeps_those_of_the_first() -> None:
    started = {**STARTED, "sites": ["ada"]}
    settings = {"description": "words", "privacy": {"delta": 1e-5}}
    summary = summarize([{**started, "settings": settings}, started])
    assert (summary.description, summary.delta) == ("words", 1e-5)


def test_the_table_fits_into_80_columns(tmp_path: Path) -> None:
    summary = run_of([0.08, 0.06], 0.02)
    summary.rows = {"a" * 12: summary.rows["s0"], "s1": summary.rows["s1"]}
    summary.rows["a" * 12].site = "a" * 12
    assert "…" not in report_of(summary, tmp_path)


def test_a_round_and_the_report_tell_how_much_of_the_work_was_measuring(tmp_path: Path) -> None:
    """Two sites work for 4 and 6 s, of which they measure for 3 and 4 s: 7 of 10 s; the final request adds 1 of 2 s."""
    joined = {"task": "generation", "train": 8, "test": 100, "truncated": 0, "dropped": 0}
    reply = {"event": "reply", "bytes_up": 1, "bytes_down": 1, "metrics": {}}
    replies = [
        {**reply, "round": 1, "site": "ada", "seconds": 4.0, "measuring": 3.0},
        {**reply, "round": 1, "site": "bob", "seconds": 6.0, "measuring": 4.0},
    ]
    ended = {"event": "round", "round": 1, "admitted": ["ada", "bob"], "weights": {}, "seconds": 10.2}
    last = {**reply, "round": 3, "site": "bob", "seconds": 2.0, "measuring": 1.0}
    console = Console(file=io.StringIO(), width=100)
    with LiveDisplay(console) as display:
        display({**STARTED, "sites": ["ada", "bob"]})
        for event in (*({"event": "joined", "site": name, **joined} for name in ("ada", "bob")), *replies, ended, last):
            display(event)
    assert console.file.getvalue().splitlines()[-1] == "round 1/2: 2 sites, 10.2 s (70% evaluation)"  # type: ignore[attr-defined]
    told = " ".join(report_of(display.summary, tmp_path).split())
    assert "The sites worked for 12 s: 4 s of training and other work, 8 s of evaluation, which" in told
    assert "evaluation.every, evaluation.max_new_tokens and data.test limit." in told


def test_the_line_of_a_private_round_tells_the_sum_and_what_it_spent(tmp_path: Path) -> None:
    """Three of four sites are in the sum. The ε of examples is that of the site that has spent most."""
    reply = {"event": "reply", "round": 1, "bytes_up": 1, "bytes_down": 1, "seconds": 1.0}
    replies = [{**reply, "site": name, "metrics": {EPSILON: spent}} for name, spent in (("ada", 1.5), ("bob", 2.25))]
    opened = {"event": "secure_sum", "round": 1, "sites": ["ada", "bob", "eve"], "dropped": ["dan"], "threshold": 3}
    noised = {"event": "noised", "round": 1, "sites": 3, "clipped": {}, "bound": 1.0, "noise": 0.1, "epsilon": 4.0}
    ended = {"event": "round", "round": 1, "admitted": opened["sites"], "weights": {}, "seconds": 2.0}
    console = Console(file=io.StringIO(), width=120)
    with LiveDisplay(console) as display:
        for event in ({**STARTED, "sites": ["ada", "bob", "dan", "eve"]}, *replies, opened, noised, ended):
            display(event)
    spent = "site-level ε = 4, example-level ε = 2.25"
    assert console.file.getvalue().splitlines()[-1] == f"round 1/2: secure sum of 3 of 4 sites, {spent}, 2.0 s"  # type: ignore[attr-defined]
