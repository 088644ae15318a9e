"""The network that is trained is the one that stock Transformers and PEFT load from an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from colora.common.adapters.fit import check_fit
from colora.common.config.schema import AdapterSettings, ModelSettings, Plan, PrivateSettings
from colora.common.errors import ModelError
from colora.common.models.architecture import check_stock_model, stock_model
from colora.common.models.base_model import load_base_model

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64}
SMALL = {**WIDE, "num_key_value_heads": 2, "head_dim": 8}
LINEAR = {f"linear_{name}": n for name, n in {"num_key_heads": 2, "num_value_heads": 2, "key_head_dim": 8}.items()}
QWEN = {**SMALL, **LINEAR, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
LLAMA4 = {**SMALL, "intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1}
FUNNEL = {"vocab_size": 64, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64}
SAME = {  # family and task whose full model has the backbone of AutoModel, apart from a pooler
    "bert": ("BertConfig", WIDE, "classification"),
    "roberta": ("RobertaConfig", WIDE, "classification"),
    "llama": ("LlamaConfig", SMALL, "classification"),
    "qwen3": ("Qwen3Config", SMALL, "generation"),
    "gpt2": ("GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, "generation"),
}
OTHER = {
    "funnel": ("FunnelConfig", {**FUNNEL, "architectures": ["FunnelModel"]}, "classification"),
    "llama4_text": ("Llama4TextConfig", LLAMA4, "generation"),
    "qwen3_5": ("Qwen3_5Config", {"text_config": QWEN}, "generation"),
}


def saved(folder: Path, config: str, options: dict[str, Any]) -> ModelSettings:
    if not hasattr(transformers, config):
        pytest.skip(f"this version of Transformers has no {config}")
    getattr(transformers, config)(**options).save_pretrained(folder)
    return ModelSettings(str(folder), max_length=16)


@pytest.mark.parametrize("family", SAME)
def test_a_family_whose_full_model_has_the_same_network_is_accepted(family: str, tmp_path: Path) -> None:
    config, options, task = SAME[family]
    check_stock_model(saved(tmp_path, config, options), task, frozenset(), "adapter")


@pytest.mark.parametrize("family", OTHER)
def test_a_family_whose_full_model_has_another_network_is_refused_by_name(family: str, tmp_path: Path) -> None:
    config, options, task = OTHER[family]
    with pytest.raises(ModelError, match=f"Models of the family {family} cannot be used for {task}"):
        check_stock_model(saved(tmp_path, config, options), task, frozenset(), "adapter")


def test_a_model_without_an_attention_mask_is_refused(tmp_path: Path) -> None:
    settings = saved(tmp_path, "FNetConfig", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1})
    with pytest.raises(ModelError, match="without an attention mask they read padding as text"):
        check_stock_model(settings, "classification", frozenset(), "adapter")


def test_an_architecture_without_a_classifier_is_named(tmp_path: Path) -> None:
    settings = saved(tmp_path, "Qwen2VLConfig", {"text_config": SMALL})
    sentence = r"no AutoModelForSequenceClassification for the base model's architecture \(qwen2_vl\)"
    with pytest.raises(ModelError, match=sentence):
        stock_model(settings, "classification", 2)


@pytest.fixture
def roberta(tiny_bert: Path, tmp_path: Path) -> Path:
    """A RoBERTa, whose pooler the classifier does not have."""
    import shutil

    folder = shutil.copytree(tiny_bert, tmp_path / "roberta")
    config = transformers.RobertaConfig(**WIDE, pad_token_id=0, max_position_embeddings=70)
    transformers.RobertaModel(config).save_pretrained(folder)
    return folder


def test_an_adapter_on_a_layer_that_the_export_does_not_have_is_refused(roberta: Path) -> None:
    def plan(*targets: str, private: tuple[str, ...] | None = None) -> Plan:
        kind = PrivateSettings("lora", target_modules=private) if private else PrivateSettings("none")
        model, adapter = ModelSettings(str(roberta), max_length=16), AdapterSettings(4, target_modules=targets)
        return Plan("fed", 1, model, adapter=adapter, private=kind)

    dense = plan("query", "dense")
    with pytest.raises(ModelError, match=r"adapter\.target_modules selects pooler\.dense, which .* does not have"):
        check_fit(dense, ["classification"])
    private = plan("query", private=("dense",))
    with pytest.raises(ModelError, match=r"private\.target_modules selects pooler\.dense"):
        check_fit(private, ["classification"], [private.private])
    check_fit(plan("query", "output.dense"), ["classification"])


def test_a_site_refuses_such_an_adapter_before_it_trains(roberta: Path, tmp_path: Path) -> None:
    from colora.client.training.adapted_model import attach_adapters
    from colora.client.training.state_store import StateStore
    from colora.client.training.trainer import Trainer
    from colora.common.dataset import SiteDataset

    adapter = AdapterSettings(4, target_modules=("dense",))
    plan = Plan("fed", 1, ModelSettings(str(roberta), max_length=16), adapter=adapter)
    model = attach_adapters(load_base_model(plan.model, generates=False), plan)
    rows = [{"text": "red cat", "label": "x"}, {"text": "blue dog", "label": "y"}]
    site = SiteDataset("ada", "classification", rows, rows, ("x", "y"))
    with pytest.raises(ModelError, match=r"pooler\.dense"):
        Trainer(model, site, StateStore(tmp_path / "state", "fed"))
