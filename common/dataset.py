"""The table of tasks, and a site's rows in the form that tasks read. Imports no torch.

A new task is one file in ``common/tasks`` and one row of ``TASKS``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

Row = dict[str, Any]
EVAL_MODES = ("base", "shared", "personal")  # which model is evaluated; a metric's name is "MODE.METRIC"


@dataclass(frozen=True)
class TaskSpec:
    """What every process needs to know of a task: the coordinator and the ClientApp import no torch.

    Everything else is on the task's class, which ``colora.common.tasks.task_class`` loads.
    """

    implementation: str  # "module:Class" in common/tasks
    primary_metric: str  # the metric that tables show
    metrics: tuple[str, ...]  # all metrics that a site may report
    lower_is_better: bool = False  # of the primary metric
    input_column: str | None = None  # the key of [data] that names the column of input texts; None: no texts
    array_columns: tuple[str, ...] = ()  # columns of numbers, of one shape in all rows
    has_labels: bool = False  # rows have labels; a site has a list of them and a head with one output for each
    needs_causal_lm: bool = False  # the base model must generate text
    can_transfer: bool = False  # sites can take what they learned to a new base model
    auto_class: str | None = None  # transformers' class of the full model; None: there is nothing to export
    problem_type: str | None = None  # ``config.problem_type`` of the full model, where it must be set
    peft_task_type: str | None = None  # ``task_type`` in an exported adapter_config.json


TASKS: dict[str, TaskSpec] = {
    "classification": TaskSpec(
        "classification:Classification",
        primary_metric="accuracy",
        metrics=("accuracy", "macro_f1", "loss"),
        input_column="text",
        has_labels=True,
        can_transfer=True,
        auto_class="AutoModelForSequenceClassification",
        peft_task_type="SEQ_CLS",
    ),
    "multilabel": TaskSpec(
        "multilabel:MultiLabel",
        primary_metric="micro_f1",
        metrics=("micro_f1", "macro_f1", "subset_accuracy", "loss"),
        input_column="text",
        has_labels=True,
        auto_class="AutoModelForSequenceClassification",
        problem_type="multi_label_classification",
        peft_task_type="SEQ_CLS",
    ),
    "generation": TaskSpec(
        "generation:Generation",
        primary_metric="rouge_l",
        metrics=("loss", "exact_match", "rouge_l"),
        input_column="prompt",
        needs_causal_lm=True,
        can_transfer=True,
        auto_class="AutoModelForCausalLM",
        peft_task_type="CAUSAL_LM",
    ),
    "regression": TaskSpec(
        "regression:Regression",
        primary_metric="relative_error",
        metrics=("relative_error", "loss"),
        lower_is_better=True,
        array_columns=("x", "y"),
    ),
}
METRICS = tuple(dict.fromkeys(metric for spec in TASKS.values() for metric in spec.metrics))
if TYPE_CHECKING:
    TaskKind = str
else:
    TaskKind = Literal[tuple(TASKS)]


@dataclass(frozen=True)
class SiteDataset:
    """Training, validation and test rows of one site.

    classification and multilabel: ``{"text", "label"}``, for multilabel with a tuple of labels; generation:
    ``{"messages": [{"role", "content"}, …]}`` or ``{"prompt", "completion"}``; regression: ``{"x", "y"}``.

    ``validation`` are rows held out of training. ``train_numbers``, ``validation_numbers`` and ``test_numbers`` are the
    rows' numbers in their source (from 1; empty where unknown).
    ``notes`` tell the site what was decided or left out while its rows were read. ``columns`` are the columns that the
    inputs came from, by key of ``[data]``.
    """

    site: str
    task: TaskKind
    train: Sequence[Row]
    test: Sequence[Row]
    labels: tuple[str, ...] = ()
    train_numbers: Sequence[int] = field(default=(), compare=False)
    test_numbers: Sequence[int] = field(default=(), compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    columns: Mapping[str, str] = field(default_factory=dict, compare=False)
    validation: Sequence[Row] = ()
    validation_numbers: Sequence[int] = field(default=(), compare=False)


def labels_of(row: Row) -> tuple[str, ...]:
    """The labels of a row: one, or several. A row without labels has the label ""."""
    label = row.get("label", "")
    return (label,) if isinstance(label, str) else tuple(label) or ("",)
