"""What ``step.py`` compares: adapters on one copy of MiniLM-L6's weights, and the ways to take a training step."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from colora.common.adapters.initialization import initial_values
from colora.common.adapters.inject import ADAPTER, activate, attach, inject, layout_of, private_spec
from colora.common.config.schema import AdapterSettings, ModelSettings, Plan, PrivateSettings, TrainSettings
from colora.common.dataset import SiteDataset
from colora.common.methods import METHODS
from colora.common.models.base_model import BaseModel, load_base_model
from colora.common.tasks import build_task
from colora.common.tasks.base import Task
from colora.common.training.loop import make_optimizer
from colora.common.training.micro_batch import apply_gradients, gradients

MODEL = ModelSettings(source="asset:minilm-l6")
CLASSES = ("a", "b", "c", "d")
TARGETS = ("query", "value")
SETTINGS = TrainSettings(lr=1e-3, weight_decay=0.01)
Batch = dict[str, torch.Tensor]
Step = Callable[[Batch], None]
Put = Callable[[nn.Module], None]  # attaches an adapter to a backbone


def stock(rank: int, adapters: int = 1) -> Put:
    """Plain LoRA as PEFT's users attach it: one adapter, or several that all act."""
    names = [f"adapter{i}" for i in range(adapters)]

    def put(backbone: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are several is the point
            for name in names:
                config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS))
                inject_adapter_in_model(config, backbone, adapter_name=name)
        for layer in backbone.modules():
            if isinstance(layer, LoraLayer):
                layer.set_adapter(names)

    return put


def ours(method: str = "colora", core: str = "full", private: PrivateSettings | None = None) -> Put:
    """Our adapter of rank 8 (a module), with one form of core and perhaps a private adapter beside it."""
    settings = AdapterSettings(rank=8, alpha=16.0, target_modules=TARGETS, core=core)  # type: ignore[arg-type]

    def put(backbone: nn.Module) -> None:
        parameters = attach(backbone, settings, METHODS[method])
        if private:
            parameters |= inject(backbone, private_spec(private, settings), "private")
            activate(backbone, (ADAPTER, "private"))
        for parameter in parameters.values():
            parameter.requires_grad_(True)

    return put


def model_with(adapter: Put, weights: BaseModel) -> Task:
    """A model of its own whose frozen weights are those of ``weights``, with an adapter and a head."""
    base = load_base_model(MODEL, generates=False)
    for mine, one in zip(base.backbone.parameters(), weights.backbone.parameters(), strict=True):
        mine.data = one.data
    adapter(base.backbone)
    plan = Plan(name="bench", rounds=1, model=MODEL)
    rows = [{"text": label, "label": label} for label in CLASSES]
    task = build_task(SiteDataset("bench", "classification", rows, rows, CLASSES), base, plan)
    with torch.no_grad():
        for key, value in initial_values(layout_of(task.head), plan.adapter, 0).items():
            task.head[key].copy_(value)
    return task


def plain_step(task: Task) -> Step:
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


def trainer_step(task: Task) -> Step:
    """A step as the trainer takes it, with its optimiser of three groups."""
    adapter = {name: p for name, p in task.module.named_parameters() if ".lora_" in name}
    optimizer = make_optimizer({**adapter, **task.head}, SETTINGS)

    def step(batch: Batch) -> None:
        gradients(task, optimizer, [batch])
        apply_gradients(task, optimizer, SETTINGS.max_grad_norm)

    return step
