"""Small JSON files that are cut, nested deeply or of other types: one sentence, or they count as missing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from colora.client.artifacts.synthetic_data import ROWS, synthetic_rows
from colora.client.artifacts.transfer import JOB, claim_output
from colora.client.deployment.supernode import NodeLease, SuperNode
from colora.client.trainer_service.request_ledger import REQUESTS, check_requests_of_day
from colora.common.config.data_schema import DataSettings
from colora.common.config.site_schema import AllowSettings, SiteSettings, TrainerSettings
from colora.common.errors import DamagedError, StateError
from colora.common.models.sources import _HashCache
from colora.common.processes.health import read_services
from colora.common.protocol.types import PROTOCOL, SiteInfo
from colora.server.reporting.run_folder import RunFolder
from colora.server.rounds.registry import ConnectedSite, _read_cache
from colora.transfer.synthesis import SampleLog

from .test_damaged_disks import site_states
from .test_hostile_sites import recipe

DEEP = b"[" * 100_000
FOREIGN = (b"", b"\xff\xfe", b"[]", b"{}", b"5", b"null", b'"x"', b"[[]]", b"{", DEEP, b'{"a": ' * 50_000, b"9" * 9000)
ODD: tuple[Any, ...] = (None, True, -5, 1.5, 1e400, "", "x", [], [[]], {}, {"x": 1}, 10**30)
INFO = SiteInfo("ada", PROTOCOL, "m", "t", "c", "l", "regression", 20, 5, 0, 0)


def odd_parts(value: Any) -> list[Any]:
    """The value with each part of it replaced by each odd value."""
    found = [odd for odd in ODD if odd != value]
    if isinstance(value, dict):
        found += [{**value, key: odd} for key in value for odd in odd_parts(value[key])]
        found += [{k: v for k, v in value.items() if k != key} for key in value]
    elif isinstance(value, list):
        found += [[*value[:i], odd, *value[i + 1 :]] for i in range(len(value)) for odd in odd_parts(value[i])]
    return found


def damages(value: Any) -> list[bytes]:
    """The file cut at each place, with odd parts, and foreign bytes."""
    whole = json.dumps(value).encode()
    return [*FOREIGN, *(whole[:end] for end in range(len(whole))), *(json.dumps(v).encode() for v in odd_parts(value))]


def is_refused(read: Callable[[], Any], path: Path) -> bool:
    """Whether reading raises one sentence that names the file and says what to do."""
    try:
        read()
    except StateError as error:
        refusal = error
    else:
        return False
    assert str(path) in str(refusal)
    assert refusal.hint, str(refusal)
    assert len(str(refusal).splitlines()) == 1
    return True


def test_the_registry_keeps_the_good_entries_of_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "roll.json"
    good = [
        dataclasses.asdict(ConnectedSite(n, "then", dataclasses.replace(INFO, site=s)))
        for n, s in ((1, "ada"), (2, "bob"))
    ]
    for odd in odd_parts(good[0]):
        path.write_text(json.dumps([odd, good[1]]))
        found = _read_cache(path)
        assert found[2].site == "bob"
        if 1 in found:
            (found_first,) = [site for node, site in found.items() if node != 2]
            info = dataclasses.asdict(found_first.info)
            assert {k: type(v) for k, v in info.items()} == {k: type(v) for k, v in good[0]["info"].items()}
            assert all(0 <= v <= 10**12 for v in info.values() if isinstance(v, int))
    for data in damages(good):
        path.write_bytes(data)
        _read_cache(path)
    for key, value in (("train", -5), ("train", 1e400), ("classes", 10**9), ("task", ["x"]), ("site", "x" * 999)):
        path.write_text(json.dumps([{**good[0], "info": {**good[0]["info"], key: value}}, good[1]]))
        assert list(_read_cache(path)) == [2], key


def test_a_log_of_generated_texts_that_is_damaged_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "written.json"
    SampleLog(path).save()
    assert SampleLog(path).calls == 0
    for data in damages({"calls": 3, "verdicts": {"a b": True, "c": None, "d": False}}):
        path.write_bytes(data)
        if not is_refused(lambda: SampleLog(path), path):
            found = SampleLog(path)
            assert type(found.calls) is int
            assert all(verdict in (None, True, False) for verdict in found.verdicts.values())
    path.write_text('{"calls": "3", "verdicts": {}}')
    with pytest.raises(DamagedError, match=r"written\.json is damaged: expected a count of calls .*Delete it"):
        SampleLog(path)


TEXT = "one\u2028line\u0085each"  # line breaks of Unicode, but not of the file
ROWS_OF: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "classification": (("no", "yes"), {"text": TEXT, "label": "yes", "probabilities": [0.25, 0.75]}),
    "generation": ((), {"prompt": TEXT, "completion": "d"}),
    "generation of a chat": (
        (),
        {"messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "d"}]},
    ),
}


@pytest.mark.parametrize("kind", ROWS_OF)
def test_synthetic_rows_of_an_earlier_call_are_checked(tmp_path: Path, kind: str) -> None:
    labels, row = ROWS_OF[kind]
    saved: Any = SimpleNamespace(metadata=SimpleNamespace(task=kind.split()[0], labels=labels))
    path, line = tmp_path / ROWS, json.dumps(row, ensure_ascii=False).encode() + b"\n"

    def read() -> list[dict[str, Any]]:
        return synthetic_rows(saved, None, tmp_path)  # type: ignore[arg-type]

    path.write_bytes(line * 2)
    assert read() == [row, row]
    texts = ("text", "prompt", "completion", "content", "label")
    for data in damages(row):
        path.write_bytes(line + data)  # without its newline
        assert is_refused(read, path) or not data
        path.write_bytes(line + data + b"\n")
        if not is_refused(read, path):
            (_, odd) = read()
            assert odd.keys() == row.keys()
            assert all(isinstance(odd[key], str) for key in texts if key in odd)


def test_a_damaged_job_file_is_one_sentence(tmp_path: Path) -> None:
    saved: Any = SimpleNamespace(path=tmp_path / "state")
    saved.path.write_bytes(b"a model")
    plan, out = recipe(1).plan, tmp_path / "out"
    claim_output(saved, plan, out)
    claim_output(saved, plan, out)
    for data in damages(json.loads((out / JOB).read_text())):
        (out / JOB).write_bytes(data)
        with pytest.raises(StateError, match="Choose another --out"):
            claim_output(saved, plan, out)


def test_services_with_other_types_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "services.json"
    for data in damages({"gateway": "127.0.0.1:1", "pids": {"server": 5, "client": None}}):
        path.write_bytes(data)
        if not is_refused(lambda: read_services(tmp_path), path):
            found = read_services(tmp_path)
            assert found
            found.processes()
            assert all(isinstance(address, str) for address in found.addresses.values())


def test_a_damaged_cache_of_hashes_counts_as_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colora.common.models.sources.cache_folder", lambda: tmp_path)
    good = {"file": "a" * 64}
    for data in [*damages(good), b'{"file": 5}', b'{"file": "not a hash"}']:
        (tmp_path / "hashes.json").write_bytes(data)
        assert _HashCache().known in ({}, good)


def test_a_damaged_ledger_of_requests_is_one_sentence(tmp_path: Path) -> None:
    trainer, allow = TrainerSettings(state=str(tmp_path)), AllowSettings(max_requests_per_day=2)
    site = SiteSettings("ada", DataSettings("a.csv"), trainer=trainer, allow=allow)
    for data in damages({"2026-01-01": ["key"]}):
        (tmp_path / REQUESTS).write_bytes(data)
        is_refused(lambda: check_requests_of_day(site, "one"), tmp_path / REQUESTS)
    (tmp_path / REQUESTS).write_text('{"2026-01-01": [5]}')
    with pytest.raises(StateError, match="is damaged"):
        check_requests_of_day(site, "one")


@pytest.mark.parametrize("name", ["../../x", "/etc", "a/b", "", ".x", "-x", "a\n", "x" * 65, True, 5, None, ["ada"]])
def test_a_roster_has_names_of_sites_and_each_once(tmp_path: Path, name: object) -> None:
    run = RunFolder(tmp_path)
    for entries in (
        [["bob", 1], [name, 1]],
        [["bob", 1], ["bob", 2]],
        [["bob", True]],
        [["bob", 0]],
        [["bob"]],
        ["ab"],
    ):
        run.roster.write_text(json.dumps(entries))
        assert is_refused(run.read_roster, run.roster), entries
    for data in damages([["ada", 1]]):
        run.roster.write_bytes(data)
        assert is_refused(run.read_roster, run.roster) or all(isinstance(s, str) for s, _ in run.read_roster())


def test_files_with_other_names_are_no_states(tmp_path: Path) -> None:
    store = site_states(tmp_path)
    copy = (tmp_path / "round-000003.safetensors").read_bytes()
    for name in ("round-000003 (copy)", "round-3", "round-0000003", "round-00000x", "round-"):
        (tmp_path / f"{name}.safetensors").write_bytes(copy)
    newest = store.newest()
    assert newest
    assert newest.round == 3
    store.path(3).write_bytes(b"damaged")
    older = store.state(3)
    assert older
    assert older.round == 2
    store.prune(3)
    assert (tmp_path / "round-000003 (copy).safetensors").exists()


def test_a_damaged_lease_of_a_node_counts_as_none(tmp_path: Path) -> None:
    lease = NodeLease(1, 2, 3.5, "host", "boot")
    node: Any = SimpleNamespace(lease_file=tmp_path / "node.json")
    for data in damages(dataclasses.asdict(lease)):
        node.lease_file.write_bytes(data)
        found = SuperNode._read_lease(node)
        assert found is None or [type(v) for v in dataclasses.astuple(found)] == [int, int, float, str, str]
    node.lease_file.write_text(json.dumps(dataclasses.asdict(lease)))
    assert SuperNode._read_lease(node) == lease
