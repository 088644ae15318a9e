"""The metrics of a site, from what its audit logs record."""

from __future__ import annotations

from pathlib import Path

import pytest

from colora.client.deployment.site_metrics import site_metrics
from colora.client.trainer_service.audit_log import AuditLog


def test_answers_are_counted_by_federation_and_kind(tmp_path: Path) -> None:
    read = site_metrics(tmp_path, lambda: {"trainer": 3, "supernode": 1})
    (tmp_path / "town").mkdir()
    log, site_log = AuditLog(tmp_path / "town", "town"), AuditLog(tmp_path, "other")
    sizes = [log.error("DataError: data.label"), log.error("MemoryError")]
    read()
    sizes.append(log.error("MemoryError"))
    refused = site_log.refusal("RefusedError: train.steps", "expected at most 5")
    with log.path.open("a") as file:
        file.write('{"half a line')
    found = {metric.name: metric.values for metric in read()}
    assert found["colora_site_answers"] == {("town", "errors"): 3, ("other", "refusals"): 1}
    assert found["colora_site_sent_bytes"] == {("town",): sum(sizes), ("other",): refused}
    assert found["colora_site_restarts"] == {("trainer",): 2, ("supernode",): 0}
    assert found["colora_site_last_answer_timestamp_seconds"].keys() == {("town",), ("other",)}


@pytest.mark.parametrize(
    "line",
    [
        '{"time": "2026-01-01T00:00:00+00:00", "fed',
        *("5", "[1]", '"x"', "null", "{}", "[" * 100_000, "\0" * 50),
        *('{"kind": "reply"}', '{"kind": ["reply"], "bytes": 1, "time": "2026-01-01"}'),
        *('{"kind": "error", "bytes": NaN, "time": "2026-01-01"}', '{"kind": "error", "bytes": 1, "time": 5}'),
        '{"kind": "reply", "bytes": 1, "time": "2026-01-01", "round": "x"}',
        '{"kind": "other", "bytes": 1, "time": "2026-01-01"}',
    ],
)
def test_a_damaged_line_is_left_out_and_the_others_count(tmp_path: Path, line: str) -> None:
    """A kill tears a line, and the log goes on after it."""
    read, log = site_metrics(tmp_path, dict), AuditLog(tmp_path / "town", "town")
    log.error("MemoryError")
    with log.path.open("a") as file:
        file.write(line)
    log.error("MemoryError")
    for _ in range(2):
        found = {metric.name: metric.values for metric in read()}
        assert found["colora_site_answers"] == {("town", "errors"): 2}
