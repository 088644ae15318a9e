"""Multi-label classification against hand arithmetic and scikit-learn, and in a whole simulation."""

from __future__ import annotations

import csv
import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from colora.client.artifacts.predict import Predictor
from colora.client.data.row_schema import check_rows, parse_rows
from colora.common.config.loader import load_site, recipe_from
from colora.common.config.schema import DataSettings, ModelSettings, Plan, TrainSettings
from colora.common.dataset import Row, SiteDataset
from colora.common.errors import DataError
from colora.common.models.base_model import load_base_model
from colora.common.models.saved import read_saved_model
from colora.common.tasks import build_task
from colora.common.tasks.multilabel import MultiLabel
from colora.server.reporting.summary import summarize
from colora.simulation.run import simulate
from tests.conftest import write_lines

LIST = DataSettings(task="multilabel", label="topics")
FLAGS = DataSettings(task="multilabel", label_columns=("animal", "sky"))
LABELS = ("animal", "sky", "none of it")
TOPICS = {"cat": "animal", "dog": "animal", "sun": "sky", "moon": "sky"}


def rows(count: int, seed: int = 0) -> list[Row]:
    """Texts of two letters and two nouns, whose labels are those of the nouns."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        nouns = rng.sample([*TOPICS, "hill", "sea"], 2)
        text = " ".join([*rng.choices("a b c d e f".split(), k=2), *nouns])  # noqa: SIM905
        made.append({"text": text, "label": tuple(sorted({TOPICS[noun] for noun in nouns if noun in TOPICS}))})
    return made


@pytest.fixture
def task(tiny_bert: Path) -> MultiLabel:
    model = ModelSettings(str(tiny_bert), max_length=16, device="cpu")
    data = SiteDataset("ada", "multilabel", rows(60), rows(30, 1), LABELS)
    made = build_task(data, load_base_model(model, generates=False), Plan("fed", 1, model))
    assert isinstance(made, MultiLabel)
    with torch.no_grad():
        for parameter in made.head.values():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    return made


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "values", "expected"),
    [
        (LIST, {"text": "x", "topics": ["b", "a", "b"]}, ("b", "a")),
        (LIST, {"text": "x", "topics": []}, ()),
        (LIST, {"text": "x", "topics": [3]}, ("3",)),
        (FLAGS, {"text": "x", "animal": 1, "sky": 0}, ("animal",)),
        (FLAGS, {"text": "x", "animal": "1", "sky": "1"}, ("animal", "sky")),  # of a CSV file
        (FLAGS, {"text": "x", "animal": False, "sky": 1.0}, ("sky",)),
        (DataSettings(task="multilabel", label="t", labels=("a",)), {"text": "x", "t": ["a", "b"]}, ("a",)),
    ],
)
def test_labels_come_from_a_list_or_from_columns_of_0_and_1(data: DataSettings, values: Row, expected: tuple) -> None:
    assert parse_rows([(1, values)], data, "ada") == [(1, {"text": "x", "label": expected})]


@pytest.mark.parametrize(
    ("data", "values", "error"),
    [
        (LIST, {"text": "x", "topics": "a"}, "data.label: expected a list of labels, found str"),
        (LIST, {"text": "x", "topics": [None]}, "data.label: expected a list of labels, found list"),
        (LIST, {"text": "x"}, "data.label: expected a column 'topics', found only text"),
        (LIST, {"text": 5, "topics": []}, "data.text: expected text, found int"),
        (FLAGS, {"text": "x", "animal": 2, "sky": 0}, "data.label_columns: expected 0 or 1, found 2"),
        (FLAGS, {"text": "x", "animal": None, "sky": 0}, "data.label_columns: expected 0 or 1, found None"),
        (FLAGS, {"text": "x", "animal": 1}, "data.label_columns: expected a column 'sky', found only text, animal"),
    ],
)
def test_a_row_that_does_not_fit_is_named_by_its_number(data: DataSettings, values: Row, error: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_rows([(41, values)], data, "ada")
    assert str(caught.value) == f"site ada: {error} in row 41"


def test_a_site_has_the_labels_of_its_settings_or_of_its_training_rows() -> None:
    train, test = [{"text": "x", "label": ("b", "a")}, {"text": "x", "label": ()}], [{"text": "x", "label": ("a",)}]
    assert check_rows("ada", LIST, train, test).labels == ("a", "b")
    assert check_rows("ada", FLAGS, train[:1], test[:0] or train[1:]).labels == ("animal", "sky")
    with pytest.raises(
        DataError, match=r"site ada: data\.label: expected a label seen in training \(a, b\), found 'c'"
    ):
        check_rows("ada", LIST, train, [{"text": "x", "label": ("c",)}])
    with pytest.raises(DataError, match="expected at least one label, found none in the training rows"):
        check_rows("ada", LIST, train[1:], test)


# --- loss and metrics -----------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_binary_cross_entropy_over_labels(task: MultiLabel) -> None:
    batch = task.collate(task.train.examples[:5])
    loss, terms = task.loss(batch)
    targets = np.array([[float(label in row["label"]) for label in LABELS] for row in task.rows.train[:5]])
    p = 1 / (1 + np.exp(-task._logits(batch).detach().double().numpy()))
    assert loss.item() == pytest.approx(-np.mean(targets * np.log(p) + (1 - targets) * np.log(1 - p)), rel=1e-5)
    assert terms == 5


def test_the_scores_by_hand(task: MultiLabel) -> None:
    """Two hits, one miss and one false alarm; the third label is neither expected nor predicted."""
    expected = [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
    logits = np.array([[2.0, 1.0, -1.0], [3.0, -0.5, -2.0]])
    scores = task._scores(expected, logits)
    assert scores["micro_f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert scores["macro_f1"] == pytest.approx((1 + 0 + 0) / 3)
    assert scores["subset_accuracy"] == 0.0
    assert task._scores(expected, np.array(expected) - 0.5)["subset_accuracy"] == 1.0


def test_the_f1_scores_equal_scikit_learns(task: MultiLabel) -> None:
    rng = np.random.default_rng(0)
    expected, logits = (rng.random((40, 3)) > 0.6).astype(float), rng.normal(size=(40, 3))
    scores = task._scores(expected.tolist(), logits)
    for average in ("micro", "macro"):
        reference = f1_score(expected, logits > 0, average=average, zero_division=0)  # type: ignore[arg-type]
        assert scores[f"{average}_f1"] == pytest.approx(reference)


def test_measured_are_the_metrics_of_the_table(task: MultiLabel) -> None:
    measured = task.measure(generate=False)
    assert set(measured) == {"micro_f1", "macro_f1", "subset_accuracy", "loss"}
    with torch.no_grad():
        assert measured["loss"] == pytest.approx(task.mean_loss(task.test.examples), rel=1e-5)


def test_a_fit_is_one_logistic_regression_for_each_label(task: MultiLabel) -> None:
    """Each label is the sign of one feature; a label without an example is never predicted."""
    x = np.random.default_rng(0).normal(size=(400, 5))
    labels = np.stack([x[:, 0] > 0, x[:, 1] > 0.5, np.zeros(400)], axis=1).astype(float)
    weights, offsets = task._fit(x, labels.tolist())
    predicted = x @ weights.T + offsets > 0
    assert (predicted == labels).mean(0).tolist() == [pytest.approx(1, abs=0.05), pytest.approx(1, abs=0.05), 1]


def test_a_fitted_head_measures_as_the_probe(task: MultiLabel) -> None:
    probed = task.probe()
    assert probed is not None
    assert task.fit_head()
    measured = task.measure(generate=False)
    assert measured["micro_f1"] == pytest.approx(probed["micro_f1"], abs=0.05)
    assert not any("none of it" in p["labels"] for p in task.predict(task.rows.test))


def test_predictions_list_the_labels_above_one_half(task: MultiLabel) -> None:
    predictions = list(task.predict([{"text": "red cat"}, {"text": "sun " * 20}]))
    for prediction in predictions:
        assert prediction["labels"] == [label for label, p in prediction["probabilities"].items() if p > 0.5]
        assert list(prediction["probabilities"]) == list(LABELS)
    assert [prediction["truncated"] for prediction in predictions] == [False, True]


# --- a whole run ----------------------------------------------------------------------------------------------------


def test_sites_with_lists_and_with_columns_train_together(tiny_recipe: dict, tmp_path: Path) -> None:
    """Each site keeps its own labels and head; its model on disk predicts label sets."""
    lists = write_lines(tmp_path / "lists.jsonl", [{"text": r["text"], "topics": r["label"]} for r in rows(40)])
    flags = tmp_path / "flags.csv"
    with flags.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "animal", "sky"])
        writer.writerows([r["text"], *(int(name in r["label"]) for name in ("animal", "sky"))] for r in rows(40, 1))
    sites: list[dict[str, Any]] = [
        {"name": "lists", "source": str(lists), "label": "topics"},
        {"name": "flags", "source": str(flags), "label_columns": ["animal", "sky"]},
    ]
    train = {**tiny_recipe["train"], "head_init": "probe", "final_steps": 1}
    raw = {**tiny_recipe, "train": train, "data": {"task": "multilabel"}, "site": sites, "server": {"quorum": 2}}
    run = simulate(recipe_from(raw), tmp_path / "run", resume=False)
    for row in summarize(run.events()).rows.values():
        assert not row.failures
        assert row.metric("personal") == row.metrics["personal.micro_f1"]
        assert {"base.micro_f1", "shared.macro_f1", "personal.subset_accuracy"} <= set(row.metrics)
    assert load_site(run.path / "sites" / "flags" / "site.toml").data.labels == ("animal", "sky")
    saved = read_saved_model(run.path / "sites" / "flags")
    assert saved.metadata.task == "multilabel"
    (prediction,) = Predictor(saved, device="cpu").predict([{"text": "a b cat hill"}])
    assert set(prediction["labels"]) <= {"animal", "sky"}


# --- settings of the training loss ------------------------------------------------------------------------------------


def test_balanced_weights_give_the_texts_with_a_label_the_weight_of_those_without(task: MultiLabel) -> None:
    batch = task.collate(task.train.examples)
    y, logits = batch["labels"].numpy().astype(float), task._logits(batch).detach().numpy().astype(float)
    losses = np.logaddexp(0, logits) - y * logits
    n, ones = len(y), y.sum(0)
    weights = np.where(y > 0, n / 2 / np.maximum(ones, 1), n / 2 / (n - ones))
    weights[:, ones == 0] = 1  # no text has "none of it"
    assert (ones == 0).tolist() == [False, False, True]
    plain = task.loss(batch)[0].item()
    assert plain == pytest.approx(losses.mean(), rel=1e-5)
    task.plan = dataclasses.replace(task.plan, train=TrainSettings(class_weights="balanced"))
    assert task.loss(batch)[0].item() == pytest.approx((losses * weights).mean(), rel=1e-5)
    assert task.loss(batch)[0].item() != pytest.approx(plain, rel=1e-3)


def test_label_smoothing_moves_the_targets_towards_a_half(task: MultiLabel) -> None:
    batch = task.collate(task.train.examples)
    y, logits = batch["labels"].numpy().astype(float), task._logits(batch).detach().numpy().astype(float)
    smooth = np.where(y > 0, 0.9, 0.1)
    task.plan = dataclasses.replace(task.plan, train=TrainSettings(label_smoothing=0.2))
    assert task.loss(batch)[0].item() == pytest.approx((np.logaddexp(0, logits) - smooth * logits).mean(), rel=1e-5)
