"""``colora report``: a light command that writes the page of finished and unfinished runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from colora.cli import app
from colora.common.errors import StateError

STARTED = (
    '{"time": 1.0, "event": "started", "federation": "demo", "method": "colora", "model": "m", "rounds": 2, '
    '"sites": ["ada", "bob"]}\n'
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "events.jsonl").write_text(STARTED)
    return folder


def test_one_run_is_written_into_its_folder_and_several_beside(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["report", str(run)]).stdout == f"Report: {run}/report.html\n"
    assert "Not finished: after 0 of 2 rounds." in (run / "report.html").read_text(encoding="utf-8")
    assert CliRunner().invoke(app, ["report", str(run), str(run)]).stdout == "Report: report.html\n"
    assert "Runs beside each other" in (tmp_path / "report.html").read_text(encoding="utf-8")
    done = CliRunner().invoke(app, ["report", str(run / "events.jsonl"), "--out", "pages/a.html"])
    assert done.stdout == "Report: pages/a.html\n"
    assert (tmp_path / "pages" / "a.html").exists()


def test_skipped_lines_are_told(run: Path) -> None:
    (run / "events.jsonl").write_text(STARTED + "garbage\n")
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 0
    assert "1 of 2 lines are not events and were skipped" in done.stderr


def test_a_folder_without_events_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert isinstance(done.exception, StateError)
    assert f"{tmp_path} has no events.jsonl." in str(done.exception)


def test_the_command_imports_no_torch(run: Path) -> None:
    code = (
        f"import sys; sys.argv = ['colora', 'report', {str(run)!r}]\n"
        "from colora.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'flwr', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
