"""MultiLoRA equals its formula h = W0 x + s · Σ_i s_i ⊙ B_i A_i x, summed module by module."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from colora.common.adapters.factors import difference, factors_of, padded
from colora.common.adapters.initialization import initial_values
from colora.common.adapters.inject import activate, attach, inject, layout_of, private_spec
from colora.common.config.schema import (
    AdapterSettings,
    MethodSettings,
    ModelSettings,
    Plan,
    PrivateSettings,
    TrainSettings,
)
from colora.common.errors import ModelError
from colora.common.methods import METHODS
from colora.common.training.loop import make_optimizer

D_IN, D_OUT, RANK, MODULES, ALPHA = 11, 7, 2, 3, 6.0
SETTINGS = AdapterSettings(RANK, ALPHA, target_modules=("query",), modules=MODULES)
LAYER = "query"


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query = nn.Linear(D_IN, D_OUT)
        self.requires_grad_(False)


def toy(*, random: bool = True) -> tuple[Toy, dict[str, nn.Parameter]]:
    """Return a toy with MultiLoRA on its layer, with random values or those of step 0."""
    model = Toy()
    parameters = attach(model, SETTINGS, METHODS["multilora"])
    start = initial_values(layout_of(parameters), SETTINGS, seed=1)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(torch.randn(parameter.shape) if random else start[key])
    return model, parameters


def by_hand(model: Toy, values: dict[str, nn.Parameter], x: torch.Tensor) -> torch.Tensor:
    """Return the sum over modules."""
    a, b, scale = (values[f"{LAYER}.{leaf}"] for leaf in ("lora_A.weight", "lora_B.weight", "lora_scale"))
    h = model.query.base_layer(x)  # type: ignore[operator]
    for i in range(MODULES):
        part = slice(i * RANK, (i + 1) * RANK)
        h = h + ALPHA / RANK * scale[i] * (x @ a[part].T @ b[:, part].T)
    return h


def test_one_pass_is_the_sum_of_its_modules() -> None:
    model, values = toy()
    x = torch.randn(4, D_IN)
    assert torch.allclose(model.query(x), by_hand(model, values, x), atol=1e-5, rtol=1e-6)
    model.double()
    assert torch.allclose(model.query(x.double()), by_hand(model, values, x.double()), atol=1e-12)


def test_it_starts_as_the_base_model_and_only_the_scales_have_a_gradient() -> None:
    model, values = toy(random=False)
    x = torch.randn(4, D_IN)
    assert torch.equal(model.query(x), model.query.base_layer(x))  # type: ignore[operator]
    for parameter in values.values():
        parameter.requires_grad_(True)
    model.query(x).square().sum().backward()
    gradients = {key.rpartition(f"{LAYER}.")[2]: p.grad for key, p in values.items()}
    assert gradients["lora_scale"].abs().min() > 0
    assert gradients["lora_A.weight"].abs().max() == gradients["lora_B.weight"].abs().max() == 0


def test_every_module_is_initialized_by_its_own_fan_in() -> None:
    big = {"q.lora_A.weight": (6, 4000), "q.lora_B.weight": (4000, 6), "q.lora_scale": (3, 4000)}
    values = initial_values(big, SETTINGS, seed=0)
    for i in range(3):
        a, b = values["q.lora_A.weight"][2 * i : 2 * i + 2], values["q.lora_B.weight"][:, 2 * i : 2 * i + 2]
        for drawn, fan_in in ((a, 4000), (b, 2)):
            bound = math.sqrt(6 / ((1 + 5) * fan_in))  # Kaiming-uniform with a = √5
            assert 0.99 * bound < drawn.abs().max() <= bound
    assert not values["q.lora_scale"].any()
    plain = initial_values({key: big[key] for key in list(big)[:2]}, SETTINGS, seed=0)
    assert not plain["q.lora_B.weight"].any(), "without scales it is a plain LoRA"


def test_the_factors_of_rank_nr_are_the_forward() -> None:
    model, values = toy()
    plan = Plan("a", 1, ModelSettings("x"), adapter=SETTINGS, method=MethodSettings("multilora"))
    (b, a) = padded(factors_of(dict(values), plan))[LAYER]
    assert a.shape == (MODULES * RANK, D_IN)
    x = torch.randn(5, D_IN)
    assert torch.allclose(model.query.base_layer(x) + x @ a.T @ b.T, model.query(x), atol=1e-5)  # type: ignore[operator]


def test_no_weight_decay_on_the_scales() -> None:
    _, values = toy()
    before = {key: value.detach().clone() for key, value in values.items()}
    for value in values.values():
        value.grad = torch.zeros_like(value)
    make_optimizer(values, TrainSettings(optimizer="sgd", lr=0.1, weight_decay=0.5)).step()
    assert torch.equal(values[f"{LAYER}.lora_scale"], before[f"{LAYER}.lora_scale"])
    assert torch.allclose(values[f"{LAYER}.lora_B.weight"], 0.95 * before[f"{LAYER}.lora_B.weight"])


@pytest.mark.parametrize("kind", ["lora", "multilora"])
def test_a_private_adapter_adds_to_the_shared_one_and_can_be_deactivated(kind: str) -> None:
    model = Toy()
    shared = attach(model, SETTINGS, METHODS["colora"])
    settings = PrivateSettings(kind, rank=1, modules=2, alpha=3.0)  # type: ignore[arg-type]
    private = inject(model, private_spec(settings, SETTINGS), "mine")
    other = inject(model, private_spec(settings, SETTINGS), "another")
    with torch.no_grad():
        for parameter in (*shared.values(), *private.values(), *other.values()):
            parameter.copy_(torch.randn(parameter.shape))
    x = torch.randn(3, D_IN)
    outputs = {}
    for names in (("shared",), ("mine",), ("shared", "mine"), ("shared", "another")):
        activate(model, names)
        outputs[names] = model.query(x) - model.query.base_layer(x)  # type: ignore[operator]
    assert torch.allclose(outputs["shared", "mine"], outputs["shared",] + outputs["mine",], atol=1e-5)
    assert not torch.allclose(outputs["shared", "mine"], outputs["shared", "another"])
    plan = Plan("a", 1, ModelSettings("x"), adapter=SETTINGS, private=settings)
    whole = factors_of({**shared, **private}, plan)
    b, a = whole[LAYER]
    assert torch.allclose((x.double() @ a.T @ b.T).float(), outputs["shared", "mine"], atol=1e-5)
    b, a = difference(whole, factors_of(shared, plan))[LAYER]
    assert torch.allclose((x.double() @ a.T @ b.T).float(), outputs["mine",], atol=1e-5)


def test_a_private_adapter_that_fits_no_layer_is_named() -> None:
    with pytest.raises(ModelError, match=r"private.target_modules = \[.nothing.\] matches no .* are query"):
        inject(Toy(), private_spec(PrivateSettings("lora", target_modules=("nothing",)), SETTINGS), "mine")
    with pytest.raises(ModelError, match=r"private.rank must be at most 7 for the layer query, not 9"):
        inject(Toy(), private_spec(PrivateSettings("multilora", rank=3), SETTINGS), "mine")
