"""A site's own event log holds what the site measured, whatever it sends, and makes a page and tracked runs."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from colora.client.trainer_service.client import TrainerError
from colora.client.trainer_service.site_events import SiteEvents
from colora.common.config.loader import load_site
from colora.common.config.schema import ModelSettings, Plan, to_json
from colora.common.protocol.types import TrainReply, TrainRequest
from colora.server.reporting.events import parse_lines
from colora.server.reporting.page.build import build_page
from colora.server.reporting.page.fold import read_history
from colora.server.reporting.site_tracking import SiteTrackers

if TYPE_CHECKING:
    from conftest import SiteSetup

ROUNDS = 2


def take_part(site: SiteSetup, name: str) -> Path:
    """Answer all requests of a federation; return its state folder."""
    plan, client = site.plan(name, rounds=ROUNDS, final_steps=1), site.client()
    client.site_info(plan.name, to_json(plan))
    for t in range(1, ROUNDS + 1):
        client.handle(site.request(plan, t, seed=t))
    client.handle(site.request(plan, ROUNDS + 1, kind="finalize"))
    return site.state / name


def test_the_log_has_the_metrics_that_are_withheld_and_the_page_shows_them(site_setup: SiteSetup) -> None:
    site_setup.configure("[allow]", 'metrics = "none"').start()
    folder = take_part(site_setup, "town")
    site_setup.running[0].wait_for("has ended after round")
    events, skipped = parse_lines(folder / "events.jsonl")
    assert not skipped
    names = ["started", "joined", *["round_started", "reply", "round"] * ROUNDS]
    assert [event["event"] for event in events] == [*names, "finalizing", "reply", "finalized", "finished"]
    assert (folder / "events.jsonl").stat().st_mode & 0o077 == 0

    history = read_history(folder)
    assert history.state == "finished"
    assert [record.number for record in history.training_rounds()] == [1, 2]
    (row,) = history.sites
    assert (row.train, row.test) == (18, 6)
    assert 0 <= row.metric("personal") <= 1
    assert sorted(history.losses["ada", "personal"]) == [1, 2]
    assert history.rounds[1].costs["ada"].down > history.rounds[3].costs["ada"].up == 0
    page = build_page([history])
    assert "town at ada" in page
    assert "Finished after 2 of 2 rounds" in page
    assert "Learning curves" in page


def test_an_error_is_in_the_log_and_a_repeated_request_counts_once(running_site: SiteSetup) -> None:
    plan, client = running_site.plan("errs"), running_site.client()
    client.site_info(plan.name, to_json(plan))
    request = running_site.request(plan)
    assert running_site.equal(client.handle(request), client.handle(request))
    with pytest.raises(TrainerError):
        client.handle(running_site.request(plan, 9))
    history = read_history(running_site.state / "errs")
    assert [record.cost.seconds for record in history.training_rounds()] == [history.sites[0].seconds]
    (incident,) = history.incidents
    assert (incident.kind, incident.site) == ("failed", "ada")


def test_an_event_that_cannot_be_written_costs_no_reply(running_site: SiteSetup) -> None:
    (running_site.state / "dark" / "events.jsonl").mkdir(parents=True)
    take_part(running_site, "dark")
    assert "cannot write" in running_site.running[0].log


def test_the_log_is_of_this_user_alone_and_a_record_that_fails_is_logged(tmp_path: Path, caplog: object) -> None:
    """Whatever the umask is. A metric beyond what an event can hold is null."""
    before = os.umask(0o022)
    try:
        events = SiteEvents(tmp_path / "town", "ada", Plan("town", 2, ModelSettings("m")))
        request = TrainRequest("town", 1, "train", 0, "{}", {}, True)
        events.began(request)
        events.replied(request, TrainReply("ada", "town", 1, "k", {}, 1, 1, {"train.loss": 1e30}), 9)
        events.joined(None)  # type: ignore[arg-type]
    finally:
        os.umask(before)
    assert events.path.stat().st_mode & 0o777 == 0o600
    found, skipped = parse_lines(events.path)
    assert not skipped
    assert [event["metrics"] for event in found if event["event"] == "reply"] == [{"train.loss": None}]
    assert "cannot write" in caplog.text  # type: ignore[attr-defined]


def test_a_sites_trackers_log_one_federation_after_the_other(site_setup: SiteSetup) -> None:
    from tensorboard.backend.event_processing import event_accumulator

    site_setup.configure("[tracking]", 'trackers = ["tensorboard"]').start()
    before, reports = take_part(site_setup, "before"), []
    with SiteTrackers(load_site(site_setup.file), reports.append) as trackers:
        for name in ("first", "second"):
            folder = take_part(site_setup, name)
            ends = time.monotonic() + 30
            while trackers.followed != folder / "events.jsonl" and time.monotonic() < ends:
                time.sleep(0.1)
    assert reports == []
    assert not (before / "trackers").exists()
    for name in ("first", "second"):
        folder = site_setup.state / name / "trackers" / "tensorboard"
        logged = event_accumulator.EventAccumulator(str(folder)).Reload()
        assert [scalar.step for scalar in logged.Scalars("train.loss/ada")] == [1, 2]
        assert [scalar.step for scalar in logged.Scalars("final.personal.accuracy/ada")] == [2]
