"""The trainer's accepting step: what it records of every failure, and that it keeps within the site's disk."""

from __future__ import annotations

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from colora.client.trainer_service import server
from colora.client.trainer_service.proto import trainer_pb2 as pb
from colora.client.trainer_service.server import TrainerServicer
from colora.client.trainer_service.session import TrainerSession
from colora.common.config.data_schema import DataSettings
from colora.common.config.site_schema import AllowSettings, SiteSettings, TrainerSettings
from colora.common.errors import ModelError, RefusedError
from colora.common.protocol.types import PROTOCOL, SiteInfo

INFO = SiteInfo("ada", PROTOCOL, "m", "t", "c", "L", "classification", 40, 10, 0, 0)
PLAN = {"name": "fed", "rounds": 3, "model": {"source": "asset:x"}}
NAMES = [f"x{number:03d}".ljust(200, "y") for number in range(256)]
LARGE = {**PLAN, "adapter": {"target_modules": ["query"], "exclude_modules": NAMES}}


class Aborted(Exception):
    """The end of a call."""


class FakeContext:
    async def abort(self, code: object, message: str) -> None:
        raise Aborted(message)


def servicer(state: Path, max_disk: float = 1.0) -> TrainerServicer:
    """A trainer that describes itself without a model."""
    allow, trainer = AllowSettings(max_disk=max_disk), TrainerSettings(state=str(state))
    session = TrainerSession(SiteSettings("ada", DataSettings(source="x.csv"), trainer=trainer, allow=allow))
    session.site_info = lambda plan: INFO  # type: ignore[method-assign]
    return TrainerServicer(session, ThreadPoolExecutor(1))


async def join(trainer: TrainerServicer, plan: Any, federation: str = "fed") -> str:
    """Join with a plan; return the public text of the error, or an empty text."""
    request = pb.SiteInfoRequest(federation=federation, plan=json.dumps(plan), protocol=PROTOCOL)
    try:
        await trainer.GetSiteInfo(request, FakeContext())  # type: ignore[arg-type]
    except Aborted as error:
        return str(error)
    return ""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_descriptions_never_exceed_the_disk_of_a_federation(tmp_path: Path) -> None:
    """60 joins with a plan of 50 kB would write 9.6 MB; 1 MB is allowed."""
    trainer = servicer(tmp_path, max_disk=1e-4)  # 100 kB

    async def joins() -> list[str]:
        plans = [{**LARGE, "seed": number} for number in range(60)]  # each is new
        return [await join(trainer, plan) for plan in plans]

    answers = asyncio.run(joins())
    assert answers[0] == ""
    assert answers[-1] == "RefusedError: allow.max_disk"
    size = sum(path.stat().st_size for path in (tmp_path / "fed").iterdir())
    assert size < 100_000 + 70_000, "one more plan than fits"
    assert lines(tmp_path / "audit.jsonl")[-1]["text"] == "RefusedError: allow.max_disk"


def test_settings_are_written_once_for_a_plan(tmp_path: Path) -> None:
    trainer = servicer(tmp_path)

    async def joins() -> None:
        for plan in (LARGE, LARGE, LARGE, PLAN, PLAN):
            assert await join(trainer, plan) == ""

    asyncio.run(joins())
    started = [line for line in lines(tmp_path / "fed" / "events.jsonl") if line["event"] == "started"]
    assert ["settings" in line for line in started] == [True, False, False, True, False]


@pytest.mark.parametrize("key", ["a b", "", "a-b", "k" * 99_999])
def test_a_plan_with_an_odd_key_is_a_recorded_refusal(tmp_path: Path, key: str) -> None:
    answer = asyncio.run(join(servicer(tmp_path), {**PLAN, key: 1}))
    assert answer.startswith("ConfigError")
    (line,) = lines(tmp_path / "audit.jsonl")
    assert (line["kind"], line["text"]) == ("refusal", answer)
    assert "There is no key" in line["reason"]


def test_an_unexpected_error_of_the_accepting_step_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = servicer(tmp_path)

    def fail(*_: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(trainer.session, "accept", fail)
    assert asyncio.run(join(trainer, PLAN)) == "IndexError"
    (line,) = lines(tmp_path / "audit.jsonl")
    assert (line["kind"], line["text"], line["reason"]) == ("refusal", "IndexError", "list index out of range")


@pytest.mark.parametrize(
    "error",
    [
        *(kind("model.source", "a model", "x" * 300_000) for kind in (ModelError, RefusedError)),
        ModelError("model.source", "x", "y", message="x" * 300_000, hint="y" * 300_000),
        *(ValueError("x" * 300_000), KeyError("a\n" * 100_000), ExceptionGroup("x" * 9999, [ValueError("y" * 99_999)])),
    ],
)
def test_an_error_that_quotes_a_whole_plan_is_cut_in_the_log(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    server._log_error(error)
    text = logging.Formatter("%(message)s").format(caplog.records[-1])
    assert len(text) < 10_000


def test_an_unexpected_error_has_its_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    try:
        json.loads("{")
    except ValueError as error:
        server._log_error(error)
    text = logging.Formatter("%(message)s").format(caplog.records[-1])
    assert text.startswith("unexpected error, JSONDecodeError: ")
    assert 'json.loads("{")' in text
