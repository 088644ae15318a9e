"""A tiny causal model that knows yes and no, and a stand-in generator that needs no model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from colora.common.config.loader import recipe_from
from colora.common.seeds import seed_from
from colora.simulation.run import simulate
from colora.transfer import preparation, synthesis
from tests.conftest import SIZES, WORDS

SPECIAL = ["[PAD]", "[UNK]", "<end>", "yes", "no", "Is", "the", "above", "question", "from", "dataset?", "tiny"]


@pytest.fixture(scope="session")
def generating_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama of width 16 whose vocabulary has yes and no."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("generating-llama")
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="<end>", model_max_length=64
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(vocabulary)}
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, bos_token_id=None, eos_token_id=2)).save_pretrained(
        folder
    )
    return folder


def replace_generator(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace the generator by random words from the end of the alphabet, and return the list of its call numbers."""
    calls: list[int] = []

    def generate(base: Any, seeds: Sequence[str], settings: Any, seed: int, call: int) -> Iterator[str]:
        calls.append(call)
        rng = random.Random(seed_from(seed, call))
        for _ in range(settings.batch_size):
            yield " ".join(rng.choices("stuvwxyz", k=6))

    monkeypatch.setattr(preparation, "generate_texts", generate)
    monkeypatch.setattr(synthesis, "generate_texts", generate)
    return calls


@pytest.fixture
def generator_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The call numbers of the stand-in generator, which is in place for one test."""
    return replace_generator(monkeypatch)


def prepare_run(raw: dict, folder: Path) -> Path:
    """Run a recipe with the stand-in generator and return the run folder, which tests copy."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        replace_generator(monkeypatch)
        return simulate(recipe_from(raw), folder, resume=False).path
