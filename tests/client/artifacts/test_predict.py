"""Predictions for files: the trained column is remembered, and blank rows are skipped and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from colora.cli import app
from colora.client.artifacts.predict import predict_file
from colora.common.config.loader import recipe_from
from colora.common.errors import DataError
from colora.common.models.saved import SavedModel, read_saved_model
from colora.simulation.run import simulate
from tests.conftest import labelled_rows, write_lines


@pytest.fixture
def saved(tiny_recipe: dict, tmp_path: Path) -> SavedModel:
    """A simulated site whose texts come from two columns, joined by a template."""
    sites: list[dict[str, Any]] = []
    for name in ("ada", "bob"):
        rows = [{"title": "red", "body": row["text"], "kind": row["label"]} for row in labelled_rows(["a", "b"], 16)]
        source = write_lines(tmp_path / f"{name}.jsonl", rows)
        sites.append({"name": name, "source": str(source), "text": "{title} {body}", "label": "kind"})
    raw = {**tiny_recipe, "rounds": 1, "site": sites, "server": {"quorum": 2}}
    simulate(recipe_from(raw), tmp_path / "run", resume=False)
    return read_saved_model(tmp_path / "run" / "sites" / "ada")


def test_predict_reads_the_trained_column_and_skips_blank_rows(saved: SavedModel, tmp_path: Path) -> None:
    rows = [{"title": "red", "body": "sun"}, {"title": "", "body": None}, {"title": "blue", "body": "sea"}]
    source = write_lines(tmp_path / "new.jsonl", [{**row, "id": i} for i, row in enumerate(rows)])
    found = predict_file(saved, source)
    assert found.blank == (2,)
    assert [row["id"] for row in found.rows] == [0, 1, 2]
    joined = write_lines(tmp_path / "joined.jsonl", [{"text": t} for t in ("red sun", " ", "blue sea", None)])
    with pytest.raises(DataError, match=r"Row 1 of .* needs a column 'title' \(text\), but has only text\. Name the"):
        predict_file(saved, joined)
    out = tmp_path / "out.jsonl"
    state = str(tmp_path / "run" / "sites" / "ada")
    result = CliRunner().invoke(
        app, ["predict", state, "--input", str(joined), "--column", "text", "--out", str(out), "--device", "cpu"]
    )
    assert result.exit_code == 0, result.output
    assert "2 predictions" in result.output
    assert "2 of 4 rows are blank and have no prediction: rows 2, 4." in result.output
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [("label" in row) for row in written] == [True, False, True, False]
    assert written[0]["probabilities"] == pytest.approx(found.rows[0]["probabilities"])
