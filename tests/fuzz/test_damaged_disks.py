"""Cut files, flipped bits and foreign bytes: nothing damaged is used in silence, and nothing ends in a traceback."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from colora.cli import main
from colora.client.trainer_service.site_secret import site_secret
from colora.client.training.privacy_budget import PrivacyLedger
from colora.client.training.state_store import PersonalState, StateStore
from colora.common.atomic_io import load_arrays, save_arrays
from colora.common.config.schema import to_json
from colora.common.errors import DamagedError, StateError
from colora.common.models.saved import ModelMetadata, read_saved_model
from colora.common.protocol.types import TrainReply
from colora.common.training.accountant import Spending
from colora.server.reporting.events import read_events
from colora.server.reporting.run_folder import RunFolder
from colora.server.rounds.checkpoint import Checkpoints, ServerState, latest_checkpoint_info
from colora.server.rounds.shared_adapter import SharedAdapter

from .test_hostile_sites import recipe

ARRAYS = {"shared/a": np.arange(12, dtype=np.float32).reshape(3, 4), "state/b": np.ones(5, np.float32)}
META = {"federation": "fed", "round": 3, "note": "x" * 40}
SLOW = pytest.mark.slow


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_header(data: bytes, rng: random.Random) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    return flip(data[:end], rng) + data[end:]


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip,
    flip_header,
    lambda data, rng: data[: rng.randrange(len(data))],
    lambda data, rng: data + rng.randbytes(rng.randrange(1, 99)),
    lambda data, rng: rng.randbytes(rng.randrange(len(data))),
    lambda data, rng: b"\x00" * len(data),
)


def same(found: tuple[dict[str, np.ndarray], dict[str, Any]]) -> bool:
    arrays, meta = found
    return meta == META and arrays.keys() == ARRAYS.keys() and all((arrays[k] == ARRAYS[k]).all() for k in ARRAYS)


@pytest.mark.parametrize("count", [400, pytest.param(3000, marks=SLOW)])
def test_damaged_bytes_are_never_read_in_silence(tmp_path: Path, count: int) -> None:
    """A flip that changes nothing that is read, such as of padding, is no damage."""
    path, rng = tmp_path / "round-000003.safetensors", random.Random(10)
    refused: list[str] = []
    save_arrays(path, ARRAYS, META)
    whole = path.read_bytes()
    for number in range(count):
        path.write_bytes(DAMAGES[number % len(DAMAGES)](whole, rng))
        try:
            assert same(load_arrays(path)), f"damage {number} was read in silence"
        except DamagedError as error:
            refused.append(str(error))
    assert len(refused) > 0.95 * count
    assert all(str(path) in text and "\n" not in text for text in refused)


def test_a_file_without_checksums_still_loads(tmp_path: Path) -> None:
    """States and checkpoints of earlier versions have plain JSON as their metadata."""
    path = tmp_path / "old.safetensors"
    save_file(ARRAYS, path, metadata={"colora": json.dumps(META, sort_keys=True)})
    assert same(load_arrays(path))


def test_equal_states_are_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_arrays(tmp_path / name, dict(reversed(ARRAYS.items())) if name == "b" else ARRAYS, META)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def checkpoints(folder: Path) -> Checkpoints:
    written = Checkpoints(folder / "checkpoints", recipe(5))
    for t in (1, 2, 3):
        shared = {"a": np.full((2, 2), t, np.float32)}
        written.write(
            ServerState(t, (SharedAdapter(shared),), pins={"model": "m"}, weights="tokens", task="regression")
        )
    return written


@pytest.mark.parametrize("count", [60, pytest.param(400, marks=SLOW)])
def test_a_damaged_newest_checkpoint_does_not_hide_the_good_older_ones(tmp_path: Path, count: int) -> None:
    kept, rng = checkpoints(tmp_path), random.Random(11)
    newest = tmp_path / "checkpoints" / "round-000003.safetensors"
    whole = newest.read_bytes()
    for number in range(count):
        newest.write_bytes(DAMAGES[number % len(DAMAGES)](whole, rng))
        state = kept.latest()
        assert state is not None
        assert state.shared["a"].tolist() == [[state.round] * 2] * 2
        assert (state.round, kept.damaged) in ((2, [newest.name]), (3, []))
        info, _ = latest_checkpoint_info(newest.parent)
        assert info is not None
        assert info.round in (2, 3)


def test_if_all_checkpoints_are_damaged_one_sentence_says_what_to_do(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StateError, match=r"are damaged: .*Restore one from a backup, or delete them to begin again"):
        kept.latest()


def site_states(folder: Path) -> StateStore:
    store, plan = StateStore(folder, "fed"), to_json(recipe(5).plan)
    for t in (1, 2, 3):
        reply = TrainReply("ada", "fed", t, f"key {t}", {"a": np.full(3, t, np.float32)}, 1, 1)
        state = PersonalState(t, t - 1, t, {"core": torch.full((2,), float(t))}, plan=plan)
        store.write(state, reply, ModelMetadata("fed", t, plan, "ada", "regression"), {})
    return store


@pytest.mark.parametrize("count", [60, pytest.param(400, marks=SLOW)])
def test_a_site_continues_from_its_newest_whole_state_and_says_so(
    tmp_path: Path, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    store, rng = site_states(tmp_path), random.Random(12)
    whole = store.path(3).read_bytes()
    for number in range(count):
        store.path(3).write_bytes(DAMAGES[number % len(DAMAGES)](whole, rng))
        caplog.clear()
        state = store.state(3)
        assert state is not None
        assert state.tensors["core"].tolist() == [float(state.round)] * 2
        assert ("Round 4 continues from the state of round 2." in caplog.text) == (state.round == 2)
        reply = store.reply(3, "key 3")
        assert reply is None or reply.shared["a"].tolist() == [3.0] * 3
        store.prune(3)
        assert store.path(2).exists()
        model = read_saved_model(tmp_path)
        assert model.personal["core"].tolist() == [float(model.metadata.round)] * 2


def test_a_site_whose_states_are_all_damaged_starts_from_the_shared_adapter(tmp_path: Path) -> None:
    store = site_states(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b"damaged")
    assert store.state(3) is None
    with pytest.raises(DamagedError):
        read_saved_model(tmp_path)


@pytest.mark.parametrize("count", [100, pytest.param(600, marks=SLOW)])
def test_damaged_rosters_and_event_logs_give_sentences(tmp_path: Path, count: int) -> None:
    rng, run = random.Random(13), RunFolder(tmp_path)
    roster = json.dumps([["ada", 1], ["bob", 3]]).encode()
    line = json.dumps({"time": 1.0, "event": "round", "round": 1, "admitted": ["ada"], "weights": {}, "seconds": 1.0})
    refused: list[str] = []
    for number in range(count):
        damage = DAMAGES[number % len(DAMAGES)]
        run.roster.write_bytes(damage(roster, rng))
        try:
            assert len(run.read_roster()) > 0
        except StateError as error:
            refused.append(str(error))
        (tmp_path / "events.jsonl").write_bytes(damage(f"{line}\n".encode() * 4, rng) + f"\n{line}\n".encode())
        assert read_events(tmp_path / "events.jsonl")[-1]["event"] == "round"
    assert all("is missing or damaged" in text for text in refused)


def doctor(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str, str]:
    monkeypatch.setattr(sys, "argv", ["colora", "doctor", str(folder)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, *capsys.readouterr()


def test_doctor_lists_what_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints(tmp_path)
    site_states(tmp_path / "sites" / "ada" / "state")
    (tmp_path / "roster.json").write_text('[["ada", 1]]')
    code, out, err = doctor(tmp_path, monkeypatch, capsys)
    assert (code or 0, err) == (0, "")
    assert "ok       checkpoints/round-000003.safetensors  round 3, 1 arrays, SHA-256 checked" in out
    assert out.endswith("All 7 files are whole.\n")
    for path in (tmp_path / "roster.json", tmp_path / "checkpoints" / "round-000003.safetensors"):
        path.write_bytes(path.read_bytes()[:-3])
    (tmp_path / "events.jsonl").write_text('{"time": NaN}\n')
    code, out, err = doctor(tmp_path, monkeypatch, capsys)
    assert (code, err) == (1, "")
    assert [line.split()[1] for line in out.splitlines() if line.startswith("DAMAGED")] == [
        *("checkpoints/round-000003.safetensors", "events.jsonl", "roster.json")
    ]
    assert out.endswith("3 of 8 files are damaged.\n")
    site = tmp_path / "site"
    site.mkdir()
    site_secret(site)
    PrivacyLedger(site / "privacy.json").spend("town", "k", Spending(1.0, 0.5, 3))
    out = doctor(site, monkeypatch, capsys)[1]
    assert "ok       privacy.json  1 spendings of the privacy budget" in out
    assert "ok       site.secret  the secret of the site" in out
    for name in ("privacy.json", "site.secret"):
        data = bytearray((site / name).read_bytes())
        data[-5] ^= 1
        (site / name).write_bytes(data)
    assert doctor(site, monkeypatch, capsys)[1].count("DAMAGED") == 2
    code, out, err = doctor(tmp_path / "nowhere", monkeypatch, capsys)
    assert (code, err) == (
        2,
        f"colora: {tmp_path / 'nowhere'} is not a folder. Name a run folder or a site's folder.\n",
    )


def test_every_foreign_string_of_a_card_is_escaped(tmp_path: Path) -> None:
    from colora.client.artifacts.exported_adapter import ExportedAdapter
    from colora.client.artifacts.model_card import render_model_card

    site_states(tmp_path)
    saved = read_saved_model(tmp_path)
    evil = "x](javascript:x) <script>\n## owned"
    model = dataclasses.replace(saved.plan.model, source=evil)
    object.__setattr__(model, "revision", '"); import os #')  # past the schema, which refuses it
    metadata = dataclasses.replace(saved.metadata, site=evil, federation=evil, task="classification")
    saved = dataclasses.replace(saved, plan=dataclasses.replace(saved.plan, model=model), metadata=metadata)
    card = render_model_card(ExportedAdapter(saved, "all", {}, {}, ()), merged=False)
    code = card.partition("```python\n")[2].partition("\n```")[0]
    compile(code, "card", "exec")
    assert 'revision="\\"); import os #"' in code
    text = card.partition("\n---\n")[2].replace(code, "")
    assert "<script>" not in text
    assert "](javascript" not in text
    assert "\n## owned" not in text
