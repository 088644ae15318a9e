"""Instruction data as published, in one line of a recipe: trained, evaluated and predicted on."""

from __future__ import annotations

import json
from pathlib import Path

from colora.client.artifacts.predict import predict_file
from colora.common.config.loader import recipe_from
from colora.common.models.saved import read_saved_model
from colora.server.reporting.summary import summarize
from colora.simulation.run import simulate
from tests.conftest import WORDS

ALPACA = [
    {"instruction": f"red {w}", "input": "cat" if i % 2 else "", "output": f"blue {w}"} for i, w in enumerate(WORDS)
]
SHAREGPT = [
    {"id": w, "conversations": [{"from": "human", "value": f"sun {w}"}, {"from": "gpt", "value": f"moon {w}"}]}
    for w in WORDS
]


def test_alpaca_and_sharegpt_files_need_one_line_of_a_recipe(generation_recipe: dict, tmp_path: Path) -> None:
    files = {"alpaca": ALPACA, "sharegpt": SHAREGPT}
    for name, rows in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows, indent=1))
    sites = [{"name": name, "source": str(tmp_path / f"{name}.json")} for name in files]
    raw = {**generation_recipe, "rounds": 1, "model": {**generation_recipe["model"], "max_length": 64}, "site": sites}
    run = simulate(recipe_from(raw), tmp_path / "run", resume=False)
    for name, row in summarize(run.events()).rows.items():
        assert not row.failures, name
        assert row.dropped == 0
        assert "personal.rouge_l" in row.metrics
        saved = read_saved_model(run.path / "sites" / name)
        assert saved.metadata.chat is (name == "sharegpt")
        found = predict_file(saved, tmp_path / f"{name}.json")
        assert not found.blank
        assert all(isinstance(row["completion"], str) for row in found.rows)
