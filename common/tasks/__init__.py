"""Tasks: how rows become batches, a loss and metrics. ``common/dataset.py`` has the table; classes load on demand."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ..dataset import TASKS, SiteDataset

if TYPE_CHECKING:
    from ..config.schema import Plan
    from ..models.base_model import BaseModel
    from .base import Task

__all__ = ["build_task", "task_class"]


def task_class(kind: str) -> type[Task]:
    """The class of a task. Imports torch."""
    module, _, name = TASKS[kind].implementation.partition(":")
    return getattr(import_module(f".{module}", __name__), name)


def build_task(rows: SiteDataset, base: BaseModel, plan: Plan) -> Task:
    """Build the task of one site, with its own head around the process's base model."""
    return task_class(rows.task)(rows, base, plan)
