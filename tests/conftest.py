"""Tiny random models and tiny recipes, built by fixtures. No test contacts a hub."""

from __future__ import annotations

import gc
import json
import logging
import os
from pathlib import Path

import pytest
from flwr.app import Message

os.environ.update(
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    RAY_USAGE_STATS_ENABLED="0",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # test processes of one thread each
)


def freeze() -> None:
    """Take all that imports created out of the garbage collector, which would walk through it in every test."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the endurance tests unless ``-m`` names them: ``pytest -m slow`` is for any machine."""
    if "endurance" not in config.option.markexpr.replace("not endurance", ""):
        left_out = [item for item in items if item.get_closest_marker("endurance")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _logs_reach_pytest() -> None:
    """A simulation sends the sites' log to a file only; a later test of the same process may read what is logged."""
    logging.getLogger("colora").propagate = True


WORDS = "a b c d e f g h i j k l m n o p q r s t u v w x y z red blue green cat dog sun moon sea hill".split()  # noqa: SIM905
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def _tokenizer(folder: Path, *, chat: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<user>", "<assistant>", "<system>", "<end>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="<end>", model_max_length=64
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


SIZES = {
    "vocab_size": 9 + len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def _save(model: type, config: object, folder: Path, *, chat: bool) -> Path:
    """A model of ``config`` with seeded random weights, and its tokenizer, as a Hugging Face folder."""
    import torch

    torch.manual_seed(0)
    model(config).save_pretrained(folder)
    _tokenizer(folder, chat=chat)
    freeze()  # transformers imports a model's code at its first use
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT of width 16 without dropout, as a Hugging Face folder."""
    from transformers import BertConfig, BertModel

    config = BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return _save(BertModel, config, tmp_path_factory.mktemp("tiny-bert"), chat=False)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama of width 16 with a chat template, as a Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, num_key_value_heads=2, bos_token_id=None, eos_token_id=8)
    return _save(LlamaForCausalLM, config, tmp_path_factory.mktemp("tiny-llama"), chat=True)


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled_rows(labels: list[str], count: int, seed: int = 0, words: int = 12) -> list[dict]:
    """Return ``count`` rows with texts of at least 20 characters, cycling through the labels."""
    import random

    rng = random.Random(seed)
    return [{"text": " ".join(rng.choices(WORDS, k=words)), "label": labels[i % len(labels)]} for i in range(count)]


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """Every message of the simulations in a test: requests of the coordinator and replies of the sites."""
    from colora.simulation.local_grid import LocalGrid

    seen: list[Message] = []
    answer = LocalGrid._answer

    def tapped(self: LocalGrid, message: Message) -> Message:
        seen.extend((message, answer(self, message)))
        return seen[-1]

    monkeypatch.setattr(LocalGrid, "_answer", tapped)
    return seen


def write_tiny_recipe(model: Path, folder: Path) -> dict:
    """A raw recipe: three classification sites with their own files and labels, two rounds of two steps."""
    sites = []
    for k, name in enumerate(("ada", "bob", "cyd")):
        labels = [f"{name}-yes", f"{name}-no"] + (["cyd-maybe"] if name == "cyd" else [])
        source = write_lines(folder / "rows" / f"{name}-train.jsonl", labelled_rows(labels, 12, seed=k))
        test = write_lines(folder / "rows" / f"{name}-test.jsonl", labelled_rows(labels, 6, seed=10 + k))
        sites.append({"name": name, "source": str(source), "test_source": str(test)})
    return {
        "name": "tiny",
        "rounds": 2,
        "seed": 3,
        "model": {"source": str(model), "max_length": 16},
        "adapter": {"rank": 4, "alpha": 8.0, "target_modules": ["query", "value"]},
        "train": {"steps": 2, "batch_size": 4, "lr": 1e-2},
        "server": {"quorum": 3},
        "simulation": {"threads": 1},
        "site": sites,
    }


@pytest.fixture
def tiny_recipe(tiny_bert: Path, tmp_path: Path) -> dict:
    """A raw recipe of ``write_tiny_recipe`` with files of this test's own."""
    return write_tiny_recipe(tiny_bert, tmp_path)


@pytest.fixture
def generation_recipe(tiny_llama: Path, tmp_path: Path) -> dict:
    """A raw recipe: two sites, one with prompt and completion, one with chat messages."""
    plain = [{"prompt": f"red {w} cat", "completion": f"blue {w}"} for w in WORDS[:10]]
    chat = [
        {"messages": [{"role": "user", "content": f"sun {w}"}, {"role": "assistant", "content": f"moon {w} sea"}]}
        for w in WORDS[:10]
    ]
    files = {name: str(write_lines(tmp_path / f"{name}.jsonl", rows)) for name, rows in (("p", plain), ("c", chat))}
    return {
        "name": "talk",
        "rounds": 2,
        "model": {"source": str(tiny_llama), "max_length": 32},
        "adapter": {"rank": 4, "target_modules": ["q_proj", "v_proj"]},
        "train": {"steps": 2, "batch_size": 4, "lr": 1e-2},
        "evaluation": {"max_new_tokens": 4},
        "simulation": {"threads": 1},
        "data": {"task": "generation", "test": 3},
        "site": [
            {"name": "plain", "source": files["p"]},
            {"name": "chat", "source": files["c"], "messages": "messages"},
        ],
    }
