"""Tiny configurations of model families of Transformers, by model type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests import conftest

SIZES = {**conftest.SIZES, "bos_token_id": 2, "eos_token_id": 8}
NOTHING_MORE: dict[str, Any] = {}
NO_POSITIONS = {"max_position_embeddings": None}  # None leaves a size out
NO_LAYERS = {"num_hidden_layers": None}
GROUPED = {"num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
BART = {
    "d_model": 16,
    **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
    "decoder_start_token_id": 8,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
XLM = {"emb_dim": 16, "n_layers": 2, "n_heads": 2}
MAMBA = {
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
}
FUNNEL = {
    "block_sizes": [1, 1],
    "d_model": 16,
    "n_head": 2,
    "d_head": 8,
    "d_inner": 32,
    "architectures": ["FunnelModel"],
}
FEW_POSITIONS = {"max_position_embeddings": 66}  # two are of the padding
SPARSE = {**EXPERTS, **HEADS}
ENCODERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "electra", "deberta", "deberta-v2", "albert", "ernie", "megatron-bert"), NOTHING_MORE),
    **dict.fromkeys(("convbert", "nystromformer", "rembert", "roformer", "yoso", "mra"), NOTHING_MORE),
    **dict.fromkeys(("layoutlm", "splinter", "fnet", "visual_bert"), NOTHING_MORE),
    **dict.fromkeys(
        ("roberta", "xlm-roberta", "camembert", "mpnet", "data2vec-text", "xlm-roberta-xl", "ibert", "esm"),
        FEW_POSITIONS,
    ),
    "roberta-prelayernorm": FEW_POSITIONS,
    "xmod": {**FEW_POSITIONS, "default_language": "en_XX"},
    "big_bird": {"attention_type": "original_full"},
    "longformer": {"attention_window": 8, "max_position_embeddings": 66},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 8},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "squeezebert": {"embedding_size": 16},
    "distilbert": {"hidden_dim": 32},
    "modernbert": {"cls_token_id": 2, "sep_token_id": 3},
    "eurobert": GROUPED,
    "flaubert": XLM,
    "xlm": XLM,
    "xlnet": {**NO_POSITIONS, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
    "funnel": {
        **NO_POSITIONS,
        **NO_LAYERS,
        "block_sizes": [1, 1],
        "d_model": 16,
        "n_head": 2,
        "d_head": 8,
        "d_inner": 32,
    },
}
LED = ("max_encoder_position_embeddings", "max_decoder_position_embeddings")
SEQ2SEQ: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("t5", "mt5", "umt5"), T5),
    **dict.fromkeys(("bart", "mbart", "mvp", "plbart", "pegasus"), BART),
    "led": {
        **BART,
        "attention_window": 8,
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64,
    },
}
JAMBA = {"num_experts": 2, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1}
DECODERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("gpt_neox", "bloom", "falcon", "phi", "gpt_bigcode", "persimmon", "biogpt"), NOTHING_MORE),
    **dict.fromkeys(("llama", "mistral", "qwen2", "phi3", "olmo", "olmo2", "granite", "cohere", "smollm3"), GROUPED),
    **dict.fromkeys(("stablelm", "starcoder2", "nemotron", "arcee", "diffllama", "ernie4_5", "bitnet"), GROUPED),
    **dict.fromkeys(("cohere2", "apertus", "ministral", "exaone4", "seed_oss", "hunyuan_v1_dense"), HEADS),
    **dict.fromkeys(("qwen3", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "helium", "doge"), HEADS),
    **dict.fromkeys(("mixtral", "granitemoe", "phimoe", "minimax", "gpt_oss"), SPARSE),
    "gpt2": {"n_inner": 32},
    "openai-gpt": {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4, "n_head": 4, "num_attention_heads": 4},
    "ctrl": {"dff": 32},
    "mpt": {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "xglm": {"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 32},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, **HEADS},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, **GROUPED},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, **GROUPED},
    "jetmoe": {"kv_channels": 8, "num_key_value_heads": 2, **EXPERTS},
    "deepseek_v3": {**LATENT, **ROUTED, **GROUPED, "num_experts_per_tok": 2},
    "deepseek_v2": {**LATENT, **ROUTED, **GROUPED, "num_experts_per_tok": 2},
    "dots1": {**ROUTED, "n_shared_experts": 1, **HEADS, "num_experts_per_tok": 2},
    "llama4_text": {**HEADS, **EXPERTS, "intermediate_size_mlp": 32},
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "falcon_mamba": {"state_size": 4, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 8, "n_groups": 1, "expand": 2},
    "rwkv": {"attention_hidden_size": 16, "context_length": 64},
    "recurrent_gemma": {"lru_width": 16, "block_types": ["recurrent", "attention"], **HEADS},
    "jamba": {
        **GROUPED,
        **EXPERTS,
        "num_experts": 2,
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "bamba": {**GROUPED, **MAMBA, "attn_layer_indices": [1]},
    "lfm2": {**GROUPED, "full_attn_idxs": [1], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False},
}
FAMILIES = {**ENCODERS, **SEQ2SEQ, **DECODERS}


def config_of(family: str) -> Any:
    """A configuration of width 16."""
    sizes = {**SIZES, **FAMILIES[family]}
    config = AutoConfig.for_model(family, **{key: value for key, value in sizes.items() if value is not None})
    config.architectures = ["FunnelModel"] if family == "funnel" else None  # one of two backbones
    return config


def backbone(family: str) -> Any:
    """A model of a family without an output layer."""
    return AutoModel.from_config(config_of(family))


def save_tiny(family: str, folder: Path) -> Path:
    """Write a random model of a family, whose weights are large enough for an adapter to matter, and a tokenizer."""
    torch.manual_seed(0)
    kind = AutoModelForCausalLM if family in DECODERS and family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModel
    model = kind.from_config(config_of(family))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    conftest._tokenizer(folder, chat=False)
    if family in SEQ2SEQ:
        append_end(folder)
    return folder


def append_end(folder: Path) -> None:
    """Make the tokenizer append its end token, as those of encoder-decoders do."""
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    pair = f"$A {end[0]} $B {end[0]}"
    post = TemplateProcessing(single=f"$A {end[0]}", pair=pair, special_tokens=[end])
    tokenizer.backend_tokenizer.post_processor = post
    tokenizer.save_pretrained(folder)
