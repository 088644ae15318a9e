"""fp16 gradients that overflow: the step is repeated at a lower loss scale, counted, or given up."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from colora.common.config.schema import TrainSettings
from colora.common.training.loop import TrainCursor, TrainOutcome, TrainPhase, train

LR = 0.5


class HalfTask:
    """loss = factor_1 · factor_2 · … · w in fp16, so its gradient is the product of the factors."""

    def __init__(self, *factors: float, precision: str = "fp16") -> None:
        self.module, self.factors = nn.Linear(1, 1, bias=False), factors
        self.plan = SimpleNamespace(model=SimpleNamespace(precision=precision))
        self.base = SimpleNamespace(device=torch.device("cpu"))
        self.train = SimpleNamespace(examples=[0, 1, 2, 3])
        nn.init.zeros_(self.module.weight)

    def collate(self, examples: Sequence[int]) -> Any:
        return {"size": torch.tensor(len(examples))}

    def loss(self, batch: Any) -> tuple[torch.Tensor, int]:
        value = self.module.weight.half()
        for factor in self.factors:
            value = value * factor
        return value.sum().float(), int(batch["size"])


def trained(task: HalfTask, steps: int = 3) -> TrainOutcome:
    settings = TrainSettings(steps=steps, batch_size=2, optimizer="sgd", lr=LR, max_grad_norm=0.0)
    phases = [TrainPhase(steps, frozenset(("x.lora_A.weight",)))]
    parameters = {"x.lora_A.weight": task.module.weight}
    return train(task, parameters, phases, settings, TrainCursor(0, steps, 0, 0, 0))  # type: ignore[arg-type]


def test_a_step_that_overflows_is_repeated_until_its_gradient_fits() -> None:
    """The gradient is 200, and the largest fp16 number is 65504: it fits at a scale of 256, not at 1024 or 512."""
    task = HalfTask(200.0)
    outcome = trained(task)
    assert task.module.weight.item() == -3 * LR * 200
    assert (outcome.steps, outcome.applied, outcome.overflows) == (3, 3, 2)
    assert outcome.terms == 6


def test_a_step_that_overflows_at_every_scale_is_given_up_and_counts_for_nothing() -> None:
    """The gradient is 10⁹, which is beyond 65504 at scales from 1024 to 2⁻¹⁰, and at half and a quarter of that."""
    task = HalfTask(1000.0, 1000.0, 1000.0)
    outcome = trained(task)
    assert task.module.weight.item() == 0.0
    assert (outcome.steps, outcome.applied, outcome.terms) == (3, 0, 0)
    assert outcome.examples == 6, "the order of the examples goes on"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_have_no_scale(precision: str) -> None:
    task = HalfTask(3.0, precision=precision)
    outcome = trained(task)
    assert task.module.weight.item() == -3 * LR * 3
    assert outcome.overflows == 0
