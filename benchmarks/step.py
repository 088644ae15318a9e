"""A CoLoRA training step ÷ the same step with stock PEFT LoRA, side by side in one process.

MiniLM-L6 with a four-class head on random token ids, targets query and value, r = 8, AdamW. All contenders read one
copy of the base weights and take turns, in another order every round; a ratio is of two steps of the same round.
``LoRA ÷ LoRA`` compares two equal models: it is the noise. Seconds are CPU seconds of this one-thread process, which
other work on the machine disturbs less than wall time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from figures import Figure, ratios, show
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from colora.common.adapters.attach import attach, initial_values, layout_of
from colora.common.methods import METHODS
from colora.common.model import BaseModel, load
from colora.common.rows import SiteRows
from colora.common.settings import AdapterSettings, ModelSettings, Plan, TrainSettings
from colora.common.tasks import Task, build_task
from colora.common.training import make_optimizer, optimizer_step

BAR = 1.05
MODEL = ModelSettings(source="asset:minilm-l6")
BATCHES = {(8, 64): 32, (16, 64): 20}  # (texts, tokens) → rounds
CLASSES = ("a", "b", "c", "d")
TARGETS = ("query", "value")
SETTINGS = TrainSettings(lr=1e-3, weight_decay=0.01)
REFERENCE, AGAIN, TRAINER = "PEFT LoRA", "LoRA ÷ LoRA (noise)", "our optimizer_step, core full ÷ plain PEFT loop"
Batch = dict[str, torch.Tensor]


def stock(backbone: nn.Module) -> None:
    """Plain LoRA as PEFT's users attach it."""
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS)), backbone)


def colora(core: str) -> Callable[[nn.Module], None]:
    """Our adapter with one form of core."""
    settings = AdapterSettings(rank=8, alpha=16.0, target_modules=TARGETS, core=core)  # type: ignore[arg-type]

    def put(backbone: nn.Module) -> None:
        attach(backbone, settings, METHODS["colora"])

    return put


def model_with(adapter: Callable[[nn.Module], None], weights: BaseModel) -> Task:
    """A model of its own whose frozen weights are those of ``weights``, with an adapter and a head."""
    base = load(MODEL, generates=False)
    for mine, one in zip(base.backbone.parameters(), weights.backbone.parameters(), strict=True):
        mine.data = one.data
    adapter(base.backbone)
    plan = Plan(name="bench", rounds=1, model=MODEL)
    rows = [{"text": label, "label": label} for label in CLASSES]
    task = build_task(SiteRows("bench", "classification", rows, rows, CLASSES), base, plan)
    with torch.no_grad():
        for key, value in initial_values(layout_of(task.head), plan.adapter, 0).items():
            task.head[key].copy_(value)
    return task


def plain_step(task: Task) -> Callable[[Batch], None]:
    """The loop of any PyTorch user: AdamW over what is trainable, gradients clipped at 1."""
    live = [p for p in task.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(live, lr=SETTINGS.lr, weight_decay=SETTINGS.weight_decay)

    def step(batch: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss, _ = task.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(live, SETTINGS.max_grad_norm)
        optimizer.step()
        loss.item()

    return step


def trainer_step(task: Task) -> Callable[[Batch], None]:
    """A step as the trainer takes it, with its optimiser of three groups."""
    adapter = {name: p for name, p in task.module.named_parameters() if ".lora_" in name}
    optimizer = make_optimizer({**adapter, **task.head}, SETTINGS)

    def step(batch: Batch) -> None:
        optimizer_step(task, optimizer, [batch], SETTINGS.max_grad_norm)

    return step


def contenders() -> dict[str, Callable[[Batch], None]]:
    weights = load(MODEL, generates=False)
    return {
        REFERENCE: plain_step(model_with(stock, weights)),
        AGAIN: plain_step(model_with(stock, weights)),
        **{f"CoLoRA {c} ÷ LoRA": plain_step(model_with(colora(c), weights)) for c in ("full", "diagonal", "residual")},
        TRAINER: trainer_step(model_with(colora("full"), weights)),
    }


def race(steps: dict[str, Callable[[Batch], None]], size: tuple[int, int], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every step by name, one a round; every round goes through the contenders in another order."""
    batch = {
        "input_ids": torch.randint(1000, 30000, size),
        "attention_mask": torch.ones(size, dtype=torch.long),
        "labels": torch.randint(len(CLASSES), size[:1]),
    }
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-3, rounds):
        for i in torch.randperm(len(names)).tolist():
            started = time.process_time()
            steps[names[i]](batch)
            if turn >= 0:
                seconds[names[i]].append(time.process_time() - started)
    return seconds


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps = contenders()
    for size, rounds in BATCHES.items():
        seconds = race(steps, size, rounds)
        figures = [Figure(REFERENCE, [1e3 * s for s in seconds[REFERENCE]], "ms")]
        for name in list(steps)[1:]:
            values = ratios(seconds[name], seconds[REFERENCE])
            figures.append(Figure(name, values, bar=None if name == AGAIN else BAR))
        show(f"One training step, batch {size[0]}×{size[1]}", figures)


if __name__ == "__main__":
    main()
