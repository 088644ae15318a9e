"""The benchmarks wrap functions by name: every name exists."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Import the scripts as Python runs them, from their own folder, and forget them afterwards."""
    monkeypatch.delenv("COLORA_MARKS", raising=False)
    for folder in (BENCHMARKS, BENCHMARKS / "plain"):
        monkeypatch.syspath_prepend(str(folder))
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def test_every_function_that_the_marks_wrap_exists() -> None:
    for module, names in importlib.import_module("marks.sitecustomize").MARKED.items():
        for name in names:
            assert callable(functools.reduce(getattr, name.split("."), importlib.import_module(module))), name


def test_every_function_that_the_overhead_benchmark_times_exists() -> None:
    for _, owner, name in importlib.import_module("overhead").PARTS:
        assert callable(getattr(owner, name)), name


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_can_be_imported(path: Path) -> None:
    importlib.import_module(path.stem)
