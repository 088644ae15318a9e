"""The base model: one backbone in memory, a task's model around it, and fingerprints of the files it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from . import synthetic
from .assets import asset_folder, cache_folder, file_sha256
from .errors import ModelError, StateError
from .quiet import quiet_transformers
from .settings import ModelSettings
from .widened import computes, widen

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
NOT_OF_A_HEAD = ("id2label", "label2id", "num_labels", "quantization_config")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WRITING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # how such architectures are named
MISSING_WEIGHTS_SEED = 0  # weights that a checkpoint lacks (a pooler, say) are the same at every site


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 over source files: two sites with equal fingerprints hold the same base model."""

    model: str
    tokenizer: str
    chat_template: str


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


def load(settings: ModelSettings, *, generates: bool) -> BaseModel:
    """Loads a base model and its tokenizer for one process, in its precision, frozen.

    Raises ModelError when it is not there or cannot be read.
    """
    if settings.source.startswith(synthetic.PREFIX):
        if settings.precision != "fp32":
            raise ModelError("model.precision", f"fp32 for {settings.source}", settings.precision)
        return BaseModel(synthetic.model_of(settings.source), None, None, _no_files(settings), torch.device("cpu"))
    from transformers import AutoModel, AutoModelForCausalLM

    folder, device = source_folder(settings), device_of(settings.device)
    if generates:
        check_writes(settings)
    kind = AutoModelForCausalLM if generates else AutoModel
    how = weights_as(settings.precision, device)
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
    if not computes(how["dtype"], device):
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


def check_writes(settings: ModelSettings, field: str = "model.source") -> None:
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


def weights_as(precision: str, device: torch.device) -> dict[str, Any]:
    """What ``from_pretrained`` needs to know to load weights in this precision. Raises ModelError without bitsandbytes.

    8 bits are LLM.int8() (arXiv 2208.07339), 4 bits are QLoRA's NF4 with double quantisation (arXiv 2305.14314); what
    they are computed in is bf16 on a GPU and fp32 on a CPU.
    """
    if precision in DTYPES:
        return {"dtype": DTYPES[precision]}
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise ModelError("model.precision", f"bitsandbytes for {precision}: pip install 'colora[quantised]'", "no such")
    from transformers import BitsAndBytesConfig

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    four: dict[str, Any] = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }
    bits: dict[str, Any] = {"load_in_4bit": True, **four} if precision == "int4" else {"load_in_8bit": True}
    return {"dtype": dtype, "device_map": {"": device}, "quantization_config": BitsAndBytesConfig(**bits)}


def checkpoint_activations(backbone: nn.Module, on: bool) -> None:
    """Gradient checkpointing: activations are computed again for the backward pass instead of kept.

    Raises ModelError where the architecture has no such thing.
    """
    if not on and not any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules()):
        return
    model: Any = backbone
    # Transformers 5.23 renames gradient_checkpointing_* to activation_checkpointing_* and warns of the old names.
    kind = "activation" if hasattr(backbone, "activation_checkpointing_enable") else "gradient"
    try:
        if on:
            how = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
            getattr(model, f"{kind}_checkpointing_enable")(**how)
        else:
            getattr(model, f"{kind}_checkpointing_disable")()
    except (AttributeError, ValueError):
        wanted = "false for an architecture without gradient checkpointing"
        raise ModelError("train.gradient_checkpointing", wanted, type(backbone).__name__) from None


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
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForCausalLM if task == "generation" else AutoModelForSequenceClassification


def stock_name(settings: ModelSettings) -> str:
    """What a stock loader is to load: the hub's id, or the local folder."""
    local = settings.source.startswith("asset:") or Path(settings.source).is_dir()
    return str(source_folder(settings).resolve()) if local else settings.source


def check_fingerprint(settings: ModelSettings, expected: Mapping[str, str]) -> None:
    """Raises StateError when the base model's files are not those with this :class:`Fingerprint`, by field."""
    here = _no_files(settings) if settings.source.startswith(synthetic.PREFIX) else fingerprint(source_folder(settings))
    for name, value in expected.items():
        if value and getattr(here, name) != value:
            found = getattr(here, name)[:12]
            raise StateError(f"{settings.source}: {name}", f"the one with fingerprint {value[:12]}", found)


def source_folder(settings: ModelSettings) -> Path:
    """The local folder of a model: an asset, a folder, or a snapshot of a hub repository."""
    source = settings.source
    if source.startswith("asset:"):
        return asset_folder(source.removeprefix("asset:"))
    try:
        if Path(source).is_dir():
            return Path(source)
    except OSError as error:  # on the way to it
        raise ModelError("model.source", "a folder that can be entered", f"{source!r} ({error.strerror})") from None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = [*WEIGHT_FILES, *TOKENIZER_FILES, "*.json", "*.jinja"]
        return Path(snapshot_download(source, revision=settings.revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = f"{source!r} ({type(error).__name__})"
        raise ModelError("model.source", "a folder, asset:NAME or a hub id that can be reached", reason) from None


def fingerprint(folder: Path) -> Fingerprint:
    """Hashes the source files of a model folder; hashes are remembered by path, size and time of change."""
    memory = _HashMemory()

    def over(patterns: tuple[str, ...]) -> str:
        files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
        return hashlib.sha256("".join(f"{f.name}:{memory.sha256(f)}\n" for f in files).encode()).hexdigest()

    template = _chat_template(folder)
    prints = Fingerprint(over(WEIGHT_FILES), over(TOKENIZER_FILES), hashlib.sha256(template.encode()).hexdigest())
    memory.save()
    return prints


_WANTED = {
    True: "a causal language model that transformers loads",
    False: "a model that transformers loads",
}


def _chat_template(folder: Path) -> str:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    return str(json.loads(config.read_text(encoding="utf-8")).get("chat_template", "")) if config.is_file() else ""


def _no_files(settings: ModelSettings) -> Fingerprint:
    return Fingerprint(hashlib.sha256(settings.source.encode()).hexdigest(), "", "")


def device_of(name: str) -> torch.device:
    """The device that a name means here, ``auto`` among them. Raises ModelError where there is none of it."""
    if "," in name:
        wanted = "one device (a site per GPU is a way to use more)"
        raise ModelError("device", wanted, repr(name))
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):  # unknown to torch, not there, or not what torch was built for
        raise ModelError("device", "a device of this machine", repr(name)) from None


class _HashMemory:
    """SHA-256 of files, kept in the cache so that many gigabytes are hashed once."""

    def __init__(self) -> None:
        self.path = cache_folder() / "hashes.json"
        try:
            self.known: dict[str, str] = json.loads(self.path.read_text())
        except (OSError, ValueError):
            self.known = {}
        self.size = len(self.known)

    def sha256(self, file: Path) -> str:
        stat = file.stat()
        key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in self.known:
            self.known[key] = file_sha256(file)
        return self.known[key]

    def save(self) -> None:
        if len(self.known) == self.size:
            return
        from .files import write_atomically

        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.known).encode())
