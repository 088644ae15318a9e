"""The page shows the numbers of the events, of every kind of run, and nothing in it acts or leaves."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import stat
from pathlib import Path

import pytest

from colora.server.reporting.page.build import build_page, write_page

from .reading import Page
from .runs import Event, baseline, ended, history_of, joined, page_of, reply, run, started, timed, write

SITES = {"ada": (0.50, 0.80), "bob": (0.70, 0.65), "cyd": (0.60, 0.70)}  # gains +0.30, −0.05, +0.10
ERRORS = {"ada": 0.04, "bob": 0.03, "cyd": 0.06}
HOSTILE = (
    '<script>alert("x")</script>',
    "[/bold]",
    '"><img src=x onerror=alert(1)>',
    "javascript:alert(1)",
    "a\u202eb\x07",
)
STRUCTURE = (
    "html head meta title style script body main header section article footer nav h1 h2 h3 h4 p a b ul ol li dl"
)
TABLES = "div dt dd span table caption thead tbody tr th td details summary pre code figure figcaption"
TAGS = {*f"{STRUCTURE} {TABLES} svg g text line rect circle polyline".split()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "demo", run(SITES), baseline(SITES, ERRORS))


def test_the_page_shows_the_numbers_of_the_events(folder: Path) -> None:
    page = Page(page_of(folder))
    results = "All sites"
    assert page.column(results, "alone") == {"ada": "0.500", "bob": "0.700", "cyd": "0.600"}
    assert page.column(results, "personal") == {"ada": "0.800", "bob": "0.650", "cyd": "0.700"}
    assert page.column(results, "base model") == {"ada": "0.250", "bob": "0.350", "cyd": "0.300"}
    gains = {"ada": "+0.300 ± 0.040", "bob": "−0.050 ± 0.030", "cyd": "+0.100 ± 0.060"}
    assert page.column(results, "gain ± s.e.") == gains
    strips = "From alone to personal: accuracy (classification)"
    assert page.column(strips, "gain ± s.e.") == gains
    assert list(page.column(strips, "gain ± s.e.")) == ["ada", "cyd", "bob"], "the largest gain first"
    assert page.column(results, "truncated") == dict.fromkeys(SITES, "2")


def test_the_headline_answers_who_gained_who_lost_and_what_it_cost(folder: Path) -> None:
    """The mean gain is 0.35 / 3; a round moves 3 x 4 kB; the run and its baseline took 60 and 40 s."""
    text = Page(page_of(folder)).text
    assert "Gained most: ada , accuracy 0.800 instead of 0.500 (+0.300 ± 0.040)." in text
    assert (
        "Lost most: bob , accuracy 0.650 instead of 0.700 (−0.050 ± 0.030, which is within 2 standard errors)." in text
    )
    assert "the personal models gain +0.117 ± 0.101 over training alone on average (3 sites, one seed)" in text
    assert "Beyond 2 standard errors, 1 of 3 sites are better and 0 worse." in text
    assert "A typical round took 5.0 s and moved 12.0 kB" in text
    assert "No reply was left out." in text
    assert "Truncated: 6 of 324 rows" in text
    assert "Dropped: 3 rows" in text
    assert "48.0 kB" in text  # of 3 rounds and the finalization
    assert "in 2 min with the baseline" in text  # 100 s


def test_curves_have_the_mean_of_the_sites_at_the_rounds_trained(folder: Path) -> None:
    """What a site measures in round t belongs to the adapter after t − 1 rounds: 99 % at 0, and all at the end."""
    page = Page(page_of(folder))
    personal = page.column("Mean accuracy by rounds trained", "personal")
    mean = (0.80 + 0.65 + 0.70) / 3
    assert {x: float(v) for x, v in personal.items()} == {
        str(t): pytest.approx(mean * (100 - t - 1) / 100 if t < 3 else mean, abs=5e-4) for t in range(4)
    }
    assert page.column("Mean accuracy by rounds trained", "alone")["3"] == "0.600"
    assert page.column("Mean training loss by round", "personal") == {"1": "1.000", "2": "0.500", "3": "0.333"}


def test_costs_are_those_of_the_replies(folder: Path) -> None:
    page = Page(page_of(folder))
    assert page.column("Cost of every round", "sent") == dict.fromkeys(("1", "2", "3", "final"), "3.00 kB")
    assert page.column("Cost of every round", "duration") == {
        "1": "5.0 s",
        "2": "5.0 s",
        "3": "5.0 s",
        "final": "4.0 s",
    }
    assert page.column("Cost of every site", "received") == dict.fromkeys(SITES, "12.0 kB")
    assert page.column("Cost of every site", "of which measuring") == dict.fromkeys(SITES, "2.0 s")


def test_left_out_late_and_clipped_replies_have_their_reasons() -> None:
    sites = ["ada", "bob", "cyd", "dee"]
    events: list[Event] = [started(sites, 2), *map(joined, sites)]
    events += [{"event": "round_started", "round": 1, "sites": sites[:3]}, reply("ada", 1, {}), reply("cyd", 1, {})]
    events.append({"event": "failed", "round": 1, "site": "bob", "reason": "MemoryError", "silent": False})
    events.append({"event": "clipped", "round": 1, "site": "cyd", "norm": 6.0, "bound": 1.5})
    events.append(ended(1, ["ada", "cyd"], weights={"ada": 30.0, "cyd": 10.0}))
    events.append({"event": "round_started", "round": 2, "sites": sites})
    events.append({"event": "late", "round": 2, "site": "bob", "reason": "replied after its round had ended: ignored"})
    events.append({"event": "refused", "round": 2, "site": "cyd", "reason": "site cyd: B: expected finite values"})
    events += [reply("ada", 2, {}), reply("bob", 2, {}), ended(2, ["ada", "bob"])]
    page = Page(build_page([history_of(timed(events))]))
    table = page.tables["Weight of every site in every round"]
    assert table == [
        ["site", "1", "2"],
        ["ada", "75", "50"],
        ["bob", "F", "50"],
        ["cyd", "25c", "R"],
        ["dee", "·", "A"],
    ]
    assert page.tables["Incidents"][1:] == [
        ["bob", "1", "failed", "MemoryError"],
        ["cyd", "1", "clipped", "the norm of its update, 6, was 4.0 times the bound of 1.5"],
        ["bob", "2", "late", "replied after its round had ended: ignored"],
        ["cyd", "2", "refused", "B: expected finite values"],
    ]
    assert "Left out: bob , round 1: MemoryError." in page.text
    assert "3 replies of 2 sites" in page.text


def test_nothing_is_loaded_from_anywhere(folder: Path) -> None:
    text = page_of(folder)
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    for tag, attributes in page.elements:
        assert tag in TAGS, tag
        assert not {"src", "srcset", "action", "data", "style"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")
    targets = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {a["href"][1:] for tag, a in page.elements if tag == "a"} <= targets


def test_the_policy_allows_only_the_style_and_the_script_of_the_page(folder: Path) -> None:
    page = Page(page_of(folder))
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    hashes = {
        name: "'sha256-" + base64.b64encode(hashlib.sha256(page.raw[name].encode()).digest()).decode() + "'"
        for name in ("style", "script")
    }
    assert policy == (
        f"default-src 'none'; style-src {hashes['style']}; script-src {hashes['script']}; "
        "base-uri 'none'; form-action 'none'"
    )


def test_texts_of_sites_are_inert() -> None:
    names = list(HOSTILE)
    events: list[Event] = [
        started(names, 1, model=HOSTILE[0], federation=HOSTILE[2], versions={HOSTILE[0]: HOSTILE[2]})
    ]
    events[0]["settings"] = {"name": HOSTILE[0], "</code></pre><b>": HOSTILE[2]}
    events += [joined(name) for name in names]
    cosines = {a: dict.fromkeys(names, 0.5) for a in names}
    tests = [{"groups": [names[:2], names[2:]], "p_value": 0.01}]
    events.append({"event": "grouped", "groups": [names[:2], names[2:]], "tests": tests, "cosines": cosines})
    events += [{"event": "round_started", "round": 1, "sites": names}]
    events += [
        reply(name, 1, {"personal.accuracy": 0.5 + i / 10, "shared.accuracy": 0.5}) for i, name in enumerate(names)
    ]
    events += [{"event": "refused", "round": 1, "site": name, "reason": name} for name in names]
    events += [{"event": "run_failed", "reason": HOSTILE[0], "final": True}]
    text = build_page([history_of(timed(events))] * 2)
    page = Page(text)
    assert {tag for tag, _ in page.elements} <= TAGS
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert "[/bold]" in page.text
    assert all(character.isprintable() or character == "\n" for character in text)


def test_lines_that_are_not_events_are_skipped_and_counted(folder: Path) -> None:
    log = folder / "events.jsonl"
    log.write_text(log.read_text() + "garbage\n" + json.dumps({"event": "reply", "time": 1}) + "\n{part")
    before = Page(page_of(folder))
    assert "2 of 28 lines are not events and were skipped." in before.text
    assert before.column("All sites", "personal")["ada"] == "0.800"


def test_every_chart_has_a_name_and_a_table(folder: Path) -> None:
    page = Page(page_of(folder))
    charts = [attributes for _, attributes in page.elements if attributes.get("role") == "img"]
    assert len(charts) == 3
    assert all(chart["aria-label"] and chart["tabindex"] == "0" for chart in charts)
    assert page.text.count("Values of this chart") == 3
    for tag, attributes in page.elements:
        if tag == "svg" and "plot" not in attributes.get("class", "") and "viewbox" not in attributes:
            assert attributes["aria-hidden"] == "true"


def test_the_file_has_the_permissions_of_the_event_log(folder: Path, tmp_path: Path) -> None:
    (folder / "events.jsonl").chmod(0o640)
    write_page([folder], folder / "report.html")
    assert stat.S_IMODE((folder / "report.html").stat().st_mode) == 0o640
    write_page([folder / "events.jsonl"], tmp_path / "from-file.html")
    assert (tmp_path / "from-file.html").read_bytes() == (folder / "report.html").read_bytes()
