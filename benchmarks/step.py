"""A training step with colora's adapters ÷ the same step with stock PEFT LoRA, in one process.

MiniLM-L6 with a four-class head on random token ids, targets query and value, AdamW. All contenders share one copy of
the base weights and run in random order in every round. A ratio compares two steps of the same round, and its reference
has the same total rank. ``LoRA ÷ LoRA`` compares two equal models and shows the noise. Seconds are CPU seconds of this
single-threaded process, which depend less on other load than wall time.

python benchmarks/step.py [ROUNDS]     (40 at 8×64, 24 at 16×64)
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import torch
from figures import Figure, ratios, show
from step_models import CLASSES, MODEL, Attach, Batch, Step, model_with, ours, plain_step, stock, trainer_step

from colora.common.config.schema import PrivateSettings
from colora.common.models.base_model import load_base_model

BATCHES = {(8, 64): 40, (16, 64): 24}  # (texts, tokens) → rounds
CORE_BAR, MULTI_BAR = 1.05, 1.10
LORA, MULTI = PrivateSettings("lora", rank=8), PrivateSettings("multilora", rank=4, modules=2)


@dataclass(frozen=True)
class Contender:
    """An adapter, the rank of the stock LoRA that it is compared with, and the upper limit of the ratio."""

    attach: Attach
    rank: int
    bar: float | None = None
    as_trainer: bool = False  # the trainer's step instead of the plain loop


CONTENDERS = {
    "noise: LoRA ÷ LoRA, r=8": Contender(stock(8), 8),
    "CoLoRA full ÷ LoRA, r=8": Contender(ours(core="full"), 8, CORE_BAR),
    "CoLoRA diagonal ÷ LoRA, r=8": Contender(ours(core="diagonal"), 8, CORE_BAR),
    "CoLoRA residual ÷ LoRA, r=8": Contender(ours(core="residual"), 8, CORE_BAR),
    "the trainer's step, core full ÷ plain PEFT loop, r=8": Contender(ours(), 8, CORE_BAR, as_trainer=True),
    "MultiLoRA 3·8 in one pass ÷ LoRA, r=24": Contender(ours("multilora"), 24, MULTI_BAR),
    "three active PEFT LoRA of 8 ÷ LoRA, r=24": Contender(stock(8, adapters=3), 24),
    "CoLoRA 8 + private LoRA 8 ÷ LoRA, r=16": Contender(ours(private=LORA), 16, MULTI_BAR),
    "CoLoRA 8 + private MultiLoRA 2·4 ÷ LoRA, r=16": Contender(ours(private=MULTI), 16),
}


def reference(rank: int) -> str:
    return f"PEFT LoRA, r={rank}"


def steps_of_all() -> dict[str, Step]:
    """Return a training step for every contender and for a reference of every rank, by name."""
    weights = load_base_model(MODEL, generates=False)
    ranks = sorted({contender.rank for contender in CONTENDERS.values()})
    steps = {reference(rank): plain_step(model_with(stock(rank), weights)) for rank in ranks}
    for name, contender in CONTENDERS.items():
        task = model_with(contender.attach, weights)
        steps[name] = trainer_step(task) if contender.as_trainer else plain_step(task)
    return steps


def random_batch(size: tuple[int, int]) -> Batch:
    return {
        "input_ids": torch.randint(1000, 30000, size),
        "attention_mask": torch.ones(size, dtype=torch.long),
        "labels": torch.randint(len(CLASSES), size[:1]),
    }


def race(steps: dict[str, Step], size: tuple[int, int], rounds: int) -> dict[str, list[float]]:
    """Return CPU seconds by name, one value per round. Every round runs the contenders in another order."""
    batch, names = random_batch(size), list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-3, rounds):
        for i in torch.randperm(len(names)).tolist():
            started = time.process_time()
            steps[names[i]](batch)
            if turn >= 0:
                seconds[names[i]].append(time.process_time() - started)
    return seconds


def figures_of(seconds: dict[str, list[float]]) -> list[Figure]:
    """Return the references in milliseconds, and every contender as a ratio to its reference."""
    absolute = [Figure(name, [1e3 * s for s in seconds[name]], "ms") for name in seconds if name not in CONTENDERS]
    return absolute + [
        Figure(name, ratios(seconds[name], seconds[reference(contender.rank)]), bar=contender.bar)
        for name, contender in CONTENDERS.items()
    ]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps = steps_of_all()
    for size, rounds in BATCHES.items():
        count = int(sys.argv[1]) if len(sys.argv) > 1 else rounds
        show(f"One training step, batch {size[0]}×{size[1]}", figures_of(race(steps, size, count)))


if __name__ == "__main__":
    main()
