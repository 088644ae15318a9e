"""Where a base model comes from: local folders, assets, hub snapshots, and fingerprints of their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config.schema import ModelSettings
from ..errors import ModelError, StateError
from . import synthetic
from .assets import asset_folder, cache_folder, file_sha256

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


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 over source files: two sites with equal fingerprints hold the same base model."""

    model: str
    tokenizer: str
    chat_template: str


def stock_name(settings: ModelSettings) -> str:
    """What a stock loader is to load: the hub's id, or the local folder."""
    local = settings.source.startswith("asset:") or Path(settings.source).is_dir()
    return str(source_folder(settings).resolve()) if local else settings.source


def check_fingerprint(settings: ModelSettings, expected: Mapping[str, str]) -> None:
    """Raises StateError when the base model's files are not those with this :class:`Fingerprint`, by field."""
    here = (
        synthetic_fingerprint(settings)
        if settings.source.startswith(synthetic.PREFIX)
        else fingerprint(source_folder(settings))
    )
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


def _chat_template(folder: Path) -> str:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    return str(json.loads(config.read_text(encoding="utf-8")).get("chat_template", "")) if config.is_file() else ""


def synthetic_fingerprint(settings: ModelSettings) -> Fingerprint:
    """Return the fingerprint of a synthetic model: the hash of its source's name."""
    return Fingerprint(hashlib.sha256(settings.source.encode()).hexdigest(), "", "")


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
        from ..atomic_io import write_atomically

        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.known).encode())
