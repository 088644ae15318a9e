"""Limits on how often a coordinator may ask: requests of a day, and evaluations of a round."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from colora.client.trainer_service import request_ledger
from colora.client.trainer_service.request_ledger import check_requests_of_day, may_send_metrics
from colora.common.config.schema import DataSettings
from colora.common.config.site_schema import AllowSettings, SiteSettings, TrainerSettings
from colora.common.errors import RefusedError, StateError


def site_in(folder: Path, **allow: int) -> SiteSettings:
    trainer = TrainerSettings(state=str(folder))
    return SiteSettings("ada", DataSettings("a.csv"), trainer=trainer, allow=AllowSettings(**allow))  # type: ignore[arg-type]


def test_a_day_has_so_many_different_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated request is free, the next one is refused, and the next day begins anew."""
    site = site_in(tmp_path, max_requests_per_day=2)
    monkeypatch.setattr(request_ledger, "_today", lambda: "2026-01-01")
    for key in ("one", "two", "one", "two"):
        check_requests_of_day(site, key)
    for _ in range(2):
        with pytest.raises(
            RefusedError, match=r"allow.max_requests_per_day: expected at most 2 a day \(UTC\), found 3"
        ):
            check_requests_of_day(site, "three")
    check_requests_of_day(dataclasses.replace(site), "one")  # nothing but the file knows
    monkeypatch.setattr(request_ledger, "_today", lambda: "2026-01-02")
    check_requests_of_day(site, "three")
    assert (tmp_path / "requests.json").read_text() == '{"2026-01-02": ["three"]}'
    assert (tmp_path / "requests.json").stat().st_mode & 0o777 == 0o600


def test_a_round_is_evaluated_once_and_the_same_request_as_often_as_it_comes(tmp_path: Path) -> None:
    site, folder = site_in(tmp_path, max_evaluations=1), tmp_path / "town"
    asked = [("1", "one"), ("1", "other"), ("1", "one"), ("2", "other"), ("1", "other")]
    assert [may_send_metrics(site, folder, *each) for each in asked] == [True, False, True, True, False]
    assert may_send_metrics(site, tmp_path / "city", "1", "other")


def test_without_limits_nothing_is_written(tmp_path: Path) -> None:
    site = site_in(tmp_path)
    check_requests_of_day(site, "one")
    assert may_send_metrics(site, tmp_path, "1", "one")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_ledger_refuses_instead_of_counting_from_zero(tmp_path: Path) -> None:
    site = site_in(tmp_path, max_requests_per_day=2, max_evaluations=1)
    for name in ("requests.json", "evaluations.json"):
        (tmp_path / name).write_text('["torn')
    with pytest.raises(StateError, match=r"requests.json is damaged.*delete it to count from zero"):
        check_requests_of_day(site, "one")
    with pytest.raises(StateError, match=r"evaluations.json is damaged"):
        may_send_metrics(site, tmp_path, "1", "one")
