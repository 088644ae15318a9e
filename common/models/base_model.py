"""The base model: one backbone in memory, and the task model around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..config.schema import ModelSettings
from ..errors import ModelError
from . import synthetic
from .architecture import EXPECTED, check_generates, load_config
from .cpu_half import has_native_arithmetic, widen
from .hf_logging import quiet_transformers
from .model_files import check_whole
from .positions import check_max_length, learned_positions, trained_positions
from .precision import loading_options, resolve_device
from .sources import Fingerprint, fingerprint, source_folder, synthetic_fingerprint
from .tokenizer import check_embedding, declared_ends, end_ids, load_tokenizer, set_padding, set_token_ids
from .unreadable import READING, unreadable

NOT_OF_A_HEAD = ("id2label", "label2id", "num_labels", "quantization_config")  # config keys that a new head replaces
MISSING_WEIGHTS_SEED = 0  # weights that a checkpoint lacks, such as a pooler, are equal at all sites


@dataclass
class BaseModel:
    """A backbone with its tokenizer, shared by all sites of a process.

    ``backbone`` is the transformer without a head. ``language_model`` is the same backbone with its output layer if the
    model generates text, else None.
    """

    backbone: nn.Module
    config: Any
    tokenizer: Any
    fingerprint: Fingerprint
    device: torch.device
    language_model: nn.Module | None = None
    missing: tuple[str, ...] = ()  # weights that the source lacks (see MISSING_WEIGHTS_SEED)
    ends: tuple[int, ...] = ()  # tokens at which a generated answer ends

    @cached_property
    def positions(self) -> int | None:
        """The number of tokens that the model has positions for; None without such a limit."""
        return learned_positions(self.backbone, self.config) or trained_positions(self.config)

    def classifier(self, labels: int) -> tuple[nn.Module, dict[str, nn.Module]]:
        """Build a sequence classification model around the backbone, with an uninitialized head for ``labels`` classes.

        Returns the model and the modules of its head by name: one in most architectures, two in DistilBERT. The head is
        the architecture's own, as ``AutoModelForSequenceClassification`` builds it. The caller sets its values.
        Raises ModelError if the architecture has no sequence classifier.
        """
        from transformers import AutoModelForSequenceClassification

        values = {k: v for k, v in self.config.to_dict().items() if k not in NOT_OF_A_HEAD}
        config = type(self.config).from_dict({**values, "num_labels": labels})
        if self.tokenizer is not None:
            set_padding(config, self.tokenizer.pad_token_id)
        options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False}
        try:
            with quiet_transformers(), torch.device("meta"):
                model = AutoModelForSequenceClassification.from_config(config, **options)
        except ValueError:
            architecture = type(self.config).__name__
            message = f"Transformers has no sequence classifier for the base model's architecture ({architecture})."
            hint = "Choose another model.source."
            expected = "an architecture with a sequence classifier"
            raise ModelError("model.source", expected, architecture, message=message, hint=hint) from None
        setattr(model, model.base_model_prefix, self.backbone)
        parts = {n: m for n, m in model.named_children() if n != model.base_model_prefix and list(m.parameters())}
        for module in parts.values():
            module.to_empty(device=self.device)
            module.register_forward_pre_hook(_in_fp32)
        return model, parts

    @staticmethod
    def head_parameters(parts: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
        """Return a head's parameters by name: ``head.classifier.weight`` (classes, d), ``head.classifier.bias``."""
        return {f"head.{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}


def load_base_model(settings: ModelSettings, *, generates: bool) -> BaseModel:
    """Load a base model and its tokenizer, frozen, in the precision of the settings.

    ``generates`` loads it as a causal language model. Raises ModelError if it is missing, cannot be read, or does not
    fit its tokenizer, and ConfigError if ``max_length`` is beyond its positions.
    """
    if settings.source.startswith(synthetic.PREFIX):
        if settings.precision != "fp32":
            message = f"model.precision must be 'fp32' for {settings.source}, not {settings.precision!r}."
            raise ModelError("model.precision", "fp32", settings.precision, message=message)
        return BaseModel(
            synthetic.model_of(settings.source), None, None, synthetic_fingerprint(settings), torch.device("cpu")
        )
    folder, device = source_folder(settings), resolve_device(settings.device)
    if generates:
        check_generates(settings)
    tokenizer = load_tokenizer(settings)
    options = loading_options(settings.precision, device)
    model, missing = _load_weights(settings, options, generates=generates)
    check_embedding(tokenizer, model, settings.source)
    check_max_length(settings, model, model.config)
    ends = end_ids(tokenizer, declared_ends(model.config, folder))
    set_token_ids(model, tokenizer, ends)
    model.requires_grad_(False)
    if "quantization_config" not in options:
        model.to(device)
    if not has_native_arithmetic(options["dtype"], device):
        widen(model)
    backbone, language_model = (model.base_model, model) if generates else (model, None)
    return BaseModel(backbone, model.config, tokenizer, fingerprint(folder), device, language_model, missing, ends)


def _load_weights(settings: ModelSettings, options: dict[str, Any], *, generates: bool) -> tuple[Any, tuple[str, ...]]:
    """Load the model, and return it with the names of the weights that its source lacks. Raises ModelError."""
    from transformers import AutoModel, AutoModelForCausalLM

    folder, source, expected = source_folder(settings), settings.source, EXPECTED[generates]
    load_config(settings)
    check_whole(folder, source)
    kind = AutoModelForCausalLM if generates else AutoModel
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(MISSING_WEIGHTS_SEED)
        try:
            model, info = kind.from_pretrained(  # type: ignore[misc]
                folder, **options, output_loading_info=True, trust_remote_code=False
            )
        except READING as error:
            raise unreadable("model.source", expected, source, error) from None
    missing = tuple(sorted(info["missing_keys"]))
    if generates and missing:
        message = f"{source!r} is not a complete causal language model: it lacks {missing[0]}."
        raise ModelError("model.source", expected, f"a model without {missing[0]}", message=message)
    if len(missing) > len(model.state_dict()) // 2:
        message = f"The weights of {source!r} lack {missing[0]} and most others of its architecture."
        hint = "Use a folder whose config.json and weights belong together."
        raise ModelError("model.source", expected, f"a model without {missing[0]}", message=message, hint=hint)
    return model, missing


def _in_fp32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast the inputs of a head to fp32, in which heads are trained for every precision of the base model."""
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
