"""The CoLoRA core equals its formula h = W0 x + s · B Λ A x, computed from the layer's own values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from colora.client.training.adapted_model import attach_adapters
from colora.client.training.state_store import StateStore
from colora.client.training.trainer import Trainer
from colora.common.adapters.core import CORE_FORMS
from colora.common.adapters.initialization import initial_shared_state, initial_values
from colora.common.adapters.inject import attach, layout_of
from colora.common.config.schema import AdapterSettings, MethodSettings, ModelSettings, Plan
from colora.common.dataset import SiteDataset
from colora.common.errors import ModelError
from colora.common.methods import METHODS, SHARED, group_of
from colora.common.models.base_model import load_base_model

RANK, ALPHA, D_IN, D_OUT = 3, 6.0, 7, 5
FORMS = tuple(CORE_FORMS)
SMALL = AdapterSettings(RANK, ALPHA, target_modules=("query",))
TIGHT = 1e-10  # double precision: a wrong formula is off by far more


class Toy(nn.Module):
    """A model of one 7 → 5 layer, with the name of BERT's queries."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(D_IN, D_OUT)
        self.requires_grad_(False)


def toy(form: str, *, rslora: bool = False, dropout: float = 0.0) -> tuple[Any, dict[str, nn.Parameter]]:
    """Return a LoRA layer with a core of ``form``, and its random parameters by group, in double precision."""
    torch.manual_seed(0)
    model = Toy()
    settings = AdapterSettings(RANK, ALPHA, dropout, ("query",), core=form, rslora=rslora)  # type: ignore[arg-type]
    parameters = {group_of(key): p for key, p in attach(model, settings, METHODS["colora"]).items()}
    model.double()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(draw(*parameter.shape))
    return model.query.eval(), parameters


def matrix(form: str, core: torch.Tensor) -> torch.Tensor:
    """Return Λ: the full matrix, a diagonal matrix, or I + Λ'."""
    forms = {"full": lambda: core, "diagonal": core.diag, "residual": lambda: torch.eye(RANK).double() + core}
    return forms[form]()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def by_hand(layer: Any, group: dict[str, nn.Parameter], form: str, scale: float, x: torch.Tensor) -> torch.Tensor:
    base = layer.get_base_layer()
    delta = scale * group["B"] @ matrix(form, group["core"]) @ group["A"]
    return x @ (base.weight + delta).T + base.bias


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forward_is_w0_x_plus_s_b_core_a_x(form: str, rslora: bool) -> None:
    layer, group = toy(form, rslora=rslora)
    scale = ALPHA / math.sqrt(RANK) if rslora else ALPHA / RANK
    x = draw(4, 2, D_IN)
    torch.testing.assert_close(layer(x), by_hand(layer, group, form, scale, x), rtol=0, atol=TIGHT)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_formula(form: str) -> None:
    layer, group = toy(form)
    x, weight = draw(6, D_IN), draw(6, D_OUT)
    mine = torch.autograd.grad((layer(x) * weight).sum(), list(group.values()))
    theirs = torch.autograd.grad((by_hand(layer, group, form, ALPHA / RANK, x) * weight).sum(), list(group.values()))
    for key, own, reference in zip(group, mine, theirs, strict=True):
        torch.testing.assert_close(own, reference, rtol=0, atol=TIGHT, msg=f"gradient of {key}")


@pytest.mark.parametrize("form", FORMS)
def test_the_core_has_r_squared_numbers_or_r_of_them(form: str) -> None:
    _, group = toy(form)
    assert tuple(group["core"].shape) == ((RANK,) if form == "diagonal" else (RANK, RANK))
    assert tuple(group["A"].shape) == (RANK, D_IN)
    assert tuple(group["B"].shape) == (D_OUT, RANK)


@pytest.mark.parametrize("form", FORMS)
def test_at_its_initial_values_the_adapter_changes_no_bit(form: str) -> None:
    layer, group = toy(form)
    settings = AdapterSettings(RANK, ALPHA, core=form)  # type: ignore[arg-type]
    values = initial_values({f"query.lora_{k}": tuple(p.shape) for k, p in group.items()}, settings, seed=1)
    with torch.no_grad():
        for key, parameter in group.items():
            parameter.copy_(values[f"query.lora_{key}"])
    x = draw(4, D_IN)
    assert torch.equal(layer(x), layer.get_base_layer()(x))
    assert torch.equal(matrix(form, group["core"]), torch.eye(RANK).double())


def test_an_identity_core_is_plain_lora_to_the_bit() -> None:
    """With Λ = I, whatever A and B are, a site that joins late starts from exactly the shared model."""
    x = draw(4, D_IN)
    for form in FORMS:
        layer, group = toy(form)
        with torch.no_grad():
            group["core"].copy_(CORE_FORMS[form].initial(RANK))
        plain = layer.get_base_layer()(x) + (x @ group["A"].T) @ group["B"].T * (ALPHA / RANK)
        assert torch.equal(layer(x), plain), form


def test_a_lies_within_kaimings_bounds_and_b_is_zero() -> None:
    layout = {"x.lora_A.weight": (64, 100), "x.lora_B.weight": (50, 64)}
    values = initial_values(layout, AdapterSettings(), seed=0)
    bound = math.sqrt(6 / ((1 + 5) * 100))  # √(6 / ((1 + a²) fan_in)), a = √5
    a = values["x.lora_A.weight"]
    assert 0.98 * bound < a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)  # of a uniform distribution
    assert not values["x.lora_B.weight"].any()


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    settings = AdapterSettings()
    one = {"p.lora_A.weight": (4, 8), "q.lora_A.weight": (4, 8), "head.classifier.weight": (3, 8)}
    other = {
        "head.classifier.weight": (3, 8),
        "new.lora_A.weight": (2, 9),
        "q.lora_A.weight": (4, 8),
        "p.lora_A.weight": (4, 8),
    }
    first = initial_values(one, settings, 7)
    torch.manual_seed(123)  # the global generator must not matter
    second = initial_values(other, settings, 7)
    assert all(torch.equal(first[key], second[key]) for key in one)
    assert not torch.equal(first["p.lora_A.weight"], first["q.lora_A.weight"])
    assert not torch.equal(first["p.lora_A.weight"], initial_values(one, settings, 8)["p.lora_A.weight"])


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_merging_equals_forward_and_unmerging_restores(form: str, safe: bool) -> None:
    layer, _ = toy(form)
    x, before = draw(4, D_IN), layer.get_base_layer().weight.clone()
    apart = layer(x)
    layer.merge(safe_merge=safe)
    assert layer.merged
    together = layer.get_base_layer()(x)  # the merged weight alone
    torch.testing.assert_close(together, apart, rtol=0, atol=TIGHT)
    layer.unmerge()
    torch.testing.assert_close(layer.get_base_layer().weight, before, rtol=0, atol=TIGHT)
    torch.testing.assert_close(layer(x), apart, rtol=0, atol=TIGHT)


def test_a_safe_merge_refuses_a_broken_core() -> None:
    layer, group = toy("full")
    before = layer.get_base_layer().weight.clone()
    with torch.no_grad():
        group["core"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)


@pytest.mark.parametrize("form", ["full", "residual"])
def test_the_gauge_changes_factors_and_no_output(form: str) -> None:
    """(B, A, Λ) and (B P, Q A, P⁻¹ Λ Q⁻¹) are the same model; only a full matrix Λ can absorb P and Q."""
    layer, group = toy(form)
    x = draw(4, D_IN)
    before = layer(x)
    p, q = (torch.linalg.qr(draw(RANK, RANK))[0] * 1.5 for _ in range(2))
    moved = torch.linalg.inv(p) @ matrix(form, group["core"]) @ torch.linalg.inv(q)
    with torch.no_grad():
        group["B"].copy_(group["B"] @ p)
        group["A"].copy_(q @ group["A"])
        group["core"].copy_(moved - torch.eye(RANK).double() if form == "residual" else moved)
    torch.testing.assert_close(layer(x), before, rtol=0, atol=TIGHT)


def test_dropout_acts_on_the_input_of_a_in_training_only() -> None:
    layer, group = toy("full", dropout=0.5)
    x = draw(64, D_IN)
    quiet = layer(x)
    layer.train()
    torch.manual_seed(5)
    loud = layer(x)
    torch.manual_seed(5)
    dropped = torch.nn.functional.dropout(x, 0.5)
    delta = ALPHA / RANK * group["B"] @ group["core"] @ group["A"]
    torch.testing.assert_close(loud, layer.get_base_layer()(x) + dropped @ delta.T, rtol=0, atol=TIGHT)
    assert not torch.equal(loud, quiet)


@pytest.mark.parametrize("method", [MethodSettings("fedit"), MethodSettings("colora", core="absent")])
def test_a_method_without_core_is_plain_lora(method: MethodSettings) -> None:
    """No core is attached, whether the method has none or the recipe drops it."""
    torch.manual_seed(0)
    model: Any = Toy()
    parameters = {group_of(key): p for key, p in attach(model, SMALL, method.row()).items()}
    assert set(parameters) == {"A", "B"}
    model.double()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(draw(*parameter.shape))
    x = draw(4, D_IN)
    delta = SMALL.alpha / RANK * parameters["B"] @ parameters["A"]
    expected = model.query.get_base_layer()(x) + x @ delta.T
    torch.testing.assert_close(model.query(x), expected, rtol=0, atol=TIGHT)


def test_errors_name_a_rank_beyond_the_layer_and_unknown_targets() -> None:
    with pytest.raises(ModelError, match=r"adapter\.rank must be at most 5 for the layer query, not 6"):
        attach(Toy(), AdapterSettings(6, target_modules=("query",)), METHODS["colora"])
    with pytest.raises(ModelError, match=r"adapter\.target_modules = \[.nowhere.\] matches no linear layer .*query"):
        attach(Toy(), AdapterSettings(2, target_modules=("nowhere",)), METHODS["colora"])


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.shares])
def test_s0_from_the_meta_device_is_what_the_site_computes(tiny_bert: Path, tmp_path: Path, name: str) -> None:
    """The coordinator, without weights, and the site, with the whole model, start from the same bits and layout."""
    adapter = AdapterSettings(4, target_modules=("query", "value"))
    model, method = ModelSettings(str(tiny_bert), max_length=16), MethodSettings(name)
    plan = Plan("start", 1, model, seed=5, adapter=adapter, method=method)
    rows = [{"text": "red cat", "label": "p"}, {"text": "blue dog", "label": "q"}]
    bench = attach_adapters(load_base_model(plan.model, generates=False), plan)
    site = Trainer(bench, SiteDataset("ada", "classification", rows, rows, ("p", "q")), StateStore(tmp_path, "start"))
    coordinator = initial_shared_state(plan)
    assert {key: value.shape for key, value in coordinator.items()} == site.layout
    assert site.layout == bench.plan.row().having(layout_of(site.parameters), SHARED)
    for key, value in coordinator.items():
        assert value.dtype == np.float32
        assert np.array_equal(value, site.initial[key].numpy()), key


def test_s0_of_a_shared_head_is_what_the_site_computes(tiny_bert: Path, tmp_path: Path) -> None:
    adapter = AdapterSettings(4, target_modules=("query", "value"))
    model, method = ModelSettings(str(tiny_bert), max_length=16), MethodSettings("fedit", head="shared")
    plan = Plan("start", 1, model, seed=5, adapter=adapter, method=method)
    rows = [{"text": "red cat", "label": "p"}, {"text": "blue dog", "label": "q"}, {"text": "sun", "label": "r"}]
    bench = attach_adapters(load_base_model(plan.model, generates=False), plan)
    site = Trainer(
        bench, SiteDataset("ada", "classification", rows, rows, ("p", "q", "r")), StateStore(tmp_path, "start")
    )
    coordinator = initial_shared_state(plan, classes=3)
    assert {"head.classifier.weight", "head.classifier.bias"} < set(coordinator)
    assert set(coordinator) == set(site.layout)
    assert all(np.array_equal(value, site.initial[key].numpy()) for key, value in coordinator.items())
