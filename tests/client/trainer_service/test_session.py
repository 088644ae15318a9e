"""The base model stays in memory while plans change, and no plan leaves a trace on it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch

from colora.client.trainer_service import session as module
from colora.client.trainer_service import time_limit
from colora.client.trainer_service.session import TrainerSession
from colora.client.training.trainer import Trainer
from colora.common.adapters.inject import attach, detach
from colora.common.config.loader import load_site
from colora.common.config.schema import Plan, to_json
from colora.common.errors import ColoraError, ConfigError, DataError, RefusedError, StateError
from colora.common.models.base_model import load_base_model

if TYPE_CHECKING:
    from conftest import SiteSetup


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every base model that is loaded."""
    seen: list[str] = []

    def counting(settings: module.ModelSettings, *, generates: bool) -> module.BaseModel:
        seen.append(f"{settings.device} {settings.max_length}")
        return load_base_model(settings, generates=generates)

    monkeypatch.setattr(module, "load_base_model", counting)
    return seen


def accepted(session: TrainerSession, plan: Plan) -> Plan:
    return session.accept(plan.name, to_json(plan))


def test_the_base_model_is_read_again_only_when_the_plan_names_another(site_setup: SiteSetup, loads: list[str]) -> None:
    session = TrainerSession(load_site(site_setup.configure().file))
    plan = site_setup.plan()
    other_rank = dataclasses.replace(plan, adapter=dataclasses.replace(plan.adapter, rank=2))
    longer = dataclasses.replace(plan, model=dataclasses.replace(plan.model, max_length=8))
    for each, count in (
        (plan, 1),
        (plan, 1),
        (other_rank, 1),
        (site_setup.plan("other", method="fedit"), 1),
        (longer, 2),
    ):
        session.trainer(accepted(session, each))
        assert len(loads) == count
    same = session.trainer(accepted(session, longer))
    assert session.trainer(accepted(session, longer)) is same


def test_the_device_is_the_sites_whatever_the_plan_says(site_setup: SiteSetup, loads: list[str]) -> None:
    session = TrainerSession(load_site(site_setup.configure().file))
    plan = site_setup.plan()
    there = dataclasses.replace(plan, model=dataclasses.replace(plan.model, device="cuda:7"))
    session.trainer(accepted(session, there))
    assert loads == ["cpu 16"]


def test_a_plan_that_cannot_be_built_does_not_spoil_the_next_one(site_setup: SiteSetup, loads: list[str]) -> None:
    session = TrainerSession(load_site(site_setup.configure().file))
    plan, request = site_setup.plan(), site_setup.request(site_setup.plan())
    broken = dataclasses.replace(plan, adapter=dataclasses.replace(plan.adapter, target_modules=("no_such_layer",)))
    for _ in range(2):
        with pytest.raises(ColoraError, match=r"adapter.target_modules"):
            session.trainer(accepted(session, broken))
    rows = (site_setup.folder / "rows.csv").read_text()
    (site_setup.folder / "rows.csv").write_text("text,label\n")
    with pytest.raises(DataError):
        session.trainer(accepted(session, plan))
    (site_setup.folder / "rows.csv").write_text(rows)
    reply, stored = session.answer(accepted(session, plan), request, lambda done, total: None)
    assert not stored
    assert site_setup.equal(reply, site_setup.expected(plan, request)[0])
    assert session.answer(accepted(session, plan), request, lambda done, total: None)[1]
    assert len(loads) == 1


def test_detaching_gives_the_backbone_back_to_the_bit(site_setup: SiteSetup) -> None:
    plan = site_setup.plan()
    backbone = load_base_model(plan.model, generates=False).backbone
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    ids = torch.arange(8)[None]
    expected = backbone(ids).last_hidden_state
    for parameter in attach(backbone, plan.adapter, plan.method.row()).values():
        parameter.data.normal_()
    assert not torch.equal(backbone(ids).last_hidden_state, expected)
    detach(backbone)
    after = backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(backbone(ids).last_hidden_state, expected)
    assert not hasattr(backbone, "peft_config")


@pytest.mark.parametrize(
    ("federation", "text", "message"),
    [
        ("..", '{"name": "..", "rounds": 1, "model": {"source": "x"}}', "name"),
        ("a/b", '{"name": "a/b", "rounds": 1, "model": {"source": "x"}}', "name"),
        ("a\n", '{"name": "a\\n", "rounds": 1, "model": {"source": "x"}}', "name"),
        ("", '{"name": "", "rounds": 1, "model": {"source": "x"}}', "name"),
        ("other", '{"name": "town", "rounds": 1, "model": {"source": "x"}}', "federation"),
        ("town", '{"name": "town", "rounds": 1, "model": {"source": "x"}, "extra": 1}', "extra"),
        ("town", "null", "plan"),
        ("town", '{"name": NaN}', "name"),
    ],
)
def test_what_is_no_plan_of_a_safe_name_touches_nothing(
    site_setup: SiteSetup, federation: str, text: str, message: str
) -> None:
    session = TrainerSession(load_site(site_setup.configure().file))
    with pytest.raises((ConfigError, RefusedError)) as caught:
        session.accept(federation, text)
    assert caught.value.field.endswith(message)
    assert not site_setup.state.exists()


def test_a_site_that_kept_nothing_does_in_a_moved_federation_as_its_file_says(site_setup: SiteSetup) -> None:
    site, plan = load_site(site_setup.configure().file), site_setup.plan("town-on-another")
    plan = dataclasses.replace(plan, transfer=dataclasses.replace(plan.transfer, source_federation="town"))

    def trainer(choice: str) -> Trainer:
        session = TrainerSession(dataclasses.replace(site, on_unprepared=choice))  # type: ignore[arg-type]
        return session.trainer(accepted(session, plan))

    with pytest.raises(StateError, match="kept no seeds"):
        trainer("wait")
    assert trainer("retrain").site_info().train > 0
    evaluating = trainer("evaluate")
    assert evaluating.site_info().train == 0
    assert evaluating.site_info().test > 0
    reply = evaluating.handle(site_setup.request(plan, 5, admitted_round=0, kind="finalize"))
    assert (reply.terms, reply.examples, reply.shared) == (0, 0, {})
    assert {name.partition(".")[0] for name in reply.metrics} == {"base", "shared"}


def test_the_limit_of_seconds_counts_training_and_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a fake clock, in which every forward pass takes 4 s: the third one is too late."""
    now = [0.0]
    monkeypatch.setattr(time_limit.time, "monotonic", lambda: now[0])
    with time_limit.TimeLimit(10.0, "ada") as limit:
        for second, done in ((0.0, 0), (4.0, 1), (8.0, 2)):
            now[0] = second
            limit.on_step(done, 5)
        now[0] = 12.0
        message = r"allow.max_seconds: expected at most 10 s, found more after 2 of 5 steps"
        with pytest.raises(RefusedError, match=message):
            torch.nn.Linear(2, 2)(torch.ones(1, 2))
    torch.nn.Linear(2, 2)(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("limit", "epochs", "refused"),
    [
        ("max_steps = 8", 2.0, None),  # 16 training rows in batches of 4
        ("max_steps = 7", 2.0, "train.epochs: expected at most 7 (allow.max_steps), found 8"),
        ("min_examples = 16", 1.0, None),
        (
            "min_examples = 17",
            1.0,
            "train.epochs: expected at least 17 examples (allow.min_examples), found 1 passes over 16 examples",
        ),
    ],
)
def test_limits_on_steps_apply_to_epochs_of_the_sites_own_rows(
    site_setup: SiteSetup, loads: list[str], limit: str, epochs: float, refused: str | None
) -> None:
    data = 'source = "rows.csv"\ntrain = 16\ntest = 8\n'
    session = TrainerSession(load_site(site_setup.configure("[allow]", limit, data=data).file))
    plan = accepted(session, site_setup.plan(steps=None, epochs=epochs))
    assert session.examples(plan) is None
    for _ in range(2):  # the trainer is kept, and the answer stays
        if refused is None:
            assert session.trainer(plan).examples == 16
            continue
        with pytest.raises(RefusedError) as caught:
            session.answer(plan, site_setup.request(plan), lambda done, total: None)
        assert refused in str(caught.value)
        assert caught.value.public() == "RefusedError: train.epochs"
    assert session.examples(plan) == 16
    assert len(loads) == 1
