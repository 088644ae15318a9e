"""The live page follows a run that other processes write, and shows it to those who know its address only."""

from __future__ import annotations

import html
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
from typer.testing import CliRunner

from colora.cli import app
from colora.common.errors import ConfigError, StateError
from colora.server.reporting import watch
from tests.server.reporting.page.runs import ended, joined, reply, started, timed

SITES = ["ada", "bob"]
EVENTS = timed(
    [
        started(SITES, 1),
        *map(joined, SITES),
        {"event": "agreed", "weights": "tokens"},
        {"event": "round_started", "round": 1, "sites": SITES},
        *(reply(site, 1, {"train.loss": 0.5, "personal.accuracy": 0.8}) for site in SITES),
        ended(1, SITES),
        {"event": "finished", "seconds": 9.0},
    ]
)
TOKEN = "a-token-of-the-test"


@dataclass
class Watched:
    """A served run."""

    run: Path
    url: str

    @property
    def page(self) -> str:
        return httpx.get(f"{self.url}/{TOKEN}/").text

    def append(self, events: list[dict]) -> None:
        with (self.run / "events.jsonl").open("a") as file:
            file.writelines(json.dumps(event) + "\n" for event in events)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Watched]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(watch.make_app(tmp_path, TOKEN), log_level="error"))
    server.config.timeout_graceful_shutdown = 1
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield Watched(tmp_path, f"http://127.0.0.1:{listener.getsockname()[1]}")
    server.should_exit = True
    thread.join()


def told(url: str, seconds: float) -> float:
    """Seconds until a stream tells of a new page."""
    began = time.monotonic()
    with httpx.stream("GET", f"{url}/{TOKEN}/events", timeout=seconds) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:"):
                return time.monotonic() - began
    raise AssertionError("the stream ended")


def test_the_page_follows_the_run_within_two_seconds(served: Watched) -> None:
    assert "There are no events of this run yet." in served.page
    with ThreadPoolExecutor() as pool:
        for part in (EVENTS[:3], EVENTS[3:]):
            waits = [pool.submit(told, served.url, 10) for _ in range(3)]
            time.sleep(1.0)
            served.append(part)
            appended = time.monotonic()
            for wait in waits:
                wait.result()
            assert time.monotonic() - appended < 2
    assert "ada" in served.page
    assert "Finished" in served.page


def test_a_page_is_made_once_for_all_viewers(served: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    build = watch.build_page
    monkeypatch.setattr(watch, "build_page", lambda *a, **k: made.append(time.monotonic()) or build(*a, **k))
    with ThreadPoolExecutor(20) as pool:
        waits = [pool.submit(told, served.url, 10) for _ in range(20)]
        time.sleep(1.0)
        before = len(made)
        served.append(EVENTS)
        for wait in waits:
            wait.result()
        pages = list(pool.map(lambda _: served.page, range(20)))
    assert len(made) == before + 1
    assert len(set(pages)) == 1


@pytest.mark.parametrize("path", ["", "/", "/wrong/", "/wrong/events", f"/{TOKEN}x/", f"/{TOKEN}/other", "/é/"])
def test_without_the_token_there_is_nothing_to_see(served: Watched, path: str) -> None:
    served.append(EVENTS)
    response = httpx.get(served.url + path, follow_redirects=True)
    assert response.status_code == 403
    assert "ada" not in response.text


def test_nothing_can_be_changed(served: Watched) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert httpx.request(method, f"{served.url}/{TOKEN}/").status_code == 405


def test_the_page_may_ask_its_own_server_only(served: Watched) -> None:
    page = html.unescape(served.page)
    assert "connect-src 'self'" in page
    assert "default-src 'none'" in page


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["watch", str(tmp_path / "no")])
    assert isinstance(result.exception, StateError)
    assert "is not a run folder" in str(result.exception)


def test_a_site_is_watched_by_its_site_file(tmp_path: Path) -> None:
    """The federation with the newest event is shown."""
    from colora.cli.watch import _run_folder

    site = tmp_path / "site.toml"
    site.write_text('name = "ada"\n[data]\nsource = "rows.csv"\n')
    with pytest.raises(StateError, match="The site ada has not worked for a federation yet"):
        _run_folder(None, site)
    for name, written in (("old", 100), ("new", 300), ("older", 50)):
        log = tmp_path / "state" / name / "events.jsonl"
        log.parent.mkdir(parents=True)
        log.write_text("")
        os.utime(log, (written, written))
    assert _run_folder(None, site) == tmp_path / "state" / "new"


@pytest.mark.parametrize("arguments", [[], ["runs/demo", "--site", "site.toml"]])
def test_a_run_or_a_site_is_watched(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["watch", *arguments])
    assert isinstance(result.exception, ConfigError)
