"""The tokenizer of a base model: whole, no larger than the model, with tokens for padding and for the end of a text.

The ids of these tokens are the tokenizer's everywhere: in training, prediction, exports and merged models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..config.schema import ModelSettings
from ..errors import ModelError
from .architecture import load_config
from .hf_logging import quiet_transformers
from .model_files import check_whole, file_names
from .sources import source_folder
from .unreadable import model_errors_of, own_code

EXPECTED, NOT_WHOLE = "a model with a tokenizer", "a vocabulary that is not whole"
WHOLE = re.compile(r"tokenizer(\.[\d.]+)?\.json|tekken\.json|tiktoken\.model|tokenizer\.model.*")  # a vocabulary alone
OPTIONAL = ("tokenizer_file", "tokenizer_config_file", "normalizer_file", "target_vocab_file")
PACKAGES = (  # files, the package that reads them, and the module of it that Transformers uses
    (re.compile(r".*\.tiktoken|tiktoken\.model"), "tiktoken", "tiktoken"),
    (re.compile(r".*\.(spm|model)"), "sentencepiece", "sentencepiece.sentencepiece_model_pb2"),
)
MARK = re.compile(r"\s*(<.+>|\[.+\])\s*")  # how a token looks that is a mark and no word
ANSWER = "wq7zk"  # no chat template contains it


def load_tokenizer(settings: ModelSettings, field: str = "model.source") -> Any:
    """Load the tokenizer alone, with the tokens that a federation needs.

    A missing token that ends a text is the one that the model's configuration names. A missing padding token is the
    one that ends a text, the unknown token or the one that begins a text, in this order. Raises ModelError for
    ``field`` if the vocabulary is missing, in part or whole, or cannot be read.
    """
    from transformers import AutoTokenizer

    config, source = load_config(settings, field), settings.source
    with quiet_transformers(), model_errors_of(field, EXPECTED, source):
        folder = source_folder(settings)
        check_whole(folder, source, field, weights=False)
        _check_own_code(folder, source, field)
        _check_package(folder, source, field)
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises Exception itself
            if _lacks_merges(folder):
                raise _incomplete(source, field, NOT_WHOLE, "merges.txt") from None
            if type(error) is Exception:
                raise ValueError(str(error)) from None
            raise
    _check_vocabulary(tokenizer, folder, source, field)
    _complete(tokenizer, declared_ends(config, folder), source, field)
    return tokenizer


def _check_own_code(folder: Path, source: str, field: str) -> None:
    """Refuse a tokenizer whose class is in its repository. Transformers would take that of the model's family."""
    import transformers

    path = folder / "tokenizer_config.json"
    raw: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    own = raw.get("auto_map")
    own = own.get("AutoTokenizer") if isinstance(own, dict) else own
    name = str(raw.get("tokenizer_class", "")).removesuffix("Fast")
    if own and not (hasattr(transformers, name) or hasattr(transformers, f"{name}Fast")):
        raise own_code(field, source)


def _check_package(folder: Path, source: str, field: str) -> None:
    """Name the package that a vocabulary in another form than ``tokenizer.json`` needs, where it cannot be used."""
    names = file_names(folder)
    if any(name.endswith(".json") and WHOLE.fullmatch(name) for name in names):
        return
    for pattern, package, module in PACKAGES:
        file = next((name for name in names if pattern.fullmatch(name)), None)
        if file is None:
            continue
        try:
            import_module(module)
        except Exception as error:  # protobuf has an Exception of its own for versions that do not fit
            reason = "is not installed" if find_spec(package) is None else f"does not work here ({error})"
            message = f"The vocabulary of {source!r} is in {file}, which needs the package {package}, which {reason}."
            hint = "Run pip install 'colora[tokenizers]'."
            raise ModelError(field, f"the package {package}", reason, message=message, hint=hint) from None
        return


def _check_vocabulary(tokenizer: Any, folder: Path, source: str, field: str) -> None:
    """Refuse a tokenizer that Transformers made up for a folder without the files of its vocabulary.

    Such a tokenizer has special tokens only, so that every text would be the same.
    """
    names, wanted = file_names(folder), tokenizer.vocab_files_names  # of a tokenizer of bytes or characters: none
    files = [name for key, name in wanted.items() if key not in OPTIONAL]
    missing = [name for name in files if name not in names]
    if not wanted or any(WHOLE.fullmatch(name) for name in names) or (files and not missing):
        return
    found = "no vocabulary" if len(missing) == len(files) else NOT_WHOLE
    raise _incomplete(source, field, found, " and ".join(missing) or wanted["tokenizer_file"])


def _lacks_merges(folder: Path) -> bool:
    names = file_names(folder)
    return "vocab.json" in names and "merges.txt" not in names and "tokenizer.json" not in names


def _incomplete(source: str, field: str, found: str, needed: str) -> ModelError:
    message = f"{source!r} has {found}: {needed} is missing beside the configuration."
    hint = "Save the tokenizer into the model's folder as well, or download all of its files."
    return ModelError(field, EXPECTED, found, message=message, hint=hint)


def declared_ends(config: Any, folder: Path | None = None) -> tuple[int, ...]:
    """Return the ids at which the model stops to generate, as its configuration files say."""
    declared: list[Any] = [getattr(config.get_text_config(), "eos_token_id", None)]
    if folder is not None and (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        declared.insert(0, GenerationConfig.from_pretrained(folder).eos_token_id)
    ids = [i for value in declared for i in (value if isinstance(value, list | tuple) else [value])]
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int) and i >= 0))


def _complete(tokenizer: Any, declared: Iterable[int], source: str, field: str) -> None:
    """Set the token that ends a text and the padding token where the tokenizer has none."""
    ends = [i for i in declared if is_mark(tokenizer, i)]
    if tokenizer.eos_token_id is None and ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    if tokenizer.pad_token_id is not None:
        return
    # It fills batches only: masks and labels depend on lengths, not ids.
    padding = next(filter(None, (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)), None)
    if padding is None:
        message = f"The tokenizer of {source!r} has no padding token and no other special token to fill batches with."
        hint = "Set pad_token in its tokenizer_config.json."
        raise ModelError(field, "a tokenizer with a padding token", "none", message=message, hint=hint)
    tokenizer.pad_token = padding


def is_mark(tokenizer: Any, token: int) -> bool:
    """Whether a token is a special or added one, or looks like ``<end>`` or ``[SEP]``, and is not part of a text."""
    if not 0 <= token < len(tokenizer):
        return False
    if token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder:
        return True
    return bool(MARK.fullmatch(str(tokenizer.convert_ids_to_tokens(token))))


def turn_end(tokenizer: Any) -> int | None:
    """Return the token with which the chat template begins the end of an answer; None where it is no mark."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # templates may refuse anything, in their own words
        return None
    after = text.rpartition(ANSWER)[2].strip()
    ids = tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"] if after else []
    return ids[0] if ids and is_mark(tokenizer, ids[0]) else None


def end_ids(tokenizer: Any, declared: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the tokens at which an answer ends: the tokenizer's, the chat template's, and marks that are declared."""
    taught = [i for i in (tokenizer.eos_token_id, turn_end(tokenizer)) if i is not None]
    return tuple(dict.fromkeys([*taught, *(i for i in declared if is_mark(tokenizer, i))]))


def before_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return the tokens before the first one that ends an answer."""
    return list(ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))])


def set_token_ids(model: Any, tokenizer: Any, ends: Sequence[int] = ()) -> None:
    """Give a model's configuration the padding token of its tokenizer and, if it generates, the tokens that end."""
    set_padding(model.config, tokenizer.pad_token_id)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        set_generation(generation, tokenizer, ends)


def set_generation(generation: Any, tokenizer: Any, ends: Sequence[int]) -> None:
    """Give a generation configuration the padding token of the tokenizer, and the tokens at which an answer ends."""
    generation.pad_token_id = tokenizer.pad_token_id
    if ends:
        generation.eos_token_id = list(ends) if len(ends) > 1 else ends[0]


def padding_side(config: Any, *, generates: bool) -> Literal["left", "right"]:
    """The side on which a model's inputs are padded: left where it continues them or reads their last position."""
    return "left" if generates or getattr(config, "summary_type", None) == "last" else "right"


def set_padding(config: Any, token: int) -> None:
    """Set the padding token of a configuration and of the text model in it."""
    for each in (config, config.get_text_config()):
        each.pad_token_id = token


def check_embedding(tokenizer: Any, model: nn.Module, source: str) -> None:
    """Raise ModelError where the tokenizer has ids that the model's embedding has no row for."""
    try:
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return
    rows = getattr(embedding, "num_embeddings", None)
    largest = max(tokenizer.get_vocab().values(), default=-1) if rows else -1
    if rows and largest >= rows:
        message = f"The tokenizer of {source!r} has tokens up to id {largest}, but its embedding has {rows} rows."
        hint = "Resize the model's embedding (resize_token_embeddings), or remove the tokens that were added."
        raise ModelError("model.source", f"tokens below {rows}", largest, message=message, hint=hint)
