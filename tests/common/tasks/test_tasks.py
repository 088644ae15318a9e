"""The table of tasks: every row is complete, and reading it costs no torch."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest

from colora.common.config.schema import DataSettings, parse
from colora.common.dataset import METRICS, TASKS, TaskKind, labels_of
from colora.common.errors import ConfigError
from colora.common.tasks import task_class
from colora.common.tasks.base import Task


@pytest.mark.parametrize("kind", TASKS)
def test_every_row_names_a_task_class_and_names_that_stock_libraries_have(kind: str) -> None:
    import peft
    import transformers

    spec = TASKS[kind]
    assert issubclass(task_class(kind), Task)
    assert not task_class(kind).__abstractmethods__
    assert spec.primary_metric in spec.metrics
    assert set(spec.metrics) <= set(METRICS)
    if spec.auto_class:
        assert hasattr(transformers, spec.auto_class)
        assert spec.peft_task_type in set(peft.TaskType)
    if spec.input_column:
        assert isinstance(getattr(DataSettings(), spec.input_column), str)


def test_recipes_accept_exactly_the_tasks_of_the_table() -> None:
    assert get_args(TaskKind) == tuple(TASKS)
    for kind in TASKS:
        assert parse(DataSettings, {"task": kind}).task == kind
    with pytest.raises(ConfigError, match="task must be "):
        parse(DataSettings, {"task": "translation"})


def test_the_table_imports_no_torch() -> None:
    code = "import sys, colora.common.dataset, colora.common.tasks; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_labels_of_rows_with_one_several_and_no_labels() -> None:
    assert labels_of({"label": "a"}) == ("a",)
    assert labels_of({"label": ("a", "b")}) == ("a", "b")
    assert labels_of({"label": ()}) == labels_of({"x": 1}) == ("",)
