"""``target_modules`` and the keys beside it: what they choose, what they leave out, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from colora.common.adapters import targets
from colora.common.adapters.factors import factors_of
from colora.common.adapters.initialization import initial_values
from colora.common.adapters.inject import attach, inject, layout_of, private_spec
from colora.common.config.schema import AdapterSettings, ModelSettings, Plan, PrivateSettings
from colora.common.errors import ModelError
from colora.common.methods import METHODS
from tests.families import backbone

from .test_families import layers, tiny

QUERIES = {f"encoder.layer.{block}.attention.self.query" for block in (0, 1)}
VALUES = {f"encoder.layer.{block}.attention.self.value" for block in (0, 1)}


def chosen(family: str = "bert", method: str = "colora", **settings: Any) -> set[str]:
    return layers(attach(tiny(family, "meta"), AdapterSettings(4, **settings), METHODS[method]))


def refusal(family: str = "bert", **settings: Any) -> str:
    with pytest.raises(ModelError) as caught:
        chosen(family, **settings)
    return str(caught.value)


# --- what stock PEFT loads ---


@pytest.mark.parametrize("family", ["deepseek_v3", "dots1"])
def test_layers_that_peft_takes_for_experts_get_no_adapter(family: str) -> None:
    """It would load no adapter there, and say so in a warning only."""
    with torch.device("meta"):
        model = backbone(family)
    names = layers(attach(model, AdapterSettings(4), METHODS["colora"]))
    assert {name.rpartition(".")[2] for name in names} & {"q_proj", "q_b_proj"}
    assert not [name for name in names if ".mlp." in name]
    with torch.device("meta"):
        model = backbone(family)
    with pytest.raises(ModelError, match=r"PEFT takes layers\.0\.mlp\.down_proj of .* for fused experts"):
        attach(model, AdapterSettings(4, target_modules=("down_proj",)), METHODS["colora"])


@pytest.mark.parametrize("family", ["camembert", "mpnet", "longformer"])
def test_all_linear_leaves_out_a_pooler_that_the_classifier_lacks(family: str) -> None:
    """Otherwise a recipe that names no layer would be refused for one of them."""
    with torch.device("meta"):
        model = backbone(family)
    assert dict(model.named_modules())["pooler.dense"] is not None
    assert "pooler.dense" not in layers(attach(model, AdapterSettings(4), METHODS["colora"]))
    assert "pooler.dense" in chosen("bert", target_modules="all-linear"), "which its classifier reads"


# --- names ---


def test_names_are_endings_whole_names_or_an_expression() -> None:
    assert chosen(target_modules=("query",)) == QUERIES
    assert chosen(target_modules=("encoder.layer.0.attention.self.query",)) == {min(QUERIES)}
    assert chosen(target_modules=r".*\.(query|value)") == QUERIES | VALUES


def test_a_name_that_matches_nothing_is_refused_although_others_match() -> None:
    message = refusal(target_modules=("query", "valeu"))
    assert "adapter.target_modules has 'valeu', which matches no linear layer" in message
    assert "Did you mean 'value'?" in message


def test_conv1d_layers_are_named_and_adapted() -> None:
    assert "c_attn, c_fc, c_proj" in refusal("gpt2", target_modules=("q_proj",))
    assert chosen("gpt2", target_modules=("mlp.c_proj",)) == {"h.0.mlp.c_proj", "h.1.mlp.c_proj"}


def test_a_layer_of_another_type_is_refused_by_name() -> None:
    assert "word_embeddings is of type Embedding" in refusal(target_modules=("query", "word_embeddings"))


def test_a_layer_whose_weight_a_kernel_reads_is_refused_with_the_reason() -> None:
    message = refusal("mamba2", target_modules=("in_proj", "out_proj"))
    assert "an adapter on layers.0.mixer.out_proj has no effect in a mamba2 model" in message


def test_a_layer_beside_experts_is_adapted_under_its_own_name() -> None:
    """PEFT would replace names such as gate_proj by the fused weights of the experts."""
    names = ("self_attn.q_proj", "self_attn.o_proj")
    assert chosen("qwen3_moe", target_modules=names) == {
        f"layers.{block}.self_attn.{leaf}" for block in (0, 1) for leaf in ("q_proj", "o_proj")
    }


# --- all-linear ---


def test_all_linear_leaves_out_routers_and_unknown_types_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    targets._log_once.cache_clear()
    found = chosen("mixtral", target_modules="all-linear")
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    (line,) = [record.getMessage() for record in caplog.records if record.name == "colora.adapters"]
    assert "layers.0.mlp.gate, layers.1.mlp.gate (of type MixtralTopKRouter)" in line
    assert "layers.0.mlp.experts, layers.1.mlp.experts (of type MixtralExperts)" in line
    caplog.clear()
    chosen("mixtral", target_modules="all-linear")
    assert not caplog.records, "once per process"


class Experts(nn.Module):
    """A linear router beside its experts, and a layer of width 2."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)])
        self.narrow = nn.Linear(8, 2)


def test_all_linear_leaves_out_a_linear_router_and_layers_narrower_than_the_rank() -> None:
    settings = AdapterSettings(4, target_modules="all-linear")
    assert layers(attach(Experts(), settings, METHODS["fedit"])) == {"experts.0"}
    named = dataclasses.replace(settings, target_modules=("router",))
    assert layers(attach(Experts(), named, METHODS["fedit"])) == {"router"}
    with pytest.raises(ModelError, match=r"adapter.rank must be at most 2 for the layer narrow, not 4"):
        attach(Experts(), dataclasses.replace(settings, target_modules=("narrow",)), METHODS["fedit"])
    with pytest.raises(ModelError, match=r"adapter.rank must be at most 8 for the layer experts.0, not 9"):
        attach(Experts(), dataclasses.replace(settings, rank=9), METHODS["fedit"])


# --- the keys beside target_modules ---


def test_excluded_modules_get_no_adapter() -> None:
    both = ("query", "value")
    assert chosen(target_modules=both, exclude_modules=("layer.0.attention.self.query", "value")) == {max(QUERIES)}
    assert chosen(target_modules=both, exclude_modules=r"encoder\.layer\.1\..*") == {min(QUERIES), min(VALUES)}
    assert chosen(exclude_modules=("value",)) == QUERIES, "of the default, too"
    assert not [name for name in chosen(target_modules="all-linear", exclude_modules=("dense",)) if "dense" in name]


def test_the_blocks_to_transform_are_the_first_number_of_a_name() -> None:
    assert chosen(target_modules=("query", "value"), layers_to_transform=(1,)) == {max(QUERIES), max(VALUES)}
    assert chosen("llama", layers_to_transform=0) == {"layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"}


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"exclude_modules": ("key",)}, "adapter.exclude_modules has 'key', which matches no target layer"),
        ({"exclude_modules": ".*key"}, "adapter.exclude_modules has '.*key'"),
        ({"exclude_modules": "("}, "adapter.exclude_modules has '('"),
        ({"exclude_modules": ("query", "value")}, "leave no layer"),
        ({"layers_to_transform": (0, 2)}, "adapter.layers_to_transform has 2, but no target layer"),
        ({"rank_pattern": {"kwery": 2}}, "adapter.rank_pattern has 'kwery', which matches no target layer"),
        ({"alpha_pattern": {"(": 2.0}}, "adapter.alpha_pattern has '('"),
        ({"rank_pattern": {"value": 17}}, "adapter.rank must be at most 16"),
    ],
)
def test_a_key_without_effect_is_refused(settings: dict[str, Any], part: str) -> None:
    assert part in refusal(target_modules=("query", "value"), **settings)


def test_patterns_give_layers_their_own_rank_and_scale() -> None:
    """ΔW = alpha/r · B Λ A with the rank and alpha of the layer, in the forward pass and in the export's factors."""
    settings = AdapterSettings(
        4, 8.0, target_modules=("query", "value"), rank_pattern={"query": 2}, alpha_pattern={"layer.1.*value": 24.0}
    )
    model: Any = tiny("bert").eval()
    parameters = attach(model, settings, METHODS["colora"])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn_like(parameter))
    scales = {min(QUERIES): 8 / 2, max(QUERIES): 8 / 2, min(VALUES): 8 / 4, max(VALUES): 24 / 4}
    factors = factors_of(parameters, Plan("p", 1, ModelSettings("m"), adapter=settings))
    for name, scale in scales.items():
        a, b, core = (parameters[f"{name}.{leaf}"] for leaf in ("lora_A.weight", "lora_B.weight", "lora_core"))
        assert a.shape[0] == (2 if name in QUERIES else 4)
        assert tuple(core.shape) == (a.shape[0], a.shape[0])
        delta = scale * b @ core @ a
        x, layer = torch.randn(3, 16), model.get_submodule(name)
        torch.testing.assert_close(layer(x), layer.get_base_layer()(x) + x @ delta.T)
        product = factors[name][0] @ factors[name][1]
        torch.testing.assert_close(product.float(), delta)


def test_a_private_adapter_is_on_the_layers_of_the_shared_one() -> None:
    model = tiny("bert", "meta")
    shared = AdapterSettings(4, exclude_modules=("value",), layers_to_transform=1)
    attach(model, shared, METHODS["colora"])
    private = inject(model, private_spec(PrivateSettings("lora"), shared), "private")
    assert layers(private) == {f"private.{max(QUERIES)}"}


def test_a_merged_conv1d_layer_computes_what_it_did_apart() -> None:
    model: Any = tiny("gpt2").eval()
    parameters = attach(model, AdapterSettings(4), METHODS["colora"])
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn_like(parameter))
        layer, x = model.h[0].attn.c_attn, torch.randn(3, 16)
        apart = layer(x)
        layer.merge()
        torch.testing.assert_close(layer.get_base_layer()(x), apart, rtol=1e-4, atol=1e-3)


# --- initial values ---


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
@pytest.mark.parametrize("core", ["full", "diagonal", "residual"])
def test_every_start_changes_nothing(init: Any, core: Any) -> None:
    settings = AdapterSettings(4, target_modules=("query", "value"), init=init, core=core, rank_pattern={"value": 2})
    model = tiny("bert").eval()
    ids = torch.randint(3, 50, (2, 8))
    before = model(input_ids=ids)[0]
    parameters = attach(model, settings, METHODS["colora"])
    values = initial_values(layout_of(parameters), settings, seed=3)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(values[key])
        torch.testing.assert_close(model(input_ids=ids)[0], before, rtol=0, atol=1e-5)


def test_gaussian_and_orthogonal_values_are_distributed_as_in_peft() -> None:
    layout = {"x.lora_A.weight": (8, 400), "x.lora_B.weight": (300, 8), "x.lora_core": (8, 8)}
    gaussian = initial_values(layout, AdapterSettings(8, init="gaussian"), seed=0)
    assert gaussian["x.lora_A.weight"].std().item() == pytest.approx(1 / 8, rel=0.05)
    assert not gaussian["x.lora_B.weight"].any()
    orthogonal = initial_values(layout, AdapterSettings(8, init="orthogonal"), seed=0)
    a, b = orthogonal["x.lora_A.weight"], orthogonal["x.lora_B.weight"]
    assert (b @ a).abs().max() < 1e-6
    assert torch.linalg.matrix_rank(a) == torch.linalg.matrix_rank(b) == 4
    for factor in (a, b):  # entries are N(0, ½) / 10: each is a sum over half a row of an orthogonal matrix
        assert factor.std().item() == pytest.approx(0.5**0.5 / 10, rel=0.1)


def test_a_private_adapter_starts_at_zero_whatever_the_shared_one_does() -> None:
    layout = {"private.x.lora_A.weight": (2, 8), "private.x.lora_B.weight": (8, 2)}
    kaiming, orthogonal = (
        initial_values(layout, AdapterSettings(4, init=init), 0) for init in ("kaiming", "orthogonal")
    )
    assert all(torch.equal(kaiming[key], orthogonal[key]) for key in layout)
