"""The example scripts run on a tiny recipe."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import tomli_w

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALLER = {  # what the test changes in the notebook: another test runs beside it, and both share two cores
    "rounds=3": "rounds=1",
    "data.test=60": "data.test=20",
    "local,fedit,colora": "local,colora",
    "simulation.threads=2": "simulation.threads=1",
    "colora compare demo": "colora compare demo --set simulation.threads=1",
}


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_simulate_and_use(tiny_recipe: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(tiny_recipe))
    example = load_example("simulate_and_use")
    example.main(str(tmp_path / "tiny.toml"), str(tmp_path / "run"))
    first = capsys.readouterr().out
    assert "Predictions of site ada" in first
    example.main(str(tmp_path / "tiny.toml"), str(tmp_path / "run"))
    assert capsys.readouterr().out == first, "a finished run is not repeated"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "colora.ipynb", as_version=4)
    for cell in notebook.cells:
        for key, value in SMALLER.items():
            cell.source = cell.source.replace(key, value)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [json.dumps(cell.get("outputs", "")) for cell in notebook.cells if cell.cell_type == "code"]
    assert all(site in shown[0] for site in ("united", "virginamerica"))
    assert "gain over local" in next(text for text in shown if "results.csv" in text)
    assert "adapter_model.safetensors" in shown[-2]
    assert ["negative" in shown[-1], "positive" in shown[-1]] == [True, True]
    assert all(not cell.get("outputs") and cell.execution_count is None for cell in stored_code_cells())


def stored_code_cells() -> list:
    import nbformat

    notebook = nbformat.read(EXAMPLES / "colora.ipynb", as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]
