"""The example scripts run on a tiny recipe."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import tomli_w

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


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
