"""A site's part in the spectral start, and the benefit ratio that it reports."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from colora.client.training.adapted_model import attach_adapters
from colora.client.training.benefit import benefit_ratio
from colora.client.training.spectral import power_step
from colora.client.training.state_store import StateStore
from colora.client.training.trainer import Trainer
from colora.common.config.schema import AdapterSettings, ModelSettings, Plan, TrainSettings, to_json
from colora.common.dataset import SiteDataset
from colora.common.models.base_model import load_base_model
from colora.common.models.synthetic import regression_rows, regression_truth
from colora.common.protocol.types import BENEFIT, Arrays, TrainReply, TrainRequest

A, B = "proj.lora_A.weight", "proj.lora_B.weight"


def plan(init: str = "kaiming", **train: object) -> Plan:
    settings = TrainSettings(**{"steps": 3, "batch_size": 30, "lr": 1e-2, **train})  # type: ignore[arg-type]
    adapter = AdapterSettings(3, 3.0, 0.0, ("proj",), init=init)  # type: ignore[arg-type]
    return Plan("tasks", 4, ModelSettings("synthetic:bilinear-20"), adapter=adapter, train=settings)


TRUTH = regression_truth(5, 2)


def site(made: Plan, folder: Path, rows: int = 60, task: int = 0) -> Trainer:
    drawn = regression_rows(TRUTH[task], rows, 0.1, seed=task)
    listed = [{"x": x, "y": y} for x, y in zip(drawn["x"], drawn["y"], strict=True)]
    model = attach_adapters(load_base_model(made.model, generates=False), made)
    return Trainer(model, SiteDataset("ada", "regression", listed, listed[:4]), StateStore(folder, made.name))


def request(made: Plan, shared: Arrays, kind: str = "train", t: int = 1) -> TrainRequest:
    return TrainRequest(made.name, t, kind, 0, to_json(made), shared, evaluate=False)  # type: ignore[arg-type]


def factors(left: np.ndarray, right: np.ndarray) -> dict[str, np.ndarray]:
    return {B: np.ascontiguousarray(left, np.float32), A: np.ascontiguousarray(right, np.float32)}


def test_a_trial_is_the_first_round_of_training_and_stores_nothing(tmp_path: Path) -> None:
    made, trainer = plan(), site(plan(), tmp_path / "one")
    start = {key: trainer.initial[key].numpy() for key in (A, B)}
    tried = [trainer.handle(request(made, start, "trial", 0)) for _ in range(2)]
    assert not (tmp_path / "one").exists() or not list((tmp_path / "one").rglob("*.safetensors"))
    trained = site(plan(), tmp_path / "other").handle(request(made, start))
    for reply in tried:
        assert all(np.array_equal(reply.shared[key], trained.shared[key]) for key in (A, B))
        assert (reply.terms, reply.examples, reply.metrics) == (trained.terms, trained.examples, {})
    assert np.array_equal(trainer.handle(request(made, start)).shared[B], trained.shared[B])


def common_subspaces() -> dict[str, np.ndarray]:
    u, _, v = np.linalg.svd(TRUTH[0])
    return factors(u[:, :3], v[:3])


def other_subspaces() -> dict[str, np.ndarray]:
    u, _, v = np.linalg.svd(TRUTH[0])
    return factors(u[:, 10:13], v[10:13])


# --- the spectral start ---


def test_a_power_step_is_that_of_the_gradient_calculated_by_hand(tmp_path: Path) -> None:
    made = plan("spectral")
    ada, shared = site(made, tmp_path), other_subspaces()
    reply = ada.handle(request(made, shared, "initialize", 0))
    x = np.stack([row["x"] for row in ada.task.rows.train]).astype(np.float64)
    y = np.array([row["y"] for row in ada.task.rows.train], np.float64)
    g = np.einsum("n,nij->ij", y, x)  # ∂ mean (⟨X, W⟩ − y)² / ∂W at W = 0, up to a factor
    g /= -np.linalg.norm(g)
    np.testing.assert_allclose(reply.shared[B], g @ g.T @ shared[B], atol=1e-5)
    np.testing.assert_allclose(reply.shared[A], shared[A] @ g.T @ g, atol=1e-5)
    assert (reply.terms, reply.examples, reply.metrics) == (60, 60, {})


def test_an_initialize_request_stores_nothing_and_repeats_bit_for_bit(tmp_path: Path) -> None:
    made = plan("spectral")
    ada, asked = site(made, tmp_path), request(made, other_subspaces(), "initialize", 0)
    first, second = ada.handle(asked), ada.handle(asked)
    assert all(np.array_equal(first.shared[key], second.shared[key]) for key in (A, B))
    assert list(ada.store.folder.glob("*")) == []
    assert not any(parameter.requires_grad for parameter in ada.model.base.backbone.parameters())


def test_a_vanishing_gradient_is_no_division_by_zero(tmp_path: Path) -> None:
    made = plan("spectral")
    ada = site(made, tmp_path)
    ada.task.train = dataclasses.replace(
        ada.task.train, examples=tuple((x, torch.zeros_like(y)) for x, y in ada.task.train.examples)
    )
    arrays, _ = power_step(ada.task, ada.model.base.backbone, other_subspaces())
    assert not any(array.any() for array in arrays.values())


def test_with_a_spectral_start_an_untrained_site_has_the_base_model(tmp_path: Path) -> None:
    ada = site(plan("spectral"), tmp_path)
    ada.load(common_subspaces(), {})
    x = torch.as_tensor(np.stack([row["x"] for row in ada.task.rows.train]))
    with torch.no_grad():
        assert not ada.model.base.backbone(x).any()


# --- the benefit ratio ---


def reported(made: Plan, folder: Path, shared: Arrays, rows: int = 60) -> TrainReply:
    return site(made, folder, rows).handle(request(made, shared))


def test_the_ratio_is_near_zero_in_the_right_subspaces_and_above_one_in_others(tmp_path: Path) -> None:
    made = plan(report_benefit=True)
    right = reported(made, tmp_path / "right", common_subspaces()).metrics[BENEFIT]
    wrong = reported(made, tmp_path / "wrong", other_subspaces()).metrics[BENEFIT]
    assert right < 0.01
    assert wrong > 1.0


def test_reporting_the_ratio_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    shared = common_subspaces()
    quiet = site(plan(), tmp_path / "quiet")
    telling = site(plan(report_benefit=True), tmp_path / "telling")
    one = quiet.handle(request(quiet.plan, shared))
    other = telling.handle(request(telling.plan, shared))
    assert set(other.metrics) - set(one.metrics) == {BENEFIT}
    assert all(np.array_equal(one.shared[key], other.shared[key]) for key in (A, B))
    states = [trainer.store.state(1) for trainer in (quiet, telling)]
    assert all(torch.equal(states[0].tensors[key], states[1].tensors[key]) for key in states[0].tensors)  # type: ignore[union-attr]


def test_the_ratio_of_a_site_with_one_example_is_one(tmp_path: Path) -> None:
    assert reported(plan(report_benefit=True), tmp_path, common_subspaces(), rows=1).metrics[BENEFIT] == 1.0


@pytest.mark.parametrize(
    ("with_adapter", "without", "ratio"),
    [(0.5, 1.0, 0.5), (99.0, 1.0, 10.0), (math.nan, 1.0, 1.0), (1.0, math.inf, 1.0), (1.0, 0.0, 1.0), (0.0, 1.0, 0.0)],
)
def test_what_is_sent_is_a_number_between_zero_and_ten(with_adapter: float, without: float, ratio: float) -> None:
    assert benefit_ratio(with_adapter, without) == ratio
