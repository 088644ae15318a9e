"""The files of base models: what a hub download fetches, and files that are damaged, quantized or bring own code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from colora.common.config.schema import ModelSettings
from colora.common.errors import ModelError
from colora.common.models.base_model import load_base_model
from colora.common.models.model_files import needed_files, weight_files
from colora.common.models.sources import source_folder

DEBERTA = {
    "needed": ["config.json", "pytorch_model.bin", "spm.model", "tokenizer_config.json"],
    "left": ["README.md", "pytorch_model.generator.bin", "rust_model.ot", "tf_model.h5"],
}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
MISTRAL = {
    "needed": ["config.json", "generation_config.json", *SHARDS, "tokenizer.json", "tokenizer.model.v3"],
    "left": ["consolidated.safetensors", "params.json", "pytorch_model-00001-of-00002.bin"],
}
MINILM = {
    "needed": ["config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "vocab.txt"],
    "left": ["1_Pooling/config.json", "onnx/model.onnx", "openvino/openvino_model.bin", "pytorch_model.bin"],
}
OTHERS = {  # vocabularies of XLM-R, Qwen, Marian, PhoBERT, GPT-2 and Mistral
    "needed": ["bpe.codes", "merges.txt", "qwen.tiktoken", "sentencepiece.bpe.model", "source.spm", "tekken.json"],
    "left": ["flax_model.msgpack", "training_args.bin"],
}


@pytest.mark.parametrize(
    "repository", [DEBERTA, MISTRAL, MINILM, OTHERS], ids=["deberta", "mistral", "minilm", "other"]
)
def test_a_download_has_all_that_decides_tokens_and_one_set_of_weights(
    repository: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = repository["needed"] + repository["left"]
    assert needed_files(names) == sorted(repository["needed"])
    asked: dict[str, Any] = {}

    def download(source: str, **options: Any) -> str:
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, source, revision: names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert source_folder(ModelSettings("some/model", revision="v1")) == tmp_path
    assert (asked["revision"], asked["allow_patterns"]) == ("v1", sorted(repository["needed"]))


def test_weights_are_the_first_set_that_transformers_looks_for() -> None:
    assert weight_files(["pytorch_model.bin", "model.safetensors", *SHARDS]) == ["model.safetensors"]
    assert weight_files(["pytorch_model.bin", *SHARDS, "consolidated.safetensors"]) == SHARDS
    assert weight_files(["model.onnx"]) == []


def _pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n")


def _tokens_pointer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n")


def _cut(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def _cut_pickle(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    weights = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(weights[: len(weights) // 2])


def _missing_part(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / SHARDS[0])
    parts = {"a.weight": SHARDS[0], "b.weight": SHARDS[1]}
    (folder / SHARDS[2]).write_text(json.dumps({"metadata": {}, "weight_map": parts}))


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _others_weights(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"other.weight": torch.zeros(2, 2)}, folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def _quantized(method: str) -> Any:
    return lambda folder: configure(folder, quantization_config={"quant_method": method, "bits": 4})


PROBLEMS = {
    "Git LFS pointer": (_pointer, "model.safetensors is a Git LFS pointer and not the file itself. Run git lfs pull"),
    "pointer for tokens": (_tokens_pointer, "tokenizer.json is a Git LFS pointer"),
    "cut safetensors": (_cut, "model.safetensors is cut or damaged. Download it again"),
    "cut pickle": (_cut_pickle, "pytorch_model.bin is cut or damaged"),
    "missing part": (_missing_part, f"model.safetensors.index.json names {SHARDS[1]}, which is not there"),
    "no weights": (_no_weights, "cannot be loaded as a Transformers model"),
    "weights of another model": (_others_weights, "and most others of its architecture"),
    "GPTQ": (_quantized("gptq"), r"already quantized \(gptq\).* Use the model's original weights"),
    "AWQ": (_quantized("awq"), r"already quantized \(awq\)"),
    "generation configuration": (
        lambda folder: (folder / "generation_config.json").write_text("{oops"),
        r"generation_config.json is not a JSON object\. Download it again",
    ),
    "X-MOD without a language": (
        lambda folder: configure(folder, model_type="xmod", default_language=None),
        "its config.json names none of them. Set default_language",
    ),
    "bitsandbytes": (_quantized("bitsandbytes"), r"already quantized \(bitsandbytes\)"),
}


@pytest.mark.parametrize("case", PROBLEMS.values(), ids=PROBLEMS)
def test_weights_that_cannot_be_used_are_named_in_one_sentence(case: Any, tiny_bert: Path, tmp_path: Path) -> None:
    spoil, sentence = case
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    spoil(folder)
    with pytest.raises(ModelError, match=sentence) as caught:
        load_base_model(ModelSettings(str(folder), max_length=16), generates=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("of", ["model", "tokenizer"])
def test_code_of_a_repository_never_runs_and_nothing_is_asked(
    of: str, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    if of == "model":
        configure(folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"})
    else:
        own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(own))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    with pytest.raises(ModelError, match="needs Python code of its own repository, which colora never runs"):
        load_base_model(ModelSettings(str(folder), max_length=16), generates=False)
    assert not (tmp_path / "executed").exists()
