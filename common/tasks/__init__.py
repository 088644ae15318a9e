"""The task table: kind → how rows become batches, a loss and metrics."""

from __future__ import annotations

from ..config.schema import Plan
from ..dataset import SiteDataset
from ..models.base_model import BaseModel
from .base import Encoded, Task
from .classification import Classification
from .generation import Generation
from .regression import Regression

__all__ = ["TASKS", "Encoded", "Task", "build_task"]

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "generation": Generation,
    "regression": Regression,
}


def build_task(rows: SiteDataset, base: BaseModel, plan: Plan) -> Task:
    """The task of one site, with its own head around the process's base model."""
    return TASKS[rows.task](rows, base, plan)
