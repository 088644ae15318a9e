"""Tokenizers: vocabularies that are not there or not whole, and the ids of padding and of the end of an answer."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from colora.client.data.unknown_tokens import unknown_share
from colora.common.config.schema import ModelSettings, Plan
from colora.common.dataset import SiteDataset
from colora.common.errors import ConfigError, ModelError
from colora.common.models import tokenizer as module
from colora.common.models.base_model import load_base_model
from colora.common.models.sources import fingerprint
from colora.common.models.tokenizer import load_tokenizer
from colora.common.tasks import build_task
from tests.conftest import CHAT_TEMPLATE, SIZES, WORDS

EMPTY = ["bert", "distilbert", "roberta", "xlm-roberta", "deberta-v2", "electra", "t5", "gpt2", "qwen2", "gemma", "opt"]


def model_with(
    folder: Path, tiny: Path, *, chat: str | None = None, tokens: dict[str, Any] | None = None, **config: Any
) -> ModelSettings:
    """A tiny Llama whose configuration differs from its tokenizer as the keywords say."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 8, **config}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)  # so that the input matters
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    if tokens:
        path = folder / "tokenizer_config.json"
        kept = {k: v for k, v in json.loads(path.read_text()).items() if tokens.get(k, "") is not None}
        path.write_text(json.dumps(kept))
    return ModelSettings(str(folder), max_length=32, device="cpu")


@pytest.mark.parametrize("family", EMPTY)
def test_a_tokenizer_is_not_made_up_from_the_configuration(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ModelError, match=r"has no vocabulary: .* missing"):
        load_tokenizer(ModelSettings(str(tmp_path)))


def test_a_vocabulary_without_its_merges_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "<|endoftext|>": 2}))
    with pytest.raises(ModelError, match=r"a vocabulary that is not whole: merges\.txt is missing"):
        load_tokenizer(ModelSettings(str(tmp_path)))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert load_tokenizer(ModelSettings(str(tmp_path)))("ab", add_special_tokens=False)["input_ids"] == [0, 1]


@pytest.mark.parametrize(("file", "package"), [("spm.model", "sentencepiece"), ("some.tiktoken", "tiktoken")])
def test_a_vocabulary_that_needs_a_package_names_it(file: str, package: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deberta-v2"}))
    (tmp_path / file).write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    with pytest.raises(
        ModelError, match=rf"in {file}, which needs the package {package}, which is not installed. Run pip"
    ):
        load_tokenizer(ModelSettings(str(tmp_path)))


def test_a_package_that_does_not_fit_is_named_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise Exception("gencode 7 runtime 6")

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (tmp_path / "spiece.model").write_bytes(b"")
    monkeypatch.setattr(module, "import_module", fail)
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    with pytest.raises(ModelError, match=r"package sentencepiece, which does not work here \(gencode 7 runtime 6\)"):
        load_tokenizer(ModelSettings(str(tmp_path)))


@pytest.mark.parametrize("file", ["spm.model", "sentencepiece.bpe.model", "merges.txt", "bpe.codes", "x.tiktoken"])
def test_every_file_that_decides_tokens_is_in_the_fingerprint(file: str, tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    before = fingerprint(folder)
    (folder / file).write_bytes(b"other tokens")
    after = fingerprint(folder)
    assert (after.model, after.tokenizer == before.tokenizer) == (before.model, False)


def test_a_second_copy_of_the_weights_is_not_in_the_fingerprint(tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    before = fingerprint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"a copy")
    assert fingerprint(folder) == before


def test_a_token_beyond_the_embedding_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<price>"])
    tokenizer.save_pretrained(folder)
    rows = 9 + len(WORDS)
    with pytest.raises(ModelError, match=f"tokens up to id {rows}, but its embedding has {rows} rows"):
        load_base_model(ModelSettings(str(folder), max_length=16), generates=False)


def test_a_length_beyond_learned_positions_is_refused_and_beyond_computed_ones_told(
    tiny_bert: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_base_model(ModelSettings(str(tiny_bert), max_length=64), generates=False)
    with pytest.raises(ConfigError, match=r"model\.max_length is 65, but .* positions for 64 tokens. .* at most 64"):
        load_base_model(ModelSettings(str(tiny_bert), max_length=65), generates=False)
    load_base_model(ModelSettings(str(tiny_llama), max_length=65), generates=True)
    assert caplog.messages == [f"model.max_length is 65, but {tiny_llama} was trained with 64 positions."]


def test_positions_of_roberta_begin_after_the_padding_token(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    RobertaModel(RobertaConfig(**{**SIZES, "pad_token_id": 1, "max_position_embeddings": 66})).save_pretrained(folder)
    assert load_base_model(ModelSettings(str(folder), max_length=64), generates=False).positions == 64


@pytest.mark.parametrize("pad", [5, 0, -1, None])
def test_a_text_gets_the_same_answer_alone_and_beside_longer_texts(
    pad: int | None, tiny_llama: Path, tmp_path: Path
) -> None:
    settings = model_with(tmp_path, tiny_llama, pad_token_id=pad)
    rows = [{"text": " ".join(WORDS[: 1 + i % 9]), "label": "xy"[i % 2]} for i in range(12)]
    base = load_base_model(settings, generates=False)
    task = build_task(SiteDataset("ada", "classification", rows, rows, ("x", "y")), base, Plan("fed", 1, settings))
    assert task.module.config.pad_token_id == base.tokenizer.pad_token_id == 0
    with torch.no_grad():
        for parameter in task.head.values():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    together = [p["probabilities"]["x"] for p in task.predict(rows)]
    alone = [next(iter(task.predict([row])))["probabilities"]["x"] for row in rows]
    assert together == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("absent", [{"pad_token": None}, {"pad_token": None, "eos_token": None}])
def test_a_missing_token_is_the_one_that_the_model_declares(absent: dict, tiny_llama: Path, tmp_path: Path) -> None:
    settings = model_with(tmp_path, tiny_llama, tokens=absent, eos_token_id=8)
    tokenizer = load_tokenizer(settings)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<end>", "<end>")


ENDS = {
    "the configuration names a word": (None, 30, "<end>", (8,)),
    "the configuration names a mark": (None, 3, "<end>", (8, 3)),
    "the template ends a turn otherwise": (CHAT_TEMPLATE.replace("<end>", "[SEP]"), 8, "[SEP]", (8, 3)),
    "the template ends as the tokenizer": (CHAT_TEMPLATE, 8, "<end>", (8,)),
    "the template has no end": (CHAT_TEMPLATE.replace(" <end>", ""), 8, "<end>", (8,)),
    "the template ends with words": (CHAT_TEMPLATE.replace("<end>", "hill sea"), 8, "<end>", (8,)),
}


@pytest.mark.parametrize("case", ENDS.values(), ids=ENDS)
def test_an_answer_is_taught_to_end_where_generation_stops(case: Any, tiny_llama: Path, tmp_path: Path) -> None:
    template, declared, taught, stops = case
    settings = model_with(tmp_path, tiny_llama, chat=template, eos_token_id=declared)
    base = load_base_model(settings, generates=True)
    turns = [{"role": "user", "content": "sun"}, {"role": "assistant", "content": "moon"}]
    row = {"messages": turns} if template else {"prompt": "sun", "completion": "moon"}
    task: Any = build_task(SiteDataset("ada", "generation", [row], [row]), base, Plan("fed", 1, settings))
    assert base.ends == stops
    (example,) = task.train.examples
    assert base.tokenizer.convert_ids_to_tokens(example.ids)[-1] == taught
    assert example.reference.split()[0] == "moon"
    assert taught not in example.reference
    generation = base.language_model.generation_config  # type: ignore[union-attr]
    assert generation.eos_token_id == (list(stops) if len(stops) > 1 else stops[0])
    assert generation.pad_token_id == 0


def test_a_generated_answer_ends_at_the_first_end(tiny_llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    settings = model_with(tmp_path, tiny_llama, eos_token_id=3)
    base = load_base_model(settings, generates=True)
    row = {"prompt": "sun", "completion": "moon"}
    task: Any = build_task(SiteDataset("ada", "generation", [row], [row]), base, Plan("fed", 1, settings))
    moon, sep = base.tokenizer.convert_tokens_to_ids(["moon", "[SEP]"])
    out = type("Output", (), {"sequences": torch.tensor([[1, moon, sep, moon, moon]])})
    monkeypatch.setattr(task, "_generate", lambda prompts, **_: (out, 1))
    assert task.answers([[1]]) == ["moon"]


def test_a_model_that_ignores_the_mask_answers_as_if_each_prompt_were_alone(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import RwkvConfig, RwkvForCausalLM

    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    torch.manual_seed(0)
    sizes = {"vocab_size": SIZES["vocab_size"], "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}
    model = RwkvForCausalLM(RwkvConfig(**sizes, context_length=64, bos_token_id=2, eos_token_id=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.7)
    model.save_pretrained(folder)
    settings = ModelSettings(str(folder), max_length=32, device="cpu")
    base = load_base_model(settings, generates=True)
    rows = [{"prompt": " ".join(WORDS[:n]), "completion": "moon"} for n in (1, 7, 3)]
    task: Any = build_task(SiteDataset("ada", "generation", rows, rows), base, Plan("fed", 1, settings))
    prompts = [base.tokenizer(row["prompt"])["input_ids"] for row in rows]
    assert task.answers(prompts) == [task.answers([prompt])[0] for prompt in prompts]
    assert not task._reads_mask


def test_a_model_that_reads_the_mask_answers_in_whole_batches(tiny_llama: Path, tmp_path: Path) -> None:
    settings = model_with(tmp_path, tiny_llama)
    base, row = load_base_model(settings, generates=True), {"prompt": "sun", "completion": "moon"}
    task: Any = build_task(SiteDataset("ada", "generation", [row], [row]), base, Plan("fed", 1, settings))
    assert task._reads_mask


def test_the_share_of_unknown_tokens_is_that_of_the_texts(tiny_bert: Path) -> None:
    tokenizer = load_tokenizer(ModelSettings(str(tiny_bert)))
    rows = [{"text": "red cat xyzzy dog", "label": "x"}, {"text": "quux", "label": "y"}]
    assert unknown_share(SiteDataset("ada", "classification", rows, ()), tokenizer) == 2 / 5
