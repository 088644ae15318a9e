"""Whether base model, tokenizer, adapters and tasks fit together, known before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..config.schema import Plan, PrivateSettings
from ..dataset import TASKS
from ..methods import PRIVATE
from ..models import synthetic
from ..models.architecture import check_generates, check_stock_model, load_config, skeleton
from ..models.model_files import check_whole
from ..models.positions import check_max_length
from ..models.sources import source_folder
from ..models.tokenizer import check_embedding, load_tokenizer
from .inject import ADAPTER, attach, inject, private_spec


def check_fit(plan: Plan, tasks: Iterable[str], privates: Iterable[PrivateSettings] = ()) -> None:
    """Check a plan without loading weights: files, tokenizer, positions, and the network of every task's full model.

    Raises ModelError or ConfigError for the first thing that does not fit.
    """
    settings = plan.model
    if settings.source.startswith(synthetic.PREFIX):
        return
    tasks = sorted(set(tasks))
    check_whole(source_folder(settings), settings.source)
    if any(TASKS[task].needs_causal_lm for task in tasks):
        check_generates(settings)
    tokenizer, backbone = load_tokenizer(settings), skeleton(settings)
    check_embedding(tokenizer, backbone, settings.source)
    check_max_length(settings, backbone, load_config(settings))
    parameters = attach(backbone, plan.adapter, plan.row())
    for private in privates:
        if private.present:
            parameters |= inject(skeleton(settings), private_spec(private, plan.adapter), "private")
    for task in tasks:
        check_layers(plan, task, parameters)


def check_layers(plan: Plan, task: str, parameters: Mapping[str, object]) -> None:
    """Check that a task's full model has every layer with these adapter parameters. Raises ModelError."""
    layers: dict[str, set[str]] = {ADAPTER: set(), PRIVATE: set()}
    for name in parameters:
        layer, adapts, _ = name.partition(".lora_")
        if adapts:
            kind = PRIVATE if layer.startswith(PRIVATE) else ADAPTER
            layers[kind].add(layer.removeprefix(PRIVATE))
    for kind, names in layers.items():
        if names:
            check_stock_model(plan.model, task, frozenset(names), "private" if kind == PRIVATE else "adapter")
