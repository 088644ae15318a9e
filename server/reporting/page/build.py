"""Builds the page from event logs: one file without any reference to another."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from pathlib import Path

from ....common.atomic_io import write_atomically
from .fold import read_history
from .formats import count
from .headline import headline
from .history import History
from .markup import Html, element
from .placement import Placement
from .results import all_sites, curves, gains, shared_against_personal
from .round_sections import admissions, costs
from .setup_sections import groups, recipe
from .side_by_side import side_by_side

SECTIONS = (gains, curves, shared_against_personal, admissions, costs, all_sites, groups, recipe)


def write_page(runs: Sequence[Path], out: Path) -> list[str]:
    """Write the page of these runs (folders or their ``events.jsonl``) to a file. Raises StateError.

    Returns sentences about lines of the logs that are not events.
    The file has the permissions of the first event log, whose content it shows.
    """
    histories = [read_history(run, label) for run, label in zip(runs, _labels(runs), strict=True)]
    write_atomically(out, build_page(histories).encode(), lasting=False)
    log = runs[0] if runs[0].is_file() else runs[0] / "events.jsonl"
    if log.exists():
        out.chmod(log.stat().st_mode & 0o666)
    return [history.skipped for history in histories if history.skipped]


def build_page(histories: Sequence[History], *, live: bool = False) -> str:
    """Return the page of one run, or of several beside each other. A ``live`` page loads itself again when told to."""
    style, scripts = _asset("page.css"), [_asset(name) for name in ("page.js", *(["live.js"] if live else []))]
    allowed = " ".join(f"'{_hash(script)}'" for script in scripts)
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src {allowed}; {_LOCKED}"
    policy += "; connect-src 'self'" if live else ""
    title = ", ".join(dict.fromkeys(_name(history) for history in histories))
    head = (
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", f"{title}: colora report"),
        element("style", style),
        *(element("script", script) for script in scripts),
    )
    content = _one(histories[0], live=live) if len(histories) == 1 else _several(histories)
    body = element("body", element("main", *content, id="main"))
    return f"<!doctype html>\n{element('html', element('head', *head), body, lang='en')}\n"


_LOCKED = "base-uri 'none'; form-action 'none'"


def _one(history: History, *, live: bool) -> list[Html]:
    place = Placement()
    sections = [section for make in SECTIONS if (section := make(history, place)) is not None]
    return [_header(history, 1), _navigation(place), *sections, _footer([history], live=live)]


def _several(histories: Sequence[History]) -> list[Html]:
    first = Placement()
    compared = side_by_side(histories, first)
    runs, titles = [], [*first.titles]
    for i, history in enumerate(histories, 1):
        place = Placement(f"run{i}-", level=3)
        sections = [section for make in SECTIONS if (section := make(history, place)) is not None]
        titles.append((f"run{i}", history.label))
        runs.append(element("article", _header(history, 2, f"run{i}"), _navigation(place), *sections))
    title = element("header", element("p", "colora report", class_="brand"), element("h1", f"{len(histories)} runs"))
    return [title, _navigation(Placement(titles=titles)), compared, *runs, _footer(histories)]


def _header(history: History, level: int, id_: str | None = None) -> Html:
    summary = history.summary
    name = _name(history) if level == 1 else history.label
    about = [f"{summary.method} on {summary.model}"] if summary.method else []
    about += [count(len(history.sites), "site")] if history.sites else []
    about += [f"began {_date(history.began)}"] if history.began else []
    brand = element("p", "colora report", class_="brand") if level == 1 else None
    words = element("p", " · ".join(about), class_="about")
    content = headline(history) if history.events else [element("p", "There are no events of this run yet.")]
    return element("header", brand, element(f"h{level}", name, id=id_), words, _state(history), *content)


def _state(history: History) -> Html:
    """A line that says how far the run got."""
    done, rounds = len(history.training_rounds()), history.summary.rounds
    after = f"after {done} of {count(rounds, 'round')}"
    baseline = history.summary.baseline and not history.baseline_ended
    words = {
        "finished": f"Finished {after}" + (". Local-only training has not finished." if baseline else "."),
        "stopped": f"Stopped {after}. The same command continues the run.",
        "failed": f"Failed {after}: {_last_failure(history)}",
        "running": f"Not finished: {after}. Last event: {_date(history.ended)}.",
    }
    class_ = "unfinished" if baseline or history.state != "finished" else "finished"
    class_ = "failed" if history.state == "failed" else class_
    return element("p", words.get(history.state, "Not started."), class_=f"state {class_}")


def _last_failure(history: History) -> str:
    return next((i.reason for i in reversed(history.incidents) if i.kind == "run_failed"), "")


def _navigation(place: Placement) -> Html:
    links = [element("li", element("a", title, href=f"#{id_}")) for id_, title in place.titles]
    return element("nav", element("ul", *links), aria_label=f"Sections {place.prefix.rstrip('-')}".strip())


def _footer(histories: Sequence[History], *, live: bool = False) -> Html:
    made = count(sum(history.events for history in histories), "event")
    loads = "It is updated while the run goes on." if live else "The page loads nothing and sends nothing."
    lines = [element("p", f"Made from {made} in events.jsonl. {loads}")]
    lines += [element("p", history.skipped + ".", class_="note") for history in histories if history.skipped]
    return element("footer", *lines)


def _name(history: History) -> str:
    name = history.summary.federation or history.label or "run"
    return f"{name} at {history.at_site}" if history.at_site else name


def _date(seconds: float | None) -> str:
    try:
        return datetime.fromtimestamp(seconds or 0, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, OSError, ValueError):
        return "at an unknown time"


def _labels(runs: Sequence[Path]) -> list[str]:
    """The names of the run folders; where two are equal, with as many parents as tell them apart."""
    folders = [(run.parent if run.is_file() else run).resolve() for run in runs]
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        labels = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{folder.name} ({i})" for i, folder in enumerate(folders, 1)]


@cache
def _asset(name: str) -> Html:
    return Html(resources.files(str(__package__)).joinpath(name).read_text(encoding="utf-8"))


def _hash(text: str) -> str:
    """The source expression of an inline style or script in a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
