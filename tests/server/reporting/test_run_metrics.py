"""The metrics of a run, as Prometheus reads them."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from colora.common.errors import ConfigError
from colora.common.prometheus import serve_metrics
from colora.server.reporting.run_metrics import run_metrics
from tests.server.reporting.page.runs import DOWN, UP, WORK, Event, ended, joined, reply, started, timed

SITES = ["ada", "bob"]
EVENTS = timed(
    [
        started(SITES, 3),
        *map(joined, SITES),
        *(reply(site, 1, {"train.loss": 0.5}) for site in SITES),
        ended(1, SITES),
        reply("ada", 2, {}),
        {"event": "failed", "round": 2, "site": "bob", "reason": "no reply", "silent": True},
        {
            "event": "refused",
            "round": 2,
            "site": "mallory\n} 1",
            "reason": "x",
            "field": "",
            "expected": "",
            "found": "",
        },
        {"event": "restarted", "what": "superlink"},
        ended(2, ["ada"]),
    ]
)


def append(run: Path, events: list[Event]) -> None:
    with (run / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def scraped(port: int) -> dict[tuple, float]:
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    families = text_string_to_metric_families(text)
    return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}


def test_every_event_is_counted_once_also_while_the_run_goes_on(tmp_path: Path) -> None:
    port = serve_metrics(0, run_metrics(tmp_path))
    assert scraped(port) == {}
    append(tmp_path, EVENTS[:4])
    scraped(port)
    append(tmp_path, EVENTS[4:])
    found = scraped(port)
    ada = ("site", "ada")
    assert found["colora_round",] == 2
    assert found["colora_rounds",] == 3
    assert found["colora_round_sites",] == 1
    assert found["colora_finished",] == 0
    assert found["colora_replies_total", ada] == 2
    assert found["colora_bytes_total", ("direction", "up"), ada] == 2 * UP
    assert found["colora_bytes_total", ("direction", "down"), ada] == 2 * DOWN
    assert found["colora_site_seconds_total", ("phase", "training"), ada] == 2 * (WORK - 0.5)
    assert found["colora_failures_total", ("site", "bob")] == 1
    assert found["colora_refusals_total", ("site", "unknown")] == 1
    assert found["colora_restarts_total", ("component", "superlink")] == 1
    assert found["colora_last_event_timestamp_seconds",] == EVENTS[-1]["time"]
    append(tmp_path, timed([{"event": "finished", "seconds": 1.0}]))
    assert scraped(port)["colora_finished",] == 1


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="--metrics-port"):
        serve_metrics(taken.getsockname()[1], run_metrics(tmp_path))
