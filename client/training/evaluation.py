"""Evaluation of the model that a task holds at the moment, in batches that fit into memory."""

from __future__ import annotations

import dataclasses

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ...common.tasks.base import Metrics, Task


def evaluate(task: Task, *, generate: bool, probes: bool) -> Metrics:
    """Metrics on the test examples. With ``probes``, a head is fitted to the training rows where the task has one.

    The evaluation batch is halved after an out-of-memory error, and stays so.
    """
    while True:
        try:
            probed = task.probe() if probes else None
            return task.measure(generate=generate) if probed is None else probed
        except RuntimeError as error:
            _halve_batch(task, error)


def _halve_batch(task: Task, error: RuntimeError) -> None:
    """Halve the evaluation batch after an out-of-memory error; raise any other error again."""
    evaluation = task.plan.evaluation
    if not should_reduce_batch_size(error) or evaluation.batch_size == 1:
        raise error
    half = dataclasses.replace(evaluation, batch_size=(evaluation.batch_size + 1) // 2)
    task.plan = dataclasses.replace(task.plan, evaluation=half)
    clear_device_cache(garbage_collection=True)
