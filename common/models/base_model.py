"""The base model: one backbone in memory, and a task's model around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from ..config.schema import ModelSettings
from ..dataset import TASKS
from ..errors import ModelError
from . import synthetic
from .cpu_half import has_native_arithmetic, widen
from .hf_logging import quiet_transformers
from .precision import loading_options, resolve_device
from .sources import Fingerprint, fingerprint, source_folder, synthetic_fingerprint

NOT_OF_A_HEAD = ("id2label", "label2id", "num_labels", "quantization_config")
WRITING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # how such architectures are named
MISSING_WEIGHTS_SEED = 0  # weights that a checkpoint lacks (a pooler, say) are the same at every site


@dataclass
class BaseModel:
    """A backbone with its tokenizer, shared by all sites of a process.

    ``backbone`` is the headless transformer; ``language_model`` is the same backbone with its output layer
    when a site generates text, else None.
    """

    backbone: nn.Module
    config: Any
    tokenizer: Any
    fingerprint: Fingerprint
    device: torch.device
    language_model: nn.Module | None = None
    missing: tuple[str, ...] = ()  # names of weights that the source lacks (see MISSING_WEIGHTS_SEED)

    def classifier(self, labels: int) -> tuple[nn.Module, dict[str, nn.Module]]:
        """A sequence classification model around the backbone, with a fresh head for ``labels`` classes.

        Returns the model and the modules of its head by name: one in most architectures, two in DistilBERT. The head is
        the architecture's own, as ``AutoModelForSequenceClassification`` builds it; the caller sets its values.
        Raises ModelError when the architecture has none.
        """
        from transformers import AutoModelForSequenceClassification

        values = {k: v for k, v in self.config.to_dict().items() if k not in NOT_OF_A_HEAD}
        config = type(self.config).from_dict({**values, "num_labels": labels})
        if config.pad_token_id is None and self.tokenizer is not None:
            config.pad_token_id = self.tokenizer.pad_token_id
        try:
            with quiet_transformers(), torch.device("meta"):
                model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        except ValueError:
            wanted = "an architecture that transformers has a sequence classifier for"
            raise ModelError("model.source", wanted, type(self.config).__name__) from None
        setattr(model, model.base_model_prefix, self.backbone)
        parts = {n: m for n, m in model.named_children() if n != model.base_model_prefix and list(m.parameters())}
        for module in parts.values():
            module.to_empty(device=self.device)
            module.register_forward_pre_hook(_in_fp32)
        return model, parts

    @staticmethod
    def head_parameters(parts: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
        """The head group's parameters by name: ``head.classifier.weight`` (classes, d), ``head.classifier.bias``."""
        return {f"head.{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}


def load_base_model(settings: ModelSettings, *, generates: bool) -> BaseModel:
    """Loads a base model and its tokenizer for one process, in its precision, frozen.

    Raises ModelError when it is not there or cannot be read.
    """
    if settings.source.startswith(synthetic.PREFIX):
        if settings.precision != "fp32":
            raise ModelError("model.precision", f"fp32 for {settings.source}", settings.precision)
        return BaseModel(
            synthetic.model_of(settings.source), None, None, synthetic_fingerprint(settings), torch.device("cpu")
        )
    from transformers import AutoModel, AutoModelForCausalLM

    folder, device = source_folder(settings), resolve_device(settings.device)
    if generates:
        check_generates(settings)
    kind = AutoModelForCausalLM if generates else AutoModel
    how = loading_options(settings.precision, device)
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(MISSING_WEIGHTS_SEED)
        try:
            model, about = kind.from_pretrained(folder, **how, output_loading_info=True)  # type: ignore[misc]
        except (OSError, ValueError, UnpicklingError) as error:
            raise ModelError("model.source", _WANTED[generates], f"{settings.source} ({error})") from None
    if generates and about["missing_keys"]:
        raise ModelError("model.source", _WANTED[generates], f"{settings.source} without {min(about['missing_keys'])}")
    tokenizer = load_tokenizer(settings)
    model.requires_grad_(False)
    if "quantization_config" not in how:
        model.to(device)
    if not has_native_arithmetic(how["dtype"], device):
        widen(model)
    print_of = fingerprint(folder)
    return BaseModel(
        model.base_model if generates else model,
        model.config,
        tokenizer,
        print_of,
        device,
        model if generates else None,
        tuple(sorted(about["missing_keys"])),
    )


def load_tokenizer(settings: ModelSettings, field: str = "model.source") -> Any:
    """The tokenizer by itself. Raises ModelError, which names the field, when it is not there or cannot be read."""
    from transformers import AutoTokenizer

    with quiet_transformers(), _said_of(field, "a model with a tokenizer", settings.source):
        tokenizer: Any = AutoTokenizer.from_pretrained(source_folder(settings))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # only fills batches: masks and labels go by length, not by id
    return tokenizer


def check_generates(settings: ModelSettings, field: str = "model.source") -> None:
    """Raises ModelError for a model that was not trained to go on with a text, though a class could make it try."""
    from transformers import AutoConfig

    with _said_of(field, _WANTED[True], settings.source):
        config = AutoConfig.from_pretrained(source_folder(settings))
    named = config.architectures or (config.model_type,)
    if config.is_encoder_decoder or (config.architectures and not any(name.endswith(WRITING) for name in named)):
        raise ModelError(field, _WANTED[True], f"{settings.source}, which is a {named[0]}")


@contextmanager
def _said_of(field: str, wanted: str, source: str) -> Iterator[None]:
    """What keeps a model from being read, as a ModelError of this field."""
    try:
        yield
    except ModelError as error:
        raise ModelError(field, error.expected, error.found) from None
    except (OSError, ValueError) as error:
        raise ModelError(field, wanted, f"{source} ({error})") from None


def _in_fp32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Heads are trained in fp32, whatever the base model computes in."""
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def skeleton(settings: ModelSettings) -> nn.Module:
    """The backbone's modules without their weights (meta device): enough to know every adapter shape."""
    if settings.source.startswith(synthetic.PREFIX):
        return synthetic.model_of(settings.source)
    from transformers import AutoConfig, AutoModel

    folder = source_folder(settings)
    with quiet_transformers(), torch.device("meta"):
        try:
            return AutoModel.from_config(AutoConfig.from_pretrained(folder))
        except (OSError, ValueError) as error:
            raise ModelError("model.source", _WANTED[False], f"{settings.source} ({error})") from None


def stock_class(task: str) -> Any:
    """The transformers class that a task's full model is of."""
    import transformers

    return getattr(transformers, TASKS[task].auto_class or "AutoModel")


_WANTED = {
    True: "a causal language model that transformers loads",
    False: "a model that transformers loads",
}
