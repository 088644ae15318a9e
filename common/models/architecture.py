"""What a base model's configuration says without its weights: its networks on the meta device, and its limits."""

from __future__ import annotations

from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import nn

from ..config.schema import ModelSettings
from ..dataset import TASKS
from ..errors import ModelError
from . import synthetic
from .hf_logging import quiet_transformers
from .model_files import check_whole
from .sources import source_folder
from .unreadable import model_errors_of, own_code

GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # suffixes of architectures that generate
EXPECTED = {  # by whether the model generates text
    True: "a causal language model",
    False: "a Transformers model",
}
UNUSED = "pooler."  # the only part of a backbone that a full model may leave out


def load_config(settings: ModelSettings, field: str = "model.source", *, generates: bool = False) -> Any:
    """Read a base model's configuration; no code of its repository runs. Raises ModelError for ``field``.

    Refused are configurations that need such code, and weights that are quantized already.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    source = settings.source
    with quiet_transformers(), model_errors_of(field, EXPECTED[generates], source):
        folder = source_folder(settings)
        check_whole(folder, source, field, weights=False)
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "auto_map", None) and config.model_type not in CONFIG_MAPPING:
        raise own_code(field, source)
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        kind = quantized if isinstance(quantized, dict) else vars(quantized)
        method = getattr(kind.get("quant_method"), "value", kind.get("quant_method")) or "unknown"
        message = f"The weights of {source!r} are already quantized ({method}), which colora does not support."
        hint = "Use the model's original weights; model.precision = 'int4' quantizes them when they are loaded."
        raise ModelError(field, "weights that are not quantized", method, message=message, hint=hint)
    if getattr(config, "default_language", "") is None:  # X-MOD
        message = f"The base model {source!r} has an adapter for each language, and its config.json names none of them."
        hint = "Set default_language in the config.json of a local copy, for example to en_XX."
        raise ModelError(field, "a model with a default language", "none", message=message, hint=hint)
    return config


def check_generates(settings: ModelSettings, field: str = "model.source") -> None:
    """Check that a model was trained as a causal language model. Raises ModelError for ``field`` otherwise.

    Transformers loads an encoder as a causal model, too, with an untrained output layer.
    """
    config = load_config(settings, field, generates=True)
    names = config.architectures or (config.model_type,)
    if config.is_encoder_decoder or (config.architectures and not any(name.endswith(GENERATING) for name in names)):
        message = f"{field} must be {EXPECTED[True]}, but {settings.source!r} is a {names[0]}."
        raise ModelError(field, EXPECTED[True], names[0], message=message)


def skeleton(settings: ModelSettings) -> nn.Module:
    """Build the backbone on the meta device, without weights. It has every layer that an adapter can attach to."""
    if settings.source.startswith(synthetic.PREFIX):
        return synthetic.model_of(settings.source)
    from transformers import AutoModel

    config = load_config(settings)
    with quiet_transformers(), model_errors_of("model.source", EXPECTED[False], settings.source), torch.device("meta"):
        return AutoModel.from_config(config, trust_remote_code=False)


def stock_class(task: str) -> Any:
    """The transformers class that a task's full model is of."""
    import transformers

    return getattr(transformers, TASKS[task].auto_class or "AutoModel")


def stock_model(settings: ModelSettings, task: str, labels: int = 1) -> Any:
    """Build a task's full model on the meta device, as an export is loaded. ``labels`` is the size of a head.

    Raises ModelError where Transformers has no such model of the architecture.
    """
    config, kind = load_config(settings), TASKS[task].auto_class
    if TASKS[task].has_labels:
        config.num_labels = max(labels, 1)
    try:
        with quiet_transformers(), torch.device("meta"):
            return stock_class(task).from_config(config, trust_remote_code=False)
    except (ValueError, AttributeError):
        message = f"Transformers has no {kind} for the base model's architecture ({config.model_type})."
        hint = "Choose another model.source."
        raise ModelError(
            "model.source", f"an architecture with {kind}", config.model_type, message=message, hint=hint
        ) from None


@lru_cache(maxsize=8)
def _stock_layers(settings: ModelSettings, task: str) -> frozenset[str]:
    """Names of a full model's modules below its backbone, once its weights are known to be those of the backbone."""
    stock = stock_model(settings, task)
    below = f"{stock.base_model_prefix}."
    theirs = {name.removeprefix(below) for name in _parameters(stock) if name.startswith(below)}
    own = _parameters(skeleton(settings))
    other = sorted((theirs - own) | {name for name in own - theirs if not name.startswith(UNUSED)})
    family, kind = load_config(settings).model_type, type(stock).__name__
    if "attention_mask" not in signature(stock.forward).parameters:
        message = f"Models of the family {family} cannot be used: without an attention mask they read padding as text."
        hint = "Choose a base model of another family."
        raise ModelError("model.source", "a model with an attention mask", family, message=message, hint=hint)
    if other:
        message = (
            f"Models of the family {family} cannot be used for {task}: {kind}, which loads an export, has another "
            f"network than the base model ({other[0]})."
        )
        hint = "Choose a base model of another family."
        expected = f"a family whose {kind} has the base model's network"
        raise ModelError("model.source", expected, family, message=message, hint=hint)
    return frozenset(name.removeprefix(below) for name, _ in stock.named_modules() if name.startswith(below))


def _parameters(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def check_stock_model(settings: ModelSettings, task: str, layers: frozenset[str], field: str) -> None:
    """Check that the network that is trained is the one that Transformers and PEFT load from an export.

    ``layers`` are the adapted layers of the backbone and ``field`` is the settings table that chose them. Raises
    ModelError for a family whose full model has another network, and for a layer that the full model does not have.
    """
    if settings.source.startswith(synthetic.PREFIX) or not TASKS[task].auto_class:
        return
    known = _stock_layers(settings, task)
    unknown = sorted(layers - known)
    if unknown:
        key, kind = f"{field}.target_modules", TASKS[task].auto_class
        message = f"{key} selects {unknown[0]}, which the {kind} of this architecture does not have."
        hint = "Name the other layers by longer endings, for example output.dense instead of dense."
        raise ModelError(key, f"layers of {kind}", unknown[0], message=message, hint=hint)
