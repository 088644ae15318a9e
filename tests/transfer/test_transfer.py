"""A site's model transfers to another base model after its training data are deleted."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from colora.client.artifacts.predict import Predictor
from colora.client.artifacts.pseudo_labels import pseudo_label
from colora.client.artifacts.synthetic_data import artifacts_for_next_transfer, synthetic_rows
from colora.client.artifacts.transfer import transfer, transfer_plan
from colora.common.errors import ColoraError, DataError, ModelError, StateError
from colora.common.models.saved import SavedModel, read_saved_model
from tests.conftest import WORDS, write_lines, write_tiny_recipe
from tests.transfer.conftest import prepare_run

TEXTS = [" ".join(pair) for pair in pairwise(WORDS)]


@pytest.fixture(scope="module")
def federation(tiny_bert: Path, generating_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with ``transfer.prepare`` and ada's rows deleted."""
    folder = tmp_path_factory.mktemp("federation")
    raw = write_tiny_recipe(tiny_bert, folder)
    raw["transfer"] = {
        "prepare": True,
        "samples": 16,
        "generator": {"model": str(generating_llama)},
        "discriminator": {"rank": 4, "steps": 20, "lr": 0.05},
        "distillation": {"epochs": 5, "lr": 0.02},
    }
    raw["train"] |= {"final_steps": 10, "head_lr": 0.05}
    run = prepare_run(raw, folder / "run")
    shutil.rmtree(run / "sites" / "ada" / "data")
    shutil.rmtree(folder / "rows")
    return run


@pytest.fixture
def prepared(federation: Path, tmp_path: Path, generator_calls: list[int]) -> SavedModel:
    """ada's model after that run."""
    return read_saved_model(shutil.copytree(federation, tmp_path / "run") / "sites" / "ada")


@pytest.fixture
def other_bert(tiny_bert: Path, tmp_path: Path) -> Path:
    """The tiny BERT with other weights and one layer fewer."""
    from transformers import BertConfig, BertModel

    place = tmp_path / "other"
    shutil.copytree(tiny_bert, place)
    torch.manual_seed(5)
    BertModel(BertConfig.from_pretrained(tiny_bert, num_hidden_layers=1)).save_pretrained(place)
    return place


@pytest.mark.slow
def test_a_classifier_transfers_without_its_data_and_back_again(
    prepared: SavedModel, other_bert: Path, tmp_path: Path
) -> None:
    plan = transfer_plan(prepared, str(other_bert), ("transfer.filter=none",))
    first = transfer(prepared, plan, tmp_path / "out")
    assert first.examples == 16
    transferred = read_saved_model(tmp_path / "out")
    assert transferred.plan.model.source == str(other_bert)
    assert (transferred.metadata.site, transferred.metadata.labels) == ("ada", prepared.metadata.labels)
    rows = [json.loads(line) for line in (tmp_path / "out" / "synthetic.jsonl").read_text().splitlines()]
    source = [p["probabilities"] for p in Predictor(prepared).predict(rows)]
    target = [p["probabilities"] for p in Predictor(transferred).predict(rows)]
    off = [abs(a[k] - b[k]) for a, b in zip(source, target, strict=True) for k in a]
    assert np.mean(off) < 0.1, "it predicts as the source does"
    assert [row["probabilities"] for row in rows] == [pytest.approx(list(p.values())) for p in source]
    again = transfer(prepared, plan, tmp_path / "out")
    assert again.state.read_bytes() == first.state.read_bytes()
    assert transferred.transfer_metadata == prepared.transfer_metadata
    assert {k: v.tobytes() for k, v in transferred.discriminator.items()} == {
        k: v.tobytes() for k, v in prepared.discriminator.items()
    }, "the generator is the same, and so is the discriminator"
    transfer(transferred, transfer_plan(transferred, prepared.plan.model.source), tmp_path / "back")
    back = read_saved_model(tmp_path / "back")
    assert back.plan.model.source == prepared.plan.model.source
    assert np.mean([a["label"] == b["label"] for a, b in zip(*answers(transferred, back, rows), strict=True)]) > 0.8


def answers(one: SavedModel, other: SavedModel, rows: list[dict]) -> tuple[list[dict], list[dict]]:
    return list(Predictor(one).predict(rows)), list(Predictor(other).predict(rows))


def test_only_texts_that_the_discriminator_accepts_become_rows(
    prepared: SavedModel, other_bert: Path, tmp_path: Path
) -> None:
    with suppress(DataError):  # a good discriminator accepts none of these
        synthetic_rows(
            prepared, transfer_plan(prepared, str(other_bert), ("transfer.generator.max_calls=4",)), tmp_path / "out"
        )
    path = tmp_path / "out" / "synthetic.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    log = json.loads((tmp_path / "out" / "written.json").read_text())
    accepted = [text for text, verdict in log["verdicts"].items() if verdict]
    assert [row["text"] for row in rows] == accepted[:16]
    assert not set(log["verdicts"]) & set(prepared.transfer_metadata["seeds"] if prepared.transfer_metadata else ())


def test_seeds_and_discriminator_are_in_the_state_and_in_no_message(prepared: SavedModel, tmp_path: Path) -> None:
    assert prepared.transfer_metadata is not None
    assert len(prepared.transfer_metadata["seeds"]) == 5
    assert prepared.transfer_metadata["examples"] == 12
    assert any(key.endswith("lora_B.weight") and value.any() for key, value in prepared.discriminator.items())
    events = (tmp_path / "run" / "events.jsonl").read_text()
    for seed in prepared.transfer_metadata["seeds"]:
        assert seed not in events
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        assert not any(seed.encode() in path.read_bytes() for seed in prepared.transfer_metadata["seeds"])


def test_errors_of_a_transfer(prepared: SavedModel, other_bert: Path, tiny_bert: Path, tmp_path: Path) -> None:
    same = transfer_plan(prepared, prepared.plan.model.source)
    for plan, words in (
        (same, "--to .*: the model is already on this base model"),
        (
            transfer_plan(prepared, str(other_bert), ("transfer.filter=titok",)),
            "transfer.filter = titok needs a generation task",
        ),
        (
            transfer_plan(prepared, str(other_bert), ("adapter.target_modules=['nothing']", "transfer.filter=none")),
            "query",
        ),
    ):
        with pytest.raises(ColoraError, match=words):
            transfer(prepared, plan, tmp_path / "no")
        assert not (tmp_path / "no").exists()
    with pytest.raises(ColoraError, match=r"nowhere"):
        transfer(prepared, transfer_plan(prepared, str(tmp_path / "nowhere")), tmp_path / "bare")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(ColoraError, match=r"--out .*full is not empty"):
        transfer(prepared, transfer_plan(prepared, str(other_bert)), tmp_path / "full")
    bare = SavedModel(prepared.path, prepared.metadata, prepared.plan, prepared.shared, prepared.personal)
    with pytest.raises(ColoraError, match=r"the site kept no seeds .*transfer.prepare = true"):
        transfer(bare, transfer_plan(prepared, str(other_bert), ("transfer.samples=4",)), tmp_path / "bare")
    assert not (tmp_path / "bare").exists()
    run = read_saved_model(tmp_path / "run" / "checkpoints")
    with pytest.raises(StateError, match=r"is a checkpoint, which all sites share. Name a site's folder: sites/NAME"):
        transfer(run, transfer_plan(run, str(other_bert)), tmp_path / "bare")


@pytest.fixture(scope="module")
def talk(generating_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one site with a generation task, prepared."""
    folder = tmp_path_factory.mktemp("talk")
    rows = [{"prompt": text, "completion": "sun moon"} for text in TEXTS]
    raw = {
        "name": "talk",
        "rounds": 1,
        "model": {"source": str(generating_llama), "max_length": 32},
        "adapter": {"rank": 4, "target_modules": ["q_proj", "v_proj"]},
        "train": {"steps": 20, "batch_size": 4, "lr": 0.02},
        "evaluation": {"max_new_tokens": 4},
        "transfer": {
            "prepare": True,
            "samples": 12,
            "discriminator": {"rank": 4, "steps": 10},
            "distillation": {"epochs": 150, "lr": 0.02},
        },
        "simulation": {"threads": 1},
        "data": {"task": "generation", "test": 3},
        "site": [{"name": "eva", "source": str(write_lines(folder / "eva.jsonl", rows))}],
    }
    return prepare_run(raw, folder / "run")


@pytest.fixture
def talker(talk: Path, tmp_path: Path, generator_calls: list[int]) -> SavedModel:
    """That site's model."""
    return read_saved_model(shutil.copytree(talk, tmp_path / "run") / "sites" / "eva")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "titok"])
def test_a_generation_model_transfers_to_another_method_by_its_own_answers(
    talker: SavedModel, kind: str, tmp_path: Path
) -> None:
    plan = transfer_plan(talker, talker.plan.model.source, ("method.name=multilora", f"transfer.filter={kind}"))
    done = transfer(talker, plan, tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "synthetic.jsonl").read_text().splitlines()]
    assert 6 <= done.examples == len(rows) <= 12, "all but empty answers"
    assert rows == pseudo_label(talker, [row["prompt"] for row in rows])
    predicted = [p["completion"] for p in Predictor(read_saved_model(tmp_path / "out")).predict(rows)]
    assert sum(a == row["completion"] for a, row in zip(predicted, rows, strict=True)) >= len(rows) - 2


def test_a_new_base_model_that_generates_trains_a_new_discriminator(
    talker: SavedModel, generating_llama: Path, tmp_path: Path
) -> None:
    target = tmp_path / "other-llama"
    shutil.copytree(generating_llama, target)
    plan = transfer_plan(talker, str(target), ("transfer.filter=none",))
    rows = [{"prompt": text, "completion": "sun"} for text in TEXTS]
    assert talker.transfer_metadata
    bare = artifacts_for_next_transfer(talker, plan, rows)
    again = artifacts_for_next_transfer(talker, transfer_plan(talker, str(target)), rows)
    assert bare
    assert again
    assert bare.seeds == again.seeds == tuple(talker.transfer_metadata["seeds"])
    assert not bare.discriminator
    assert again.discriminator.keys() == talker.discriminator.keys()
    assert any(value.numpy().tobytes() != talker.discriminator[k].tobytes() for k, value in again.discriminator.items())
    assert any(value.any() for k, value in again.discriminator.items() if "lora_B" in k), "trained, not initial"
    wider = artifacts_for_next_transfer(
        talker, transfer_plan(talker, talker.plan.model.source, ("transfer.discriminator.rank=2",)), rows
    )
    assert wider
    assert {value.shape[0] for k, value in wider.discriminator.items() if "lora_A" in k} == {2}
    assert (
        artifacts_for_next_transfer(talker, transfer_plan(talker, str(target), ("transfer.prepare=false",)), rows)
        is None
    )


def test_a_target_that_cannot_generate_is_refused_before_anything_is_written(
    talker: SavedModel, tiny_bert: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import T5Config

    both = tmp_path / "both"
    T5Config(is_encoder_decoder=True, architectures=["T5ForConditionalGeneration"]).save_pretrained(both)
    for target, words, overrides in (
        (tiny_bert, "model.source.*BertModel", ()),
        (
            tiny_bert,
            "model.source.*BertModel",
            ("transfer.prepare=false", "transfer.generator.mode=source"),
        ),
        (both, "model.source.*T5", ("transfer.prepare=false",)),
        (tiny_llama, "site eva: model.source: .* needs yes and no as single tokens", ()),
    ):
        with pytest.raises(ModelError, match=words):
            transfer(talker, transfer_plan(talker, str(target), overrides), tmp_path / "out")
    assert not (tmp_path / "out").exists()
