"""The page of every kind of run: large, unfinished, old, without baseline, with groups, and several runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from colora.server.reporting.page.build import build_page

from .reading import Page
from .runs import Event, baseline, ended, history_of, joined, page_of, reply, run, started, timed, write

SITES = {"ada": (0.50, 0.80), "bob": (0.70, 0.65), "cyd": (0.60, 0.70)}  # gains +0.30, −0.05, +0.10
ERRORS = {"ada": 0.04, "bob": 0.03, "cyd": 0.06}


@pytest.mark.parametrize("sites", [200, 1500])
def test_many_sites_and_rounds_stay_below_two_megabytes(sites: int) -> None:
    results = {f"site-{i:04}": (0.5, 0.5 + i / 4000) for i in range(sites)}
    rounds = 60 if sites == 200 else 8
    text = build_page([history_of(run(results, rounds), baseline(results, dict.fromkeys(results, 0.02), rounds))])
    assert len(text.encode()) < 2_000_000
    page = Page(text)
    assert len(page.tables["All sites"]) == 1 + min(sites, 1000)
    assert "The chart shows the first 12 and the last 12" in page.text
    if sites == 200:
        assert f"The table shows the last 30 of {rounds + 1} rounds and 200 of 200 sites." in page.text


def test_a_metric_that_is_better_when_lower() -> None:
    results = {"ada": (1.2, 0.3), "bob": (0.2, 0.4)}
    alone = baseline(results, {"ada": 0.1, "bob": 0.05}, metric="relative_error")
    page = Page(build_page([history_of(run(results, metric="relative_error", task="regression"), alone)]))
    assert page.column("All sites", "gain ± s.e.") == {"ada": "+0.900 ± 0.100", "bob": "−0.200 ± 0.050"}
    assert "Lower is better." in page.text
    assert "Below the diagonal the personal model is better" in page.text
    assert "Lost most: bob , relative error 0.400 instead of 0.200" in page.text


def test_sites_with_different_tasks_have_charts_and_means_of_their_own() -> None:
    first = run({"ada": (0.5, 0.8)}, rounds=1)
    second = run({"bob": (1.5, 0.9)}, rounds=1, metric="relative_error", task="regression")
    alone = [*baseline({"ada": (0.5, 0.8)}, {"ada": 0.1}), *baseline({"bob": (1.5, 0.9)}, {}, metric="relative_error")]
    events = [{**first[0], "sites": ["ada", "bob"]}, *first[1:], *second[1:]]
    page = Page(build_page([history_of(events, alone)]))
    assert {
        "From alone to personal: accuracy (classification)",
        "From alone to personal: relative error (regression)",
    } <= {*page.tables}
    assert "Mean accuracy over the sites (classification)" in page.text
    assert "Mean relative error over the sites, lower is better (regression)" in page.text
    assert page.column("All sites", "task") == {"ada": "classification", "bob": "regression"}


def test_a_run_without_baseline_compares_with_the_base_model() -> None:
    page = Page(build_page([history_of(run(SITES))]))
    assert "gain ± s.e." not in page.tables["All sites"][0]
    assert page.column("From base model to personal: accuracy (classification)", "base model")["ada"] == "0.250"
    assert "the gain over training alone is not known" in page.text


def test_an_unfinished_run_says_how_far_it_got() -> None:
    events = run(SITES)
    after_one = next(i for i, event in enumerate(events) if event["event"] == "round") + 4
    page = Page(build_page([history_of(events[:after_one])]))
    assert "Not finished: after 1 of 3 rounds." in page.text
    assert page.column("Weight of every site in every round", "2")["cyd"] == "…"
    assert (
        "Failed after 1 of 3 rounds: no quorum"
        in Page(
            build_page(
                [
                    history_of(
                        [*events[:after_one], *timed([{"event": "run_failed", "reason": "no quorum", "final": True}])]
                    )
                ]
            )
        ).text
    )


def test_a_run_of_one_round_and_runs_that_have_hardly_begun() -> None:
    assert "Finished after 1 of 1 round." in Page(build_page([history_of(run(SITES, rounds=1))])).text
    assert "Not finished: after 0 of 3 rounds." in Page(build_page([history_of(run(SITES)[:1])])).text
    assert "There are no events of this run yet." in Page(build_page([history_of([])])).text


def test_a_repeated_round_counts_once() -> None:
    events = run(SITES)
    once = Page(build_page([history_of(events)]))
    again = [
        event for event in events if event.get("round") == 2 and event["event"] in ("round_started", "reply", "round")
    ]
    at = events.index(again[-1]) + 1
    twice = Page(
        build_page([history_of([*events[:at], {**events[at], "event": "resumed", "round": 1}, *again, *events[at:]])])
    )
    for caption in ("Cost of every round", "Cost of every site", "All sites"):
        assert twice.tables[caption] == once.tables[caption]


def test_logs_of_older_versions_lack_fields() -> None:
    events = [
        {k: v for k, v in e.items() if k not in ("settings", "versions", "recipe", "measuring", "residual", "kind")}
        for e in run(SITES)
    ]
    page = Page(build_page([history_of(events)]))
    assert "The event log does not contain the recipe" in page.text
    assert page.column("All sites", "personal")["ada"] == "0.800"


def test_the_recipe_and_the_versions_are_shown() -> None:
    page = Page(build_page([history_of(run(SITES))]))
    assert "lr = 0.005" in page.text
    assert page.column("Versions", "version") == {"colora": "0.1.0", "flwr": "1.42.0"}


def test_a_private_run_says_what_it_spent() -> None:
    settings = {"description": "Two sites.", "privacy": {"delta": 1e-5}}
    events = [started(["ada", "bob"], 1, settings=settings), joined("ada"), joined("bob")]
    events += [reply(site, 1, {"privacy.epsilon": spent}) for site, spent in (("ada", 1.5), ("bob", 2.25))]
    page = Page(build_page([history_of(timed([*events, ended(1, ["ada", "bob"])]))]))
    assert "Two sites." in page.text
    assert "the sites have spent at most ε = 2.25 at δ = 1e-05." in page.text


def test_groups_have_their_own_weights() -> None:
    sites = ["ada", "bob", "cyd"]
    cosines = {a: {b: float(a == b) for b in sites} for a in sites}
    tests = [{"groups": [["ada", "bob"], ["cyd"]], "p_value": 0.004}]
    events: list[Event] = [started(sites, 1), *map(joined, sites)]
    events.append({"event": "grouped", "groups": [["ada", "bob"], ["cyd"]], "tests": tests, "cosines": cosines})
    events += [{"event": "round_started", "round": 1, "sites": sites}, *(reply(site, 1, {}) for site in sites)]
    events.append(ended(1, sites, weights={"ada": 30.0, "bob": 10.0, "cyd": 5.0}))
    page = Page(build_page([history_of(timed(events))]))
    assert page.column("Weight of every site in every round", "1") == {"ada": "75", "bob": "25", "cyd": "100"}
    assert page.tables["Tests of a division into two groups"][1] == ["ada, bob", "cyd", "0.004"]


def test_several_runs_stand_beside_each_other(tmp_path: Path) -> None:
    folder = write(tmp_path / "demo", run(SITES), baseline(SITES, ERRORS))
    better = {site: (alone, personal + 0.1) for site, (alone, personal) in SITES.items()}
    other = write(tmp_path / "other", run(better, rounds=2), baseline(better, {}, rounds=2))
    page = Page(page_of(folder, other))
    assert page.column("Runs", "personal") == {"demo": "0.717", "other": "0.817"}
    assert page.column("Runs", "rounds") == {"demo": "3 of 3", "other": "2 of 2"}
    assert page.tables["Personal accuracy of every site"][1] == ["ada", "0.800", "0.900"]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
