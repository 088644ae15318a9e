"""The tuned generator is trained on the site's texts in preparation, and a transfer generates with it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer

from colora.client.artifacts.synthetic_data import carried_artifacts, synthetic_rows
from colora.client.artifacts.transfer import transfer, transfer_plan
from colora.client.training.adapted_model import attach_adapters
from colora.client.training.state_store import StateStore
from colora.client.training.trainer import Trainer
from colora.common.adapters.initialization import initial_shared_state
from colora.common.adapters.inject import ADAPTER, activate
from colora.common.config.schema import (
    AdapterSettings,
    DiscriminatorSettings,
    ModelSettings,
    Plan,
    PrivateSettings,
    TrainSettings,
    TransferGeneratorSettings,
    TransferSettings,
    to_json,
)
from colora.common.dataset import SiteDataset
from colora.common.errors import ModelError, StateError
from colora.common.models.base_model import BaseModel, load_base_model
from colora.common.models.saved import SavedModel, read_saved_model
from colora.common.protocol.types import TrainRequest
from colora.transfer import preparation, synthesis
from colora.transfer.preparation import prepare
from colora.transfer.sampling import list_prompt
from colora.transfer.tuned_generator import TunedGenerator, list_rows
from tests.conftest import write_tiny_recipe
from tests.transfer.conftest import prepare_run

SETTINGS = TransferSettings(
    prepare=True, generator=TransferGeneratorSettings(mode="tuned", tuning_steps=20, tuning_lr=0.02)
)
TEXTS = [f"a b c {word} e f" for word in "abcdefghijkl"]
NEXT = "a b c"  # how each text begins


@pytest.fixture
def base(generating_llama: Path) -> BaseModel:
    torch.set_num_threads(1)
    return load_base_model(ModelSettings(str(generating_llama)), generates=True)


def test_lists_begin_like_the_prompt_and_use_every_text_in_turn() -> None:
    rows = list(islice(list_rows(TEXTS, 4, 3), 6))
    listed = [[line.partition(". ")[2] for line in f"1.{row['completion']}".split("\n")] for row in rows]
    for row, items in zip(rows, listed, strict=True):
        assert len(set(items)) == 4
        assert f"{row['prompt']}{row['completion']}".startswith(list_prompt(items[:2]))
    seen = list(chain(*listed))
    assert sorted(seen[:12]) == sorted(seen[12:]) == TEXTS
    assert seen[:12] != seen[12:]
    assert list(islice(list_rows(TEXTS, 4, 4), 6)) != rows
    assert all(len(row["completion"].split("\n")) == 5 for row in islice(list_rows(TEXTS, 5, 0), 9))


def likelihood(base: BaseModel, text: str, before: str) -> float:
    """Return log p of a text's tokens after ``before``, under the model with its active adapters."""
    assert base.language_model is not None
    start, ids = (base.tokenizer(words, add_special_tokens=False)["input_ids"] for words in (before, text))
    with torch.no_grad():
        logits = base.language_model(input_ids=torch.tensor([start + ids])).logits[0].log_softmax(-1)
    return sum(float(logits[len(start) + i - 1, token]) for i, token in enumerate(ids))


def test_its_texts_become_more_likely_and_the_model_is_unchanged(base: BaseModel, generating_llama: Path) -> None:
    prompt = list_prompt(TEXTS[:2])
    bare = likelihood(base, NEXT, prompt), likelihood(base, "x y z", prompt)
    with TunedGenerator(base, ModelSettings(str(generating_llama)), SETTINGS, 1).attached() as tuned:
        assert likelihood(base, NEXT, prompt) == bare[0], "initially it is the bare model"
        tuned.fit(TEXTS, seeds=2)
        learnt = likelihood(base, NEXT, prompt), likelihood(base, "x y z", prompt)
        values = tuned.values()
    mine, foreign = learnt[0] - bare[0], learnt[1] - bare[1]
    assert mine > foreign + 0.4, "a lot for a model with a random output layer"
    assert (likelihood(base, NEXT, prompt), likelihood(base, "x y z", prompt)) == bare
    with TunedGenerator(base, ModelSettings(str(generating_llama)), SETTINGS, 2).attached(values):
        assert likelihood(base, NEXT, prompt) == learnt[0]


@pytest.fixture
def active_loras(monkeypatch: pytest.MonkeyPatch, generator_calls: list[int]) -> list[dict[str, torch.Tensor]]:
    """B of every active LoRA, for each call of the stand-in generator."""
    calls: list[dict[str, torch.Tensor]] = []
    stand_in = synthesis.generate_texts

    def generate(base: BaseModel, seeds: Sequence[str], settings: Any, seed: int, call: int) -> Iterator[str]:
        calls.append(dict(lora_b_of(base)))
        yield from stand_in(base, seeds, settings, seed, call)

    monkeypatch.setattr(synthesis, "generate_texts", generate)
    monkeypatch.setattr(preparation, "generate_texts", generate)
    return calls


def lora_b_of(base: BaseModel) -> Iterator[tuple[str, torch.Tensor]]:
    for name, layer in base.backbone.named_modules():
        if isinstance(layer, LoraLayer):
            for adapter in layer.active_adapters:
                yield f"{name} {adapter}", layer.lora_B[adapter].weight.detach().clone()


def test_a_preparation_does_not_depend_on_the_federations_adapters(
    generating_llama: Path, active_loras: list[dict[str, torch.Tensor]]
) -> None:
    model = ModelSettings(str(generating_llama), max_length=32)
    settings = replace(
        SETTINGS,
        generator=replace(SETTINGS.generator, tuning_steps=3, batch_size=8),
        discriminator=DiscriminatorSettings(steps=3, rank=4),
    )
    plan = Plan("tiny", 1, model, adapter=AdapterSettings(4, target_modules=("q_proj", "v_proj")), transfer=settings)
    site = SiteDataset("ada", "generation", [{"prompt": text, "completion": "x"} for text in TEXTS], ())
    alone = prepare(load_base_model(model, generates=True), plan, site, 7)
    model_with_adapters = attach_adapters(load_base_model(model, generates=True), plan)
    model_with_adapters.private_adapter(PrivateSettings("multilora"))
    with torch.no_grad():
        for parameter in model_with_adapters.adapter.values():
            parameter.normal_()
    activate(model_with_adapters.base.backbone, [ADAPTER])
    for _ in range(2):  # the sites of a simulation share one model
        beside = prepare(model_with_adapters.base, plan, site, 7)
        for key, value in {**alone.tuned_generator, **alone.discriminator}.items():
            assert torch.equal(value, {**beside.tuned_generator, **beside.discriminator}[key])
    assert active_loras
    for lora_b in active_loras:  # the discriminator's negatives come from the tuned generator
        assert all(name.endswith(" writer") for name in lora_b)
        assert sum(bool(value.any()) for value in lora_b.values()) == len(alone.tuned_generator) // 2 > 4, (
            "all linear layers"
        )


@pytest.fixture(scope="module")
def federation(tiny_bert: Path, generating_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that prepared with a tuned generator, with ada's rows deleted."""
    folder = tmp_path_factory.mktemp("federation")
    transfer = {
        "prepare": True,
        "filter": "none",
        "samples": 8,
        "generator": {"model": str(generating_llama), "mode": "tuned", "tuning_steps": 3},
        "discriminator": {"rank": 4},
    }
    raw = write_tiny_recipe(tiny_bert, folder) | {"transfer": transfer}
    run = prepare_run(raw, folder / "run")
    shutil.rmtree(run / "sites" / "ada" / "data")
    shutil.rmtree(folder / "rows")
    return run


@pytest.fixture
def prepared(federation: Path, tmp_path: Path, generator_calls: list[int]) -> SavedModel:
    """ada's model after that run."""
    return read_saved_model(shutil.copytree(federation, tmp_path / "run") / "sites" / "ada")


@pytest.mark.slow
@pytest.mark.parametrize("override", ["transfer.samples=8", "transfer.discriminator.rank=2"])
def test_a_transfer_and_the_next_one_use_the_tuned_generator(
    prepared: SavedModel, tiny_bert: Path, tmp_path: Path, active_loras: list[dict[str, torch.Tensor]], override: str
) -> None:
    other = shutil.copytree(tiny_bert, tmp_path / "other")
    transfer(prepared, transfer_plan(prepared, str(other), (override,)), tmp_path / "out")
    kept = {key: torch.as_tensor(value) for key, value in prepared.tuned_generator.items() if "lora_B" in key}
    assert active_loras
    for lora_b in active_loras:
        assert len(lora_b) == len(kept) > 4
        assert all(any(torch.equal(value, other) for other in kept.values()) for value in lora_b.values())
    active_loras.clear()
    transferred = read_saved_model(tmp_path / "out")
    if override.startswith("transfer.discriminator.rank"):
        assert {value.shape[0] for key, value in transferred.tuned_generator.items() if "lora_A" in key} == {2}, (
            "trained again"
        )
        return
    assert {k: v.tobytes() for k, v in transferred.tuned_generator.items()} == {
        k: v.tobytes() for k, v in prepared.tuned_generator.items()
    }
    transfer(transferred, transfer_plan(transferred, str(tiny_bert)), tmp_path / "back")
    assert active_loras
    assert all(len(lora_b) == len(kept) for lora_b in active_loras)


def test_another_mode_needs_no_lora_and_tuned_mode_does(
    prepared: SavedModel, tiny_bert: Path, tmp_path: Path, active_loras: list[dict[str, torch.Tensor]]
) -> None:
    other = shutil.copytree(tiny_bert, tmp_path / "other")
    plain = transfer_plan(prepared, str(other), ("transfer.generator.mode=source",))
    assert synthetic_rows(prepared, plain, tmp_path / "plain")
    assert active_loras
    assert not any(active_loras), "the bare model generates"
    kept = carried_artifacts(prepared, plain)
    assert kept
    assert not kept.tuned_generator, "it is not carried to the next transfer"
    untuned = replace(prepared, tuned_generator={})
    with pytest.raises(StateError, match=r"has no tuned generator"):
        transfer(untuned, transfer_plan(untuned, str(other)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_preparation_that_fails_leaves_the_shared_adapter_on(
    base: BaseModel, generating_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next request, of this site or another one on the same model, is not affected."""
    model = ModelSettings(str(generating_llama), max_length=32, device="cpu")
    adapter = AdapterSettings(4, target_modules=("q_proj", "v_proj"))
    settings = TransferSettings(prepare=True, dataset_name="tiny", discriminator=DiscriminatorSettings(steps=3))
    plan = Plan("town", 1, model, adapter=adapter, train=TrainSettings(steps=1, final_steps=1), transfer=settings)
    site = SiteDataset("ada", "generation", [{"prompt": text, "completion": "x"} for text in TEXTS], ())
    model_with_adapters = attach_adapters(base, plan)
    trainer = Trainer(model_with_adapters, site, StateStore(tmp_path, plan.name))
    shared = initial_shared_state(plan, 0)
    reply = trainer.handle(TrainRequest(plan.name, 1, "train", 0, to_json(plan), shared, evaluate=False))
    final = TrainRequest(plan.name, 2, "finalize", 1, to_json(plan), reply.shared, evaluate=False)
    monkeypatch.setattr(preparation, "generate_texts", lambda *args: iter(()))
    with pytest.raises(ModelError, match=r"model.source: .* generated no new text"):
        trainer.handle(final)
    assert [name for name, _ in lora_b_of(base)], "the shared adapter"
    monkeypatch.setattr(preparation, "generate_texts", lambda *args: iter(["s t u", "v w x", "x y z"]))
    trainer.handle(final)
    assert trainer.transfer_artifacts
    assert trainer.transfer_artifacts.discriminator
