"""The adapters and training steps that ``step.py`` compares, on one copy of MiniLM-L6's weights."""

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
Attach = Callable[[nn.Module], None]  # attaches an adapter to a backbone


def stock(rank: int, adapters: int = 1) -> Attach:
    """Stock PEFT LoRA: one adapter, or several that are all active."""
    names = [f"adapter{i}" for i in range(adapters)]

    def attach_to(backbone: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns about several adapters
            for name in names:
                config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS))
                inject_adapter_in_model(config, backbone, adapter_name=name)
        for layer in backbone.modules():
            if isinstance(layer, LoraLayer):
                layer.set_adapter(names)

    return attach_to


def ours(method: str = "colora", core: str = "full", private: PrivateSettings | None = None) -> Attach:
    """colora's adapter of rank 8 (per module), with a form of core and optionally a private adapter."""
    settings = AdapterSettings(rank=8, alpha=16.0, target_modules=TARGETS, core=core)  # type: ignore[arg-type]

    def attach_to(backbone: nn.Module) -> None:
        parameters = attach(backbone, settings, METHODS[method])
        if private:
            parameters |= inject(backbone, private_spec(private, settings), "private")
            activate(backbone, (ADAPTER, "private"))
        for parameter in parameters.values():
            parameter.requires_grad_(True)

    return attach_to


def model_with(adapter: Attach, weights: BaseModel) -> Task:
    """A model with its own adapter and head that shares the frozen weights of ``weights``."""
    base = load_base_model(MODEL, generates=False)
    for own, shared in zip(base.backbone.parameters(), weights.backbone.parameters(), strict=True):
        own.data = shared.data
    adapter(base.backbone)
    plan = Plan(name="bench", rounds=1, model=MODEL)
    rows = [{"text": label, "label": label} for label in CLASSES]
    task = build_task(SiteDataset("bench", "classification", rows, rows, CLASSES), base, plan)
    with torch.no_grad():
        for key, value in initial_values(layout_of(task.head), plan.adapter, 0).items():
            task.head[key].copy_(value)
    return task


def plain_step(task: Task) -> Step:
    """A plain PyTorch step: AdamW on all trainable parameters, gradients clipped at norm 1."""
    trainable = [p for p in task.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=SETTINGS.lr, weight_decay=SETTINGS.weight_decay)

    def step(batch: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss, _ = task.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, SETTINGS.max_grad_norm)
        optimizer.step()
        loss.item()

    return step


def trainer_step(task: Task) -> Step:
    """A step of colora's trainer, with its optimizer of three parameter groups."""
    adapter = {name: p for name, p in task.module.named_parameters() if ".lora_" in name}
    optimizer = make_optimizer({**adapter, **task.head}, SETTINGS)

    def step(batch: Batch) -> None:
        gradients(task, optimizer, [batch])
        apply_gradients(optimizer, SETTINGS.max_grad_norm)

    return step
