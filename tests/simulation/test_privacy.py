"""Every message of whole runs, with decoded payloads, is searched for personal tensors and texts."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Message

from colora.client.training import trainer as trainer_module
from colora.client.training.trainer import Trainer
from colora.common.config.loader import recipe_from
from colora.common.methods import METHODS
from colora.common.protocol import flower_messages as messages
from colora.common.protocol.codec import CODECS, decode
from colora.common.protocol.types import BENEFIT, MAX_BENEFIT
from colora.server.reporting.summary import summarize
from colora.simulation.run import simulate
from tests.leaks import Secret, leaks_in, personal_tensors, text_windows


def numbers_of(message: Message) -> np.ndarray:
    """All numbers of a message as float32, with decoded arrays."""
    if not message.has_content():
        return np.zeros(0, np.float32)
    numbers = [np.zeros(0, np.float32)]
    for record in message.content.array_records.values():
        numbers += [part.ravel().astype(np.float32) for entry in record.values() for part in parts_of(entry)]
    for record in (*message.content.metric_records.values(), *message.content.config_records.values()):
        numbers += [np.atleast_1d(v).astype(np.float32) for v in record.values() if isinstance(v, int | float | list)]
    return np.concatenate(numbers)


def parts_of(entry: Array) -> list[np.ndarray]:
    """The arrays in one entry of a record, packed by colora or by Flower."""
    return list(decode(entry.stype, entry.data).values()) if entry.stype in CODECS else [entry.numpy()]


def texts_of(message: Message) -> str:
    """All texts of a message, including error reasons and record keys."""
    if not message.has_content():
        return message.error.reason or ""
    records = [*message.content.config_records.values(), *message.content.metric_records.values()]
    keys = [key for record in message.content.values() for key in record]
    packed = [entry for record in message.content.array_records.values() for entry in record.values()]
    keys += [key for entry in packed if entry.stype in CODECS for key in decode(entry.stype, entry.data)]
    return "\n".join([*keys, *(str(v) for record in records for v in record.values())])


def secrets_of(folder: Path) -> list[Secret]:
    return list(personal_tensors(folder.glob("sites/*/state/round-*")))


def site_texts(folder: Path) -> set[str]:
    return text_windows(folder.glob("sites/*/data/*.jsonl"))


def leaks(seen: list[Message], folder: Path) -> list[str]:
    """Names of the personal tensors and texts that occur in the messages."""
    secrets, windows = secrets_of(folder), site_texts(folder)
    assert secrets
    assert windows
    return leaks_in(np.concatenate(list(map(numbers_of, seen))), "\n".join(map(texts_of, seen)), secrets, windows)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name not in ("colora", "multilora")]


@pytest.mark.parametrize("method", ["colora", "multilora", *SLOW])
def test_nothing_personal_is_in_any_message(
    tiny_recipe: dict, tmp_path: Path, wire: list[Message], method: str
) -> None:
    train = {**tiny_recipe["train"], "persist_optimizer_state": True, "final_steps": 2}
    recipe = recipe_from({**tiny_recipe, "train": train, "method": {"name": method}, "private": "multilora"})
    run = simulate(recipe, tmp_path / "run", resume=False)
    assert len(wire) == 2 * 3 * (1 + 2 + 1), (
        "requests and replies of three sites: join, two rounds and the finalization"
    )
    assert any("private." in name for name, _ in secrets_of(run.path))
    assert leaks(wire, run.path) == []


@pytest.mark.slow
def test_benefit_weights_and_a_spectral_start_send_nothing_personal_but_one_number(
    tiny_recipe: dict, tmp_path: Path, wire: list[Message]
) -> None:
    changes = {"server": {"quorum": 3, "weights": "benefit"}, "adapter": {**tiny_recipe["adapter"], "init": "spectral"}}
    run = simulate(recipe_from({**tiny_recipe, **changes}), tmp_path / "run", resume=False)
    assert leaks(wire, run.path) == []
    replies = [event for event in run.events() if event["event"] == "reply" and event["kind"] == "train"]
    assert replies
    assert all(0 <= event["metrics"][BENEFIT] <= MAX_BENEFIT for event in replies)
    weights = [event["weights"] for event in run.events() if event["event"] == "round"]
    assert set(weights[0].values()) == {1 / 3}
    assert len(set(weights[1].values())) == 3


def test_the_batched_engine_sends_nothing_personal(tiny_recipe: dict, tmp_path: Path, wire: list[Message]) -> None:
    raw = {**tiny_recipe, "simulation": {"threads": 1, "engine": "batched"}, "private": "multilora"}
    run = simulate(recipe_from(raw), tmp_path / "run", resume=False)
    assert len(wire) == 2 * 3 * (1 + 2 + 1)
    assert leaks(wire, run.path) == []


def test_a_trial_sends_nothing_personal(tiny_recipe: dict, tmp_path: Path, wire: list[Message]) -> None:
    run = simulate(
        recipe_from({**tiny_recipe, "server": {"quorum": 3, "groups": "similarity"}}), tmp_path / "run", resume=False
    )
    assert [e["kind"] for e in run.events() if e["event"] == "reply" and e["round"] == 0] == ["trial"] * 3
    assert leaks(wire, run.path) == []


def _plant_array(message: Message, secret: np.ndarray, text: str) -> None:
    message.content[messages.ARRAYS] = messages.pack_arrays({"x": secret})


def _plant_metric(message: Message, secret: np.ndarray, text: str) -> None:
    message.content[messages.METRICS]["x"] = [float(v) for v in secret.ravel()]


def _plant_text(message: Message, secret: np.ndarray, text: str) -> None:
    message.content["note"] = ConfigRecord({"log": f"... {text} ..."})


def test_the_search_finds_what_is_planted(tiny_recipe: dict, tmp_path: Path, wire: list[Message]) -> None:
    run = simulate(recipe_from(tiny_recipe), tmp_path / "run", resume=False)
    assert leaks(wire, run.path) == []
    reply = next(i for i, m in enumerate(wire) if m.has_content() and messages.METRICS in m.content)
    (name, secret), text = secrets_of(run.path)[0], sorted(site_texts(run.path))[0]
    for plant, planted in ((_plant_array, name), (_plant_metric, name), (_plant_text, text)):
        seen = copy.deepcopy(wire)
        plant(seen[reply], secret, text)
        assert planted in leaks(seen, run.path), plant.__name__


def _with_a_core(reply, trainer: Trainer):
    core = {k: v.numpy() for k, v in trainer.values(trainer_module.PERSONAL).items()}
    return dataclasses.replace(reply, shared={**reply.shared, **core})


def test_a_reply_with_an_extra_array_does_not_leave_the_site(
    tiny_recipe: dict, tmp_path: Path, wire: list[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Trainer._send
    monkeypatch.setattr(Trainer, "_send", lambda self, s, reply, *more: send(self, s, _with_a_core(reply, self), *more))
    with pytest.raises(Exception, match="quorum"):
        simulate(recipe_from(tiny_recipe), tmp_path / "run", resume=False)
    reasons = {m.error.reason for m in wire if m.has_error()}
    assert reasons == {"RefusedError: arrays"}
    assert "encoder.layer.0.attention.self.query.lora_core" in (tmp_path / "run" / "log.txt").read_text()


def test_a_reply_with_an_extra_array_is_refused_by_the_coordinator(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Trainer._send

    def send_core(self: Trainer, state, reply, *more):
        sent = send(self, state, reply, *more)
        return _with_a_core(sent, self) if self.site == "bob" else sent

    monkeypatch.setattr(Trainer, "_send", send_core)
    recipe = recipe_from({**tiny_recipe, "server": {"quorum": 2}})
    run = simulate(recipe, tmp_path / "run", resume=False)
    summary = summarize(run.events())
    assert "lora_core" in summary.rows["bob"].failures[1]
    assert {event["field"] for event in run.events() if event["event"] == "refused"} == {"arrays"}
    assert not summary.rows["ada"].failures


def test_an_error_tells_the_coordinator_its_kind_and_no_text(
    tiny_recipe: dict, tmp_path: Path, wire: list[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Trainer, request, state, callback):
        raise ValueError(f"could not read {self.task.rows.train[0]['text']}")

    monkeypatch.setattr(Trainer, "_train", broken)
    with pytest.raises(Exception, match="quorum"):
        simulate(recipe_from(tiny_recipe), tmp_path / "run", resume=False)
    assert {m.error.reason for m in wire if m.has_error()} == {"ValueError"}
