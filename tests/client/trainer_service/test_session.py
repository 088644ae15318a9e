"""The base model stays while plans change, and no plan leaves a trace on it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch

from colora.client.trainer_service import session as module
from colora.client.trainer_service.session import TrainerSession
from colora.client.training.trainer import Trainer
from colora.common.adapters.inject import attach, detach
from colora.common.config.loader import load_site
from colora.common.config.schema import Plan, to_json
from colora.common.errors import ColoraError, ConfigError, DataError, RefusedError, StateError
from colora.common.models.base_model import load_base_model

if TYPE_CHECKING:
    from conftest import House


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the source of every base model that is read."""
    seen: list[str] = []

    def counting(settings: module.ModelSettings, *, generates: bool) -> module.BaseModel:
        seen.append(f"{settings.device} {settings.max_length}")
        return load_base_model(settings, generates=generates)

    monkeypatch.setattr(module, "load", counting)
    return seen


def accepted(resident: TrainerSession, plan: Plan) -> Plan:
    return resident.accept(plan.name, to_json(plan))


def test_the_base_model_is_read_again_only_when_the_plan_names_another(house: House, loads: list[str]) -> None:
    resident = TrainerSession(load_site(house.furnish().file))
    plan = house.plan()
    other_rank = dataclasses.replace(plan, adapter=dataclasses.replace(plan.adapter, rank=2))
    longer = dataclasses.replace(plan, model=dataclasses.replace(plan.model, max_length=8))
    for each, count in ((plan, 1), (plan, 1), (other_rank, 1), (house.plan("other", method="fedit"), 1), (longer, 2)):
        resident.trainer(accepted(resident, each))
        assert len(loads) == count
    same = resident.trainer(accepted(resident, longer))
    assert resident.trainer(accepted(resident, longer)) is same


def test_the_device_is_the_sites_whatever_the_plan_says(house: House, loads: list[str]) -> None:
    resident = TrainerSession(load_site(house.furnish().file))
    plan = house.plan()
    there = dataclasses.replace(plan, model=dataclasses.replace(plan.model, device="cuda:7"))
    resident.trainer(accepted(resident, there))
    assert loads == ["cpu 16"]


def test_a_plan_that_cannot_be_built_does_not_spoil_the_next_one(house: House, loads: list[str]) -> None:
    resident = TrainerSession(load_site(house.furnish().file))
    plan, order = house.plan(), house.order(house.plan())
    broken = dataclasses.replace(plan, adapter=dataclasses.replace(plan.adapter, target_modules=("no_such_layer",)))
    for _ in range(2):
        with pytest.raises(ColoraError, match=r"adapter.target_modules"):
            resident.trainer(accepted(resident, broken))
    rows = (house.folder / "rows.csv").read_text()
    (house.folder / "rows.csv").write_text("text,label\n")
    with pytest.raises(DataError):
        resident.trainer(accepted(resident, plan))
    (house.folder / "rows.csv").write_text(rows)
    reply, stored = resident.answer(accepted(resident, plan), order, lambda done, total: None)
    assert not stored
    assert house.alike(reply, house.oracle(plan, order)[0])
    assert resident.answer(accepted(resident, plan), order, lambda done, total: None)[1]
    assert len(loads) == 1


def test_detaching_gives_the_backbone_back_to_the_bit(house: House) -> None:
    plan = house.plan()
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
    ("federation", "text", "told"),
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
def test_what_is_no_plan_of_a_safe_name_touches_nothing(house: House, federation: str, text: str, told: str) -> None:
    resident = TrainerSession(load_site(house.furnish().file))
    with pytest.raises((ConfigError, RefusedError)) as caught:
        resident.accept(federation, text)
    assert caught.value.field.endswith(told)
    assert not house.state.exists()


def test_a_site_that_kept_nothing_does_in_a_moved_federation_as_its_file_says(house: House) -> None:
    site, plan = load_site(house.furnish().file), house.plan("town-on-another")
    plan = dataclasses.replace(plan, transfer=dataclasses.replace(plan.transfer, source_federation="town"))

    def trainer(choice: str) -> Trainer:
        resident = TrainerSession(dataclasses.replace(site, on_unprepared=choice))  # type: ignore[arg-type]
        return resident.trainer(accepted(resident, plan))

    with pytest.raises(StateError, match="kept no seeds"):
        trainer("wait")
    assert trainer("retrain").site_info().train > 0
    guest = trainer("evaluate")
    assert guest.site_info().train == 0
    assert guest.site_info().test > 0
    reply = guest.handle(house.order(plan, 5, admitted_round=0, kind="finalize"))
    assert (reply.terms, reply.examples, reply.shared) == (0, 0, {})
    assert {name.partition(".")[0] for name in reply.metrics} == {"base", "shared"}


def test_the_limit_of_seconds_counts_from_the_first_step_on(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by hand: measuring before the training took 100 s, and does not count."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    resident = TrainerSession(load_site(house.furnish("[allow]", "max_seconds = 10").file))
    seen: list[tuple[int, int]] = []
    watch = resident._limited(lambda done, total: seen.append((done, total)))
    for second, done in ((100.0, 0), (105.0, 1), (110.0, 2)):
        now[0] = second
        watch(done, 5)
    now[0] = 110.5
    with pytest.raises(RefusedError, match=r"allow.max_seconds: expected at most 10 s, found more after 3 of 5 steps"):
        watch(3, 5)
    assert seen == [(0, 5), (1, 5), (2, 5), (3, 5)]
