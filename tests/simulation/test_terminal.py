"""What ``colora simulate`` tells on its terminal, and what of it the coordinator does not know."""

from __future__ import annotations

import io
import shutil
import sys
import time
from pathlib import Path

import pytest
import tomli_w
from flwr.app import Message
from rich.console import Console

from colora.cli import main
from colora.common.errors import DataError, ModelError
from colora.server.reporting.console import LiveDisplay
from colora.simulation import site_pool


@pytest.fixture
def simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """``colora simulate`` in this process: (exit code, stdout, stderr), without the lines' breaks."""

    def run(recipe: dict, *options: str) -> tuple[int, str, str]:
        (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe))
        words = ["colora", "simulate", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run"), *options]
        monkeypatch.setattr(sys, "argv", words)
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, " ".join(out.split()), " ".join(err.split())

    return run


def test_a_refusal_at_joining_shows_its_whole_reason_here_and_its_kind_to_the_coordinator(
    simulated, tiny_recipe: dict, tmp_path: Path, wire: list[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ModelError("model.source", "weights", "half a file", message="weights.bin ends early.", hint="Get it.")

    monkeypatch.setattr(site_pool, "load_base_model", broken)
    code, out, err = simulated(tiny_recipe)
    assert code == 2
    for site in ("ada", "bob", "cyd"):
        assert f"before round 1: {site} cannot join: weights.bin ends early. Get it." in out
    assert "at least 3 sites are required, 0 took part. First failure: ada: weights.bin ends early. Get it." in err
    assert {m.error.reason for m in wire if m.has_error()} == {"ModelError: model.source"}
    assert "weights.bin" not in (tmp_path / "run" / "events.jsonl").read_text()


def test_a_site_left_out_of_a_round_shows_why_in_the_table_too(
    simulated, tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = site_pool.Trainer.handle

    def fails_at_bob(self, request, *more):
        if self.site == "bob" and request.kind == "train":
            raise DataError("data.text", "a text", "none", message="row 7 says red herring.")
        return handle(self, request, *more)

    monkeypatch.setattr(site_pool.Trainer, "handle", fails_at_bob)
    code, out, _ = simulated({**tiny_recipe, "server": {"quorum": 2}})
    assert code == 0
    for told in (
        "round 1: bob left out: row 7 says",
        "round 2: bob left out: row 7",
        "bob was left out of round 2: row 7",
    ):
        assert told in out
    assert "herring" not in (tmp_path / "run" / "events.jsonl").read_text()


def test_the_rows_of_every_label_are_shown_and_not_sent(
    simulated, tiny_recipe: dict, tmp_path: Path, wire: list[Message]
) -> None:
    """12 training and 6 test rows cycle through two labels, at cyd through three."""
    code, out, _ = simulated(tiny_recipe)
    assert code == 0
    assert "ada: 12 training + 6 test rows; ada-no 6+3, ada-yes 6+3 bob: 12 training" in out
    assert "cyd: 12 training + 6 test rows; cyd-maybe 4+2, cyd-no 4+2, cyd-yes 4+2" in out
    assert not [m for m in wire if m.has_content() and "cyd-maybe" in str(m.content)]
    assert "cyd-maybe" not in (tmp_path / "run" / "events.jsonl").read_text()


def test_a_terminal_shows_the_phase_and_its_time_from_the_first_moment_and_a_file_does_not() -> None:
    shown = {}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
        with LiveDisplay(console) as display:
            first = console.file.getvalue()  # type: ignore[attr-defined]
            sites = {"sites": ["ada"], "federation": "f", "method": "colora", "model": "m", "rounds": 2}
            display({"event": "started", "time": 0.0, **sites})
            display({"event": "round_started", "time": 0.0, "round": 1, "sites": ["ada"]})
            time.sleep(1.3)
        shown[terminal] = first, console.file.getvalue()  # type: ignore[attr-defined]
    first, later = shown[True]
    assert "starting 0:00:00" in first
    assert "round 1 of 2 0:00:01" in later, "no event came in this second"
    assert shown[False] == ("", "f: colora on m, 1 sites\n")


def test_a_run_is_resumed_by_its_folder_alone_and_without_its_sources(
    simulated, tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulated({**tiny_recipe, "rounds": 1})[0] == 0
    shutil.rmtree(tmp_path / "rows")
    (tmp_path / "recipe.toml").unlink()
    monkeypatch.setattr(sys, "argv", ["colora", "simulate", "--resume", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="0"):
        main()
    out = capsys.readouterr().out
    assert "tiny: accuracy" in out, "the final table of this run, not of the demo"
