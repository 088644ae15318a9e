"""The base model: one backbone in memory, and the task model around it."""

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

NOT_OF_A_HEAD = ("id2label", "label2id", "num_labels", "quantization_config")  # config keys that a new head replaces
GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # suffixes of architectures that generate
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

    def classifier(self, labels: int) -> tuple[nn.Module, dict[str, nn.Module]]:
        """Build a sequence classification model around the backbone, with an uninitialized head for ``labels`` classes.

        Returns the model and the modules of its head by name: one in most architectures, two in DistilBERT. The head is
        the architecture's own, as ``AutoModelForSequenceClassification`` builds it. The caller sets its values.
        Raises ModelError if the architecture has no sequence classifier.
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

    ``generates`` loads it as a causal language model. Raises ModelError if it is missing or cannot be read.
    """
    if settings.source.startswith(synthetic.PREFIX):
        if settings.precision != "fp32":
            message = f"model.precision must be 'fp32' for {settings.source}, not {settings.precision!r}."
            raise ModelError("model.precision", "fp32", settings.precision, message=message)
        return BaseModel(
            synthetic.model_of(settings.source), None, None, synthetic_fingerprint(settings), torch.device("cpu")
        )
    from transformers import AutoModel, AutoModelForCausalLM

    folder, device = source_folder(settings), resolve_device(settings.device)
    if generates:
        check_generates(settings)
    kind = AutoModelForCausalLM if generates else AutoModel
    options = loading_options(settings.precision, device)
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(MISSING_WEIGHTS_SEED)
        try:
            model, info = kind.from_pretrained(folder, **options, output_loading_info=True)  # type: ignore[misc]
        except (OSError, ValueError, UnpicklingError) as error:
            raise _unreadable("model.source", _EXPECTED[generates], settings.source, error) from None
    missing = tuple(sorted(info["missing_keys"]))
    if generates and missing:
        message = f"{settings.source!r} is not a complete causal language model: it lacks {missing[0]}."
        raise ModelError("model.source", _EXPECTED[True], f"a model without {missing[0]}", message=message)
    tokenizer = load_tokenizer(settings)
    model.requires_grad_(False)
    if "quantization_config" not in options:
        model.to(device)
    if not has_native_arithmetic(options["dtype"], device):
        widen(model)
    return BaseModel(
        model.base_model if generates else model,
        model.config,
        tokenizer,
        fingerprint(folder),
        device,
        model if generates else None,
        missing,
    )


def load_tokenizer(settings: ModelSettings, field: str = "model.source") -> Any:
    """Load the tokenizer alone. Raises ModelError for ``field`` if it is missing or cannot be read."""
    from transformers import AutoTokenizer

    with quiet_transformers(), _model_errors_of(field, "a model with a tokenizer", settings.source):
        tokenizer: Any = AutoTokenizer.from_pretrained(source_folder(settings))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # fills batches only: masks and labels depend on lengths, not ids
    return tokenizer


def check_generates(settings: ModelSettings, field: str = "model.source") -> None:
    """Check that a model was trained as a causal language model. Raises ModelError for ``field`` otherwise.

    Transformers loads an encoder as a causal model, too, with an untrained output layer.
    """
    from transformers import AutoConfig

    with _model_errors_of(field, _EXPECTED[True], settings.source):
        config = AutoConfig.from_pretrained(source_folder(settings))
    names = config.architectures or (config.model_type,)
    if config.is_encoder_decoder or (config.architectures and not any(name.endswith(GENERATING) for name in names)):
        message = f"{field} must be {_EXPECTED[True]}, but {settings.source!r} is a {names[0]}."
        raise ModelError(field, _EXPECTED[True], names[0], message=message)


@contextmanager
def _model_errors_of(field: str, expected: str, source: str) -> Iterator[None]:
    """Turn errors while a model is read into a ModelError of ``field``."""
    try:
        yield
    except ModelError as error:
        message = error.message if error.field == field or not error.message else f"{field}: {error.message}"
        raise ModelError(field, error.expected, error.found, message=message, hint=error.hint) from None
    except (OSError, ValueError) as error:
        raise _unreadable(field, expected, source, error) from None


def _unreadable(field: str, expected: str, source: str, error: Exception) -> ModelError:
    message = f"{source!r} cannot be loaded as {expected}: {error}."
    return ModelError(field, expected, f"{source} ({error})", message=message, hint=f"Check {field}.")


def _in_fp32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast the inputs of a head to fp32, in which heads are trained for every precision of the base model."""
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def skeleton(settings: ModelSettings) -> nn.Module:
    """Build the backbone on the meta device, without weights. It has every layer that an adapter can attach to."""
    if settings.source.startswith(synthetic.PREFIX):
        return synthetic.model_of(settings.source)
    from transformers import AutoConfig, AutoModel

    folder = source_folder(settings)
    with quiet_transformers(), torch.device("meta"):
        try:
            return AutoModel.from_config(AutoConfig.from_pretrained(folder))
        except (OSError, ValueError) as error:
            raise _unreadable("model.source", _EXPECTED[False], settings.source, error) from None


def stock_class(task: str) -> Any:
    """The transformers class that a task's full model is of."""
    import transformers

    return getattr(transformers, TASKS[task].auto_class or "AutoModel")


_EXPECTED = {  # by whether the model generates text
    True: "a causal language model",
    False: "a Transformers model",
}
