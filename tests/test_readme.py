"""The recipe of the README runs as it is printed, on the kinds of files that it names."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from colora.common.config.loader import recipe_from
from colora.server.reporting.summary import summarize
from colora.simulation.run import simulate
from docs.scripts.code_blocks import ROOT, blocks_of

SITES = 2


def test_the_printed_recipe_runs(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (block for block in blocks_of(ROOT / "README.md") if block.kind == "recipe")
    raw = tomllib.loads(block.code)
    assert len(raw["site"]) == SITES
    raw["model"] = {
        "source": str(tiny_bert),
        "max_length": 64,
    }  # changed because tests run without the hub; the rest makes the run short
    raw["rounds"], raw["train"]["steps"], raw["train"]["final_steps"] = 3, 1, 1
    raw["simulation"] = {"threads": 1} | raw.get("simulation", {})
    monkeypatch.chdir(tmp_path)
    for site in raw["site"]:
        write_rows(Path(site["source"]), site.get("text", "text"), site.get("label", "label"))
    summary = summarize(simulate(recipe_from(raw), Path("run"), resume=False).events())
    assert len(summary.rows) == SITES
    assert all(row.metric("personal") is not None for row in summary.rows.values())


def write_rows(path: Path, text: str, label: str) -> None:
    """Write 16 rows of two labels as .csv, .jsonl or .parquet, with these columns."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    rows = [{text: f"red {word} cat", label: ("yes", "no")[i % 2]} for i, word in enumerate("abcdefghijklmnop")]
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
