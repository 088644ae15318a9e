"""Sources of base models: local folders, assets, hub snapshots, and the fingerprints of their files."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from ..config.schema import ModelSettings
from ..errors import ModelError, StateError
from ..json_files import parse_json
from . import synthetic
from .assets import asset_folder, cache_folder, file_sha256
from .model_files import file_names, needed_files, token_files, weight_files

CACHED = re.compile(r"/models--([^/]+)--([^/]+)/snapshots/[^/]+/?$")  # where the hub's cache keeps a repository


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 hashes of source files. Sites with equal fingerprints have the same base model."""

    model: str
    tokenizer: str
    chat_template: str


def stock_name(settings: ModelSettings) -> str:
    """Return the name with which Transformers loads this model: a hub id, or a local folder as the recipe names it."""
    if settings.source.startswith("asset:"):
        return str(source_folder(settings).resolve())
    cached = CACHED.search(settings.source)
    return f"{cached[1]}/{cached[2]}" if cached and Path(settings.source).is_dir() else settings.source


def check_fingerprint(settings: ModelSettings, expected: Mapping[str, str]) -> None:
    """Check that a base model has the expected ``Fingerprint``, given by field. Raises StateError otherwise."""
    actual = (
        synthetic_fingerprint(settings)
        if settings.source.startswith(synthetic.PREFIX)
        else fingerprint(source_folder(settings))
    )
    for name, value in expected.items():
        if value and getattr(actual, name) != value:
            found, part = getattr(actual, name)[:12], name.replace("_", " ")
            raise StateError(
                f"{settings.source}: {name}",
                f"fingerprint {value[:12]}",
                found,
                message=f"The {part} of {settings.source!r} has fingerprint {found} instead of {value[:12]}.",
                hint="Use the files that the adapter was trained with.",
            )


def source_folder(settings: ModelSettings) -> Path:
    """Return the local folder of a model: an asset, a folder, or a snapshot of a hub repository.

    Raises ModelError or AssetError if there is none.
    """
    source = settings.source
    if source.startswith("asset:"):
        return asset_folder(source.removeprefix("asset:"))
    try:
        if Path(source).is_dir():
            return Path(source)
    except OSError as error:  # a parent folder that cannot be read
        message = f"The folder {source!r} cannot be read: {error.strerror}."
        raise ModelError(
            "model.source", "a readable folder", f"{source!r} ({error.strerror})", message=message
        ) from None
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _snapshot(source, settings.revision)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, *_http_errors()) as error:
        raise _unreachable(settings, error) from None


def _unreachable(settings: ModelSettings, error: Exception) -> ModelError:
    """Return the error for a hub repository that could not be downloaded."""
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    source, reason = settings.source, type(error).__name__
    field, hint = "model.source", "Check the name and the network, or use asset:NAME."
    message = f"The base model {source!r} is neither a local folder nor a reachable hub repository ({reason})."
    if isinstance(error, GatedRepoError):
        message = f"The base model {source!r} is gated, and this machine may not download it."
        hint = f"Accept its licence at https://huggingface.co/{source}, then run hf auth login here."
    elif isinstance(error, RevisionNotFoundError):
        field, hint = "model.revision", "Check model.revision."
        message = f"The hub repository {source!r} has no revision {settings.revision!r}."
    return ModelError(
        field, "a folder, asset:NAME or a reachable hub id", f"{source!r} ({reason})", message=message, hint=hint
    )


def _snapshot(source: str, revision: str | None) -> Path:
    """Download the files of a hub repository that are needed; without a connection, return the cached snapshot."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        names = HfApi().list_repo_files(source, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except (OSError, *_http_errors()):
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    patterns = [escape(name) for name in needed_files(names)]
    return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))


def _http_errors() -> tuple[type[Exception], ...]:
    """Errors of the HTTP clients that huggingface_hub uses: httpx, and httpx2 in later versions."""
    found = []
    for name in ("httpx", "httpx2"):
        with suppress(ImportError):
            found.append(importlib.import_module(name).HTTPError)
    return tuple(found)


def fingerprint(folder: Path) -> Fingerprint:
    """Hash the source files of a model folder: its one set of weights with config.json, and all that decides tokens.

    Hashes are cached by path, size and modification time.
    """
    cache = _HashCache()

    def hash_files(chosen: list[str]) -> str:
        lines = (f"{name}:{cache.sha256(folder / name)}\n" for name in sorted(chosen))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    names = file_names(folder)
    model = [*weight_files(names), *(name for name in names if name == "config.json")]
    template = hashlib.sha256(_chat_template(folder).encode()).hexdigest()
    result = Fingerprint(hash_files(model), hash_files(token_files(names)), template)
    cache.save()
    return result


def _chat_template(folder: Path) -> str:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    return str(json.loads(config.read_text(encoding="utf-8")).get("chat_template", "")) if config.is_file() else ""


def synthetic_fingerprint(settings: ModelSettings) -> Fingerprint:
    """Return the fingerprint of a synthetic model: the hash of its source's name."""
    return Fingerprint(hashlib.sha256(settings.source.encode()).hexdigest(), "", "")


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))


class _HashCache:
    """SHA-256 hashes of files in the cache folder, so that large files are hashed once."""

    def __init__(self) -> None:
        self.path = cache_folder() / "hashes.json"
        try:
            known = parse_json(self.path.read_bytes(), lambda value: isinstance(value, dict))
        except (OSError, ValueError):
            known = {}
        self.known: dict[str, str] = {key: value for key, value in known.items() if _is_sha256(value)}
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
        from ..atomic_io import write_atomically

        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.known).encode())
