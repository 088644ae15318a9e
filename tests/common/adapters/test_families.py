"""A recipe without ``target_modules`` adapts tiny models of many families: PEFT's layers, or all linear ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from colora.common.adapters.inject import attach
from colora.common.config.schema import AdapterSettings
from colora.common.methods import METHODS
from tests import conftest

SIZES = {**conftest.SIZES, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
NOTHING_MORE: dict[str, Any] = {}
GROUPED = {"num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
BART = {
    "d_model": 16,
    **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
}
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "roberta", "electra", "deberta", "deberta-v2", "mpnet", "albert"), NOTHING_MORE),
    **dict.fromkeys(("gpt_neox", "bloom", "falcon", "phi"), NOTHING_MORE),
    **dict.fromkeys(("llama", "mistral", "qwen2", "phi3", "olmo2", "granite", "cohere", "smollm3"), GROUPED),
    **dict.fromkeys(("qwen3", "gemma", "gemma2", "gemma3_text"), HEADS),
    "distilbert": {"hidden_dim": 32},
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2},
    "t5": T5,
    "bart": BART,
    "gpt2": {"n_inner": 32},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]},
    "gptj": {"rotary_dim": 4},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "mixtral": {"num_local_experts": 4, **GROUPED},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, **HEADS},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **HEADS},
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 8, "n_groups": 1, "expand": 2},
}


def tiny(family: str, device: str = "cpu") -> nn.Module:
    """Return a random backbone of width 16."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModel.from_config(AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]}))


def attached(model: nn.Module, settings: AdapterSettings | None = None) -> dict[str, nn.Parameter]:
    return attach(model, settings or AdapterSettings(4), METHODS["colora"])


def layers(parameters: dict[str, nn.Parameter]) -> set[str]:
    return {key.removesuffix(".lora_A.weight") for key in parameters if key.endswith(".lora_A.weight")}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_target_modules_every_adapted_layer_learns(family: str) -> None:
    model = tiny(family)
    parameters = attached(model)
    ids = torch.randint(3, 50, (2, 8))
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    model.train()(input_ids=ids, **more)[0].float().pow(2).sum().backward()
    still = [
        key for key, p in parameters.items() if "lora_B" in key and "pooler" not in key and not _has_gradient(p)
    ]  # a pooler is not part of the last hidden state
    assert parameters
    assert not still


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", [family for family in FAMILIES if family in PEFT_DEFAULTS])
def test_the_default_is_that_of_peft(family: str) -> None:
    model = tiny(family, "meta")
    inject_adapter_in_model(LoraConfig(r=4, target_modules=PEFT_DEFAULTS[family]), model)
    theirs = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert layers(attached(tiny(family, "meta"))) == theirs


@pytest.mark.parametrize("family", ["distilbert", "olmo2", "phi3", "modernbert", "granite"])
def test_without_a_default_of_peft_all_linear_layers_are_adapted(family: str) -> None:
    model = tiny(family, "meta")
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    assert family not in PEFT_DEFAULTS
    assert layers(attached(model)) == linear


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "t5", "bert"])
def test_an_adapter_at_its_start_changes_no_output(family: str) -> None:
    model = tiny(family).eval()
    ids = torch.randint(3, 50, (2, 8))
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    before = model(input_ids=ids, **more)[0]
    parameters = attached(model, AdapterSettings(4, target_modules="all-linear"))
    with torch.no_grad():
        for key, parameter in parameters.items():
            if "lora_B" in key:
                parameter.zero_()
        torch.testing.assert_close(model(input_ids=ids, **more)[0], before)
        parameters[next(key for key in parameters if "lora_B" in key)].fill_(1.0)
        assert not torch.equal(model(input_ids=ids, **more)[0], before)
