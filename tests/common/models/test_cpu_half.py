"""A model with 16-bit weights that computes in fp32 equals an fp32 model with rounded weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from colora.common.config.schema import ModelSettings
from colora.common.models import base_model
from colora.common.models.cpu_half import WideLinear, has_native_arithmetic, widen

SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_widened_model_is_the_rounded_one_in_fp32_with_the_same_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    half = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)).to(dtype)
    whole = copy.deepcopy(half).float()
    half.requires_grad_(False)
    widen(half)
    assert half.model.layers[0].mlp.up_proj.weight.dtype == dtype  # no more memory than before
    assert half.lm_head.weight is half.model.embed_tokens.weight
    assert half.model.embed_tokens.weight.dtype == dtype
    results = []
    for one in (half, whole):
        with_lora = get_peft_model(one, LoraConfig(r=2, target_modules=["q_proj"]))
        torch.manual_seed(1)
        for parameter in with_lora.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter, dtype=torch.float32)
        ids = torch.arange(24).reshape(2, 12)
        out = with_lora(input_ids=ids, labels=ids)
        out.loss.backward()
        gradients = {name: p.grad for name, p in with_lora.named_parameters() if p.requires_grad}
        results.append((out.logits, gradients))
    (logits, gradients), (expected_logits, expected_gradients) = results
    assert logits.dtype == torch.float32
    assert len(gradients) == 4
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-6)


def test_devices_with_native_arithmetic() -> None:
    assert has_native_arithmetic(torch.float32, torch.device("cpu"))
    assert has_native_arithmetic(torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize("native", [True, False])
def test_a_base_model_is_widened_without_native_arithmetic(
    native: bool, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "has_native_arithmetic", lambda dtype, device: native)
    backbone = base_model.load_base_model(
        ModelSettings(str(tiny_bert), max_length=16, precision="bf16"), generates=False
    ).backbone
    linears = [module for module in backbone.modules() if isinstance(module, nn.Linear)]
    assert {type(module) is WideLinear for module in linears} == {not native}
    assert {module.weight.dtype for module in linears} == {torch.bfloat16}
    norms = [module for module in backbone.modules() if isinstance(module, nn.LayerNorm)]
    assert {module.weight.dtype for module in norms} == {torch.bfloat16 if native else torch.float32}
