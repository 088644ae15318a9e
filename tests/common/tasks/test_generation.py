"""Generation: rows that the chat template refuses, and answers within the model's positions."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from colora.common.config.schema import EvaluationSettings, ModelSettings, Plan
from colora.common.dataset import Row, SiteDataset
from colora.common.errors import DataError
from colora.common.models.base_model import load_base_model
from colora.common.tasks import build_task
from colora.common.tasks.generation import Generation
from tests.conftest import SIZES, WORDS

STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m['role'] }}> {{ m['content'] }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
USER, ANSWER = {"role": "user", "content": "red sun"}, {"role": "assistant", "content": "blue moon"}


def test_rows_that_the_template_refuses_are_left_out_by_number(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ModelSettings(str(tiny_llama), max_length=32, device="cpu")
    base = load_base_model(settings, generates=True)
    base.tokenizer.chat_template = STRICT
    good, bad = {"messages": [USER, ANSWER]}, {"messages": [USER, USER, ANSWER]}
    rows = SiteDataset(
        "ada", "generation", [good, bad, good, bad], [bad, good], train_numbers=(5, 9, 2, 14), test_numbers=(7, 8)
    )
    with caplog.at_level(logging.WARNING, "colora"):
        task = build_task(rows, base, Plan("fed", 1, settings))
    assert (len(task.train.examples), task.train.dropped, task.train.refused[0][0]) == (2, 2, 1)
    reason = "the chat template does not accept the conversation (roles must alternate)"
    assert caplog.messages == [
        f"site ada: training rows 9, 14 left out: {reason}",
        f"site ada: test row 7 left out: {reason}",
    ]
    with pytest.raises(DataError, match="site ada: No conversation can be used: the chat template does not accept"):
        build_task(dataclasses.replace(rows, train=[bad]), base, Plan("fed", 1, settings))
    with pytest.raises(DataError, match="roles must alternate"):
        list(task.predict([{"messages": [USER, USER]}]))


@pytest.mark.parametrize("new_tokens", [8, 500])
def test_answers_end_at_the_models_last_position(new_tokens: int, tiny_llama: Path, tmp_path: Path) -> None:
    """A model with 64 learned positions, prompts of 70 tokens and ``max_length`` 64."""
    torch.manual_seed(0)
    sizes = {key: SIZES[key] for key in ("vocab_size", "pad_token_id")}
    config = GPT2Config(**sizes, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=8)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    rows: list[Row] = [{"prompt": " ".join((WORDS * 2)[:70]), "completion": " red"}] * 2
    settings = ModelSettings(str(tmp_path), max_length=64, device="cpu")
    plan = Plan("fed", 1, settings, evaluation=EvaluationSettings(max_new_tokens=new_tokens))
    task = build_task(SiteDataset("ada", "generation", rows, rows), load_base_model(settings, generates=True), plan)
    assert isinstance(task, Generation)
    assert task.prompt_limit + task.new_tokens == 64
    assert task.new_tokens == min(new_tokens, 32)
    assert {"rouge_l", "exact_match", "loss"} <= set(task.measure(generate=True))
    assert [p["truncated"] for p in task.predict(rows)] == [True, True]
