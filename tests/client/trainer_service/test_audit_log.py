"""The audit log: one complete line for everything that is sent, written before it is sent."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from colora.client.trainer_service.audit_log import AuditLog
from colora.common.errors import StateError
from colora.common.protocol.types import SiteInfo, TrainReply, TrainRequest

SHARED = {"b": np.array([[3.0, 4.0]], np.float32), "a": np.zeros(5, np.float32)}
REQUEST = TrainRequest("town", 3, "train", 2, "{}", SHARED, True)
REPLY = TrainReply("ada", "town", 3, "key", SHARED, 8, 8, {"train.loss": 1.0, "base.loss": 2.0})


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


def test_a_reply_is_noted_array_by_array(tmp_path: Path) -> None:
    """Norm by hand (3, 4, 5), hash by hashlib; metrics by name, never by value."""
    size = AuditLog(tmp_path, "town").reply(REPLY, REQUEST, replayed=False)
    (line,) = lines(tmp_path)
    assert size == line["bytes"] == 8 + 20 + len("train.loss") + len("base.loss") + 16
    assert {key: line[key] for key in ("federation", "kind", "round", "phase", "key", "replayed", "metrics")} == {
        "federation": "town",
        "kind": "reply",
        "round": 3,
        "phase": "train",
        "key": "key",
        "replayed": False,
        "metrics": ["base.loss", "train.loss"],
    }
    a, b = line["arrays"]
    assert (a["name"], a["norm"], a["shape"]) == ("a", 0.0, [5])
    hashed = hashlib.sha256(SHARED["b"].tobytes()).hexdigest()
    assert b == {"name": "b", "shape": [1, 2], "dtype": "float32", "bytes": 8, "norm": 5.0, "sha256": hashed}


def test_everything_that_leaves_has_its_line_in_order(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "new", "town")
    audit.site_info(SiteInfo("ada", 1, "m", "t", "c", "l", "generation", 10, 4, 1, 2))
    audit.reply(REPLY, REQUEST, replayed=False)
    audit.reply(REPLY, REQUEST, replayed=True)
    audit.error("DataError: data.label")
    found = lines(tmp_path / "new")
    assert [line["kind"] for line in found] == ["description", "reply", "reply", "error"]
    assert [line.get("replayed") for line in found] == [None, False, True, None]
    assert (tmp_path / "new" / "audit.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_line_after_a_torn_one_is_whole(tmp_path: Path) -> None:
    """A kill during a write costs that line, whose message was never sent."""
    (tmp_path / "audit.jsonl").write_text('{"time": "2026')
    AuditLog(tmp_path, "town").error("x")
    torn, whole = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert torn == '{"time": "2026'
    assert json.loads(whole)["text"] == "x"


def test_a_line_that_finds_no_room_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = AuditLog(tmp_path, "town")
    audit.error("first")
    before = (tmp_path / "audit.jsonl").read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:10]))  # as on a full disk
    with pytest.raises(StateError, match=r"Cannot write the audit log .*audit.jsonl: no space left"):
        audit.reply(REPLY, REQUEST, replayed=False)
    assert (tmp_path / "audit.jsonl").read_bytes() == before


def test_a_number_that_is_none_has_a_norm_that_json_can_say(tmp_path: Path) -> None:
    broken = TrainReply("ada", "town", 3, "key", {"a": np.array([np.nan], np.float32)}, 8, 8)
    AuditLog(tmp_path, "town").reply(broken, REQUEST, replayed=False)
    assert lines(tmp_path)[0]["arrays"][0]["norm"] == "nan"
