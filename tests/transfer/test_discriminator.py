"""The discriminator is trained on inputs only, and accepts a text iff p(yes) > p(no)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from colora.client.training.adapted_model import attach_adapters
from colora.client.training.state_store import StateStore
from colora.client.training.trainer import Trainer
from colora.common.config.loader import recipe_from
from colora.common.config.schema import (
    DiscriminatorSettings,
    ModelSettings,
    Plan,
    TransferGeneratorSettings,
    TransferSettings,
)
from colora.common.dataset import Row, SiteDataset
from colora.common.errors import ColoraError, DataError, ModelError, StateError
from colora.common.models.base_model import BaseModel, load_base_model
from colora.simulation.run import simulate
from colora.transfer.discriminator import Discriminator, question
from colora.transfer.preparation import generator_settings, match_lengths, prepare

SETTINGS = TransferSettings(
    prepare=True,
    dataset_name="tiny",
    generator=TransferGeneratorSettings(batch_size=8),
    discriminator=DiscriminatorSettings(rank=4, lr=0.05, steps=60),
)
REAL = [f"a b c d {word} f" for word in "abcdefghijkl"]
FALSE = [f"s t u v {word} z" for word in "stuvwxyzqpon"]


@pytest.fixture
def base(generating_llama: Path) -> BaseModel:
    torch.set_num_threads(1)
    return load_base_model(ModelSettings(str(generating_llama), max_length=32), generates=True)


def make(base: BaseModel, source: Path) -> Discriminator:
    return Discriminator(base, ModelSettings(str(source), max_length=32), SETTINGS, "tiny", seed=1)


def site_of(rows: Sequence[Row], task: Literal["classification", "generation"] = "generation") -> SiteDataset:
    return SiteDataset("ada", task, rows, ())


def test_it_accepts_a_text_iff_p_yes_exceeds_p_no_under_its_lora(base: BaseModel, generating_llama: Path) -> None:
    tokenizer, model, expected = base.tokenizer, base.language_model, []
    assert model is not None
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    with make(base, generating_llama).attached() as discriminator:
        discriminator.fit(REAL[:8], FALSE[:8])
        kept = discriminator.accepts(REAL + FALSE)
        for text in REAL + FALSE:  # reference: one text at a time, with the full softmax
            with torch.no_grad():
                ids = tokenizer([question(text, "tiny")], return_tensors="pt", return_token_type_ids=False)
                last = model(**ids).logits[0, -1].softmax(-1)
            expected.append(bool(last[yes] > last[no]))
    assert kept == expected
    assert kept[:8] == [True] * 8
    assert kept[12:20] == [False] * 8
    assert sum(kept[8:12]) - sum(kept[20:]) >= 3, "it generalizes to new texts"


def test_its_values_can_be_restored_and_the_model_is_unchanged(base: BaseModel, generating_llama: Path) -> None:
    assert base.language_model is not None
    ids = torch.tensor([[12, 13, 14]])
    before = base.language_model(ids).logits
    with make(base, generating_llama).attached() as discriminator:
        discriminator.fit(REAL[:8], FALSE[:8])
        kept, values = discriminator.accepts(REAL + FALSE), discriminator.values()
    assert torch.equal(base.language_model(ids).logits, before)
    with make(base, generating_llama).attached() as again:
        assert again.accepts(REAL + FALSE) != kept, "initial values give other verdicts"
    with make(base, generating_llama).attached(values) as again:
        assert again.accepts(REAL + FALSE) == kept


def test_values_of_other_shapes_are_refused(base: BaseModel, generating_llama: Path) -> None:
    with make(base, generating_llama).attached() as discriminator:
        values = discriminator.values()
    narrow = Discriminator(
        base,
        discriminator.plan.model,
        replace(SETTINGS, discriminator=replace(SETTINGS.discriminator, rank=1)),
        "tiny",
        seed=1,
    )
    words = r"The saved discriminator does not fit .* expected .*lora_A.* \(1, 16\), found .* \(4, 16\)"
    with pytest.raises(StateError, match=words), narrow.attached(values):
        pass


@pytest.mark.slow
def test_the_discriminator_reads_no_answers(
    base: BaseModel, generating_llama: Path, generator_calls: list[int]
) -> None:
    model = ModelSettings(str(generating_llama), max_length=32)
    plan = Plan("tiny", 1, model, transfer=SETTINGS)
    rows = [{"prompt": text, "completion": f"answer {i % 2}"} for i, text in enumerate(REAL)]
    inputs = [{"prompt": row["prompt"]} for row in rows]
    with_answers = prepare(base, plan, site_of(rows), 7)
    without = prepare(base, plan, site_of(inputs), 7, replace(with_answers, discriminator={}))
    assert set(with_answers.seeds) <= set(REAL)
    assert len(with_answers.seeds) == 5
    for key, value in with_answers.discriminator.items():
        assert torch.equal(value, without.discriminator[key])


@pytest.mark.slow
def test_seeds_cover_as_many_labels_as_possible(
    base: BaseModel, generating_llama: Path, generator_calls: list[int]
) -> None:
    plan = Plan("tiny", 1, ModelSettings(str(generating_llama), max_length=32), transfer=replace(SETTINGS, seeds=3))
    plan = replace(
        plan, transfer=replace(plan.transfer, generator=TransferGeneratorSettings(model=str(generating_llama)))
    )
    rows = [{"text": text, "label": "rare" if i < 2 else "often"} for i, text in enumerate(REAL)]
    drawn = [prepare(base, plan, site_of(rows, "classification"), seed).seeds for seed in range(4)]
    assert all(len(set(seeds) & set(REAL[:2])) in (1, 2) for seeds in drawn)
    assert len(set(drawn)) > 1, "drawn at random"


def test_truncated_inputs_have_the_lengths_of_generated_texts(base: BaseModel) -> None:
    long, short = [f"a b c d e f g h {word} j k l" for word in "abcdefgh"], ["a b", "c d e"]
    cut = match_lengths(base.tokenizer, [*long, *short], ["s t u", "v w x y z"], 12, 0)
    assert {len(text.split()) for text in cut[:-2]} == {3, 5}
    assert all(whole.startswith(text) for whole, text in zip(long, cut, strict=False))
    assert cut[-2:] == short, "these were not truncated"


def test_errors_of_a_preparation(
    base: BaseModel, tiny_llama: Path, generating_llama: Path, generator_calls: list[int]
) -> None:
    silent = load_base_model(ModelSettings(str(tiny_llama), max_length=32), generates=True)
    words = "needs yes and no as single tokens"
    with pytest.raises(ModelError, match=words), make(silent, tiny_llama).attached() as mute:
        mute.fit(REAL, FALSE)
    plan = Plan("tiny", 1, ModelSettings(str(generating_llama), max_length=32), transfer=SETTINGS)
    with pytest.raises(DataError, match=r"transfer.seeds needs 5 different texts, but the site has only 2"):
        prepare(base, plan, site_of([{"prompt": "a b"}, {"prompt": "a  b"}, {"prompt": "c d"}]), 0)
    with pytest.raises(ModelError, match=r"transfer.generator.model is not set"):
        generator_settings(plan, "classification")


def test_errors_of_a_preparation_come_before_the_first_round(
    tiny_recipe: dict, tiny_bert: Path, tiny_llama: Path, generating_llama: Path, tmp_path: Path
) -> None:
    for i, (generator, more, words) in enumerate(
        [
            (None, {}, "transfer.generator.model is not set"),
            (
                str(tiny_llama),
                {},
                "transfer.generator.model: .*needs yes and no as single tokens.*transfer.filter",
            ),
            (
                str(tiny_llama),
                {"filter": "none", "seeds": 40},
                "site ada: transfer.seeds needs 40 different texts, but the site has only 12",
            ),
            (str(tmp_path / "nothing"), {"filter": "none"}, "transfer.generator.model.*nothing"),
            (
                str(tiny_bert),
                {"filter": "none"},
                "transfer.generator.model.*BertModel",
            ),
            (str(generating_llama), {"discriminator": {"target_modules": ["c_attn"]}}, "c_attn"),
        ]
    ):
        transfer = {"prepare": True, **({"generator": {"model": generator}} if generator else {}), **more}
        recipe = recipe_from({**tiny_recipe, "transfer": transfer})
        with pytest.raises(ColoraError, match=words):
            simulate(recipe, tmp_path / str(i), resume=False)
        assert not list((tmp_path / str(i)).rglob("round-*"))
    with pytest.raises(ModelError, match=r"model.source.*BertModel"):
        load_base_model(ModelSettings(str(tiny_bert)), generates=True)


def test_a_site_without_a_generator_cannot_join(tiny_bert: Path, tmp_path: Path) -> None:
    plan = Plan("tiny", 1, ModelSettings(str(tiny_bert), max_length=8), transfer=SETTINGS)
    rows = SiteDataset("ada", "classification", [{"text": "a b", "label": "x"}], (), ("x", "y"))
    trainer = Trainer(
        attach_adapters(load_base_model(plan.model, generates=False), plan), rows, StateStore(tmp_path, "tiny")
    )
    with pytest.raises(ModelError, match=r"transfer.generator.model is not set"):
        trainer.site_info()
