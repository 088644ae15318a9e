"""The README's recipe runs as it is printed."""

from __future__ import annotations

import csv
import json
import re
import tomllib
from pathlib import Path

import pytest

from colora.common.config.loader import recipe_from
from colora.server.reporting.summary import summarize
from colora.simulation.run import simulate

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_printed_recipe_runs(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    (printed,) = re.findall(r"```toml\n(name = .*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    raw = tomllib.loads(printed)
    raw["model"] = {"source": str(tiny_bert)}  # the only change, with the length and the threads: no hub here
    raw["rounds"], raw["train"]["steps"] = 5, 1
    raw["simulation"] = {"threads": 1} | raw.get("simulation", {})
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"red {word} cat", "label": ("yes", "no")[i % 2]} for i, word in enumerate("abcdefghijklmnop")]
    with Path("north.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["text", "label"])
        table.writeheader()
        table.writerows(rows)
    lines = [json.dumps({"text": row["text"], "topic": row["label"]}) for row in rows]
    Path("south.jsonl").write_text("\n".join(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "west.parquet")
    board = summarize(simulate(recipe_from(raw), Path("run"), resume=False).events())
    assert all(row.metric("personal") is not None for row in board.rows.values())
