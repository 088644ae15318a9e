"""The checks pass at a good site, and report exactly what is broken at a bad one, without values of the data."""

from __future__ import annotations

import datetime
import hashlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from rich.console import Console

from colora.cli import main
from colora.client.deployment.checks import preflight as module
from colora.client.deployment.checks import system
from colora.client.deployment.checks.preflight import preflight, print_checks
from colora.client.deployment.checks.result import CheckResult, size
from colora.client.trainer_service.session import TrainerSession
from colora.common.config.loader import load_recipe, load_site
from colora.common.config.schema import to_json
from colora.server.deployment.gateway.proxy import Upstream
from colora.server.deployment.gateway.server import GatewayServer, ListenAddress
from colora.server.deployment.provisioning import certificates
from colora.server.deployment.provisioning.provision import provision
from tests.conftest import labelled_rows, write_lines

SECRET = "zzgeheim"  # a word in the rows that no result may show
EVERYTHING = ["site file", "data", "labels", "device", "threads", "memory", "model", "tokens", "state"]
EVERYTHING += ["plans", "socket", "key", "CA", "coordinator"]


def make_keys(folder: Path) -> Path:
    plan = folder / "sites.toml"
    plan.write_text('[coordinator]\naddress = "localhost:9443"\n[[site]]\nname = "north"\n')
    provision(plan, folder / "keys")
    return folder / "keys"


@contextmanager
def gate(keys: Path | None) -> Iterator[str]:
    """The address of a coordinator's gateway, which answers /health without a SuperLink."""
    server = keys / "coordinator" / "server.crt" if keys else None
    listen = ListenAddress("127.0.0.1", 0, server, server.with_suffix(".key") if server else None)
    with GatewayServer(listen, Upstream("http://127.0.0.1:1")) as opened:
        yield f"localhost:{opened.port}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def address(made: Path) -> Iterator[str]:
    with gate(made) as where:
        yield where


@dataclass
class Place:
    """A site's folder, whose file is written again for every change."""

    folder: Path
    raw: dict[str, Any]

    @property
    def path(self) -> Path:
        path = self.folder / "site.toml"
        path.write_text(tomli_w.dumps(self.raw))
        return path

    def check(self, **options: Any) -> dict[str, CheckResult]:
        results = list(preflight(self.path, **options))
        assert len({result.name for result in results}) == len(results)
        for result in results:
            assert SECRET not in result.detail
            assert "\n" not in result.detail
        return {result.name: result for result in results}

    def failed(self, **options: Any) -> dict[str, str]:
        return {name: result.detail for name, result in self.check(**options).items() if not result.ok}


@pytest.fixture
def place(made: Path, address: str, tiny_bert: Path, tmp_path: Path) -> Place:
    """A good site: provisioned, with rows, a model and a coordinator that answers."""
    folder = shutil.copytree(made / "sites/north", tmp_path / "north")
    rows = labelled_rows(["yes", "no"], 40)
    rows[0]["text"] = f"{SECRET} " + "a " * 298
    rows[1]["text"] = " "
    write_lines(folder / "rows.jsonl", rows)
    raw = {
        "name": "north",
        "data": {"source": "rows.jsonl"},
        "coordinator": {"address": address},
        "trainer": {"threads": 1, "device": "cpu"},
        "allow": {"models": [str(tiny_bert)]},
    }
    return Place(folder, raw)


def test_a_good_site_has_nothing_wrong_and_its_numbers_are_true(place: Place, tiny_bert: Path) -> None:
    before = sorted(place.path.parent.rglob("*"))
    results = place.check()
    assert [f for f in results.values() if not f.ok] == []
    assert list(results) == EVERYTHING
    assert results["data"].detail == "30 training rows, 10 test rows; columns text, label"
    counts = [int(n) for part in results["labels"].detail.split(", ") for n in part.split(" ")[1].split("+")]
    assert (sum(counts[::2]), sum(counts[1::2]), len(counts)) == (30, 10, 4)
    parameters = 44 * 16 + 64 * 16 + 2 * 16 + 2 * 16 + 2 * (4 * (16 * 16 + 16) + 2 * 16 * 32 + 32 + 16 + 4 * 16) + 272
    assert results["model"].detail.startswith(f"{tiny_bert}: {parameters:,} parameters, loaded in ")
    buffers = 2 * 64 * 8  # of positions and token types
    assert results["model"].detail.endswith(f" s, uses {size(4 * parameters + buffers)} of memory (cpu)")
    assert f"the model's weights need {size(4 * parameters)}" in results["memory"].detail
    # 38 texts of 12 words, one of 299, one empty; the tokenizer splits at spaces and adds nothing
    words = "median 12, longest 299; 1 of 39 texts would be truncated to 64 (the model's positions)"
    assert results["tokens"].detail == f"{words}; 1 empty rows would be left out"
    assert "(not created yet)" in results["state"].detail
    assert results["key"].detail.startswith("ECDSA secp384r1, SHA256:")
    assert "valid until 20" in results["CA"].detail
    assert results["coordinator"].detail.endswith("ms, with a certificate of this CA")
    assert sorted(place.folder.rglob("*")) == before  # the checks leave no files behind


def test_the_sites_own_limit_is_the_one_that_texts_are_held_against(place: Place) -> None:
    place.raw["allow"]["max_tokens"] = 11
    assert "; 39 of 39 texts would be truncated to 11 (allow.max_tokens)" in place.check()["tokens"].detail


def test_texts_in_words_that_the_tokenizer_does_not_know_are_told(place: Place) -> None:
    rows = [{"text": f"red cat qqq{i} zzz", "label": f"topic-{i % 4}"} for i in range(40)]
    write_lines(place.folder / "rows.jsonl", rows)
    assert place.check()["tokens"].detail.endswith("; 50% of the tokens are unknown to the tokenizer")


def test_without_a_model_all_else_is_looked_at(place: Place, tiny_bert: Path) -> None:
    for models in (None, ["a", "b"]):
        place.raw["allow"] = {"models": models} if models else {}
        results = place.check()
        assert all(f.ok for f in results.values())
        assert results["model"].detail == results["tokens"].detail == module.NO_MODEL
    assert place.check(model=str(tiny_bert))["model"].detail.startswith(str(tiny_bert))


def test_a_site_that_generates_counts_prompt_and_answer(place: Place, tiny_llama: Path) -> None:
    place.raw["data"] |= {"task": "generation"}
    write_lines(place.folder / "rows.jsonl", [{"prompt": "a b c", "completion": "d e"} for _ in range(8)])
    results = place.check(model=str(tiny_llama))
    assert [f for f in results.values() if not f.ok] == []
    assert results["labels"].detail == "none: the task is generation"
    assert results["tokens"].detail.startswith("median 6, longest 6; 0 of 8 ")  # and the end of the text


def test_what_was_decided_about_a_file_is_shown(place: Place) -> None:
    rows = "".join(f"a b {word};{'yes' if i % 2 else 'no'}\n" for i, word in enumerate("cdefghijkl"))
    (place.folder / "rows.csv").write_text(f"text;label\n{rows}")
    place.raw["data"]["source"] = "rows.csv"
    detail = place.check()["data"].detail
    assert detail.startswith("8 training rows, 2 test rows; columns text, label; ")
    assert detail.endswith("rows.csv was read with a semicolon between columns; set data.delimiter if it is wrong")


def test_an_unknown_role_is_not_shown(place: Place, tiny_llama: Path) -> None:
    place.raw["data"] |= {"task": "generation"}
    turns = [{"role": "user", "content": "a"}, {"role": SECRET, "content": "b"}]
    write_lines(place.folder / "rows.jsonl", [{"messages": turns}] * 8)
    assert "found another value in every row (values are not shown)" in place.failed(model=str(tiny_llama))["data"]


def test_each_part_looks_at_what_it_needs(place: Place) -> None:
    assert list(place.check(component="trainer")) == EVERYTHING[:11]
    assert list(place.check(component="supernode")) == ["site file", *EVERYTHING[10:]]


def _remove_rows(place: Place) -> None:
    (place.folder / "rows.jsonl").unlink()


def _no_source(place: Place) -> None:
    place.raw["data"]["source"] = ""


def _other_column(place: Place) -> None:
    place.raw["data"]["label"] = "topic"


def _other_test_column(place: Place) -> None:
    rows = [{"text": f"{SECRET} b", "topic": "yes"}]
    place.raw["data"]["test_source"] = str(write_lines(place.folder / "test.jsonl", rows))


def _column_missing_later(place: Place) -> None:
    rows = [{"text": "a", "label": "yes"}, {"text": f"{SECRET} b"}]
    write_lines(place.folder / "rows.jsonl", rows)


def _odd_label(place: Place) -> None:
    write_lines(place.folder / "rows.jsonl", [{"text": SECRET, "label": x} for x in ("yes", "no", 1.5)])


def _label_is_the_text(place: Place) -> None:
    place.raw["data"] |= {"label": "text", "text": "label", "test_source": "test.jsonl"}
    rows = [{"text": f"{SECRET} {i}", "label": "yes"} for i in range(3)]
    write_lines(place.folder / "rows.jsonl", rows[:2])
    write_lines(place.folder / "test.jsonl", rows[2:])


def _no_header(place: Place) -> None:
    (place.folder / "rows.csv").write_text(f"{'very ' * 10}{SECRET},yes\nother,no\n")
    place.raw["data"]["source"] = "rows.csv"


def _no_model(place: Place) -> None:
    place.raw["allow"]["models"] = ["./not-there"]


def _no_device(place: Place) -> None:
    place.raw["trainer"]["device"] = "warp"


def _state_is_a_file(place: Place) -> None:
    (place.folder / "state").touch()


def _long_socket(place: Place) -> None:
    place.raw["trainer"]["listen"] = f"unix:{'s' * 101}"


def _no_key(place: Place) -> None:
    (place.folder / "site.key").unlink()


def _open_key(place: Place) -> None:
    (place.folder / "site.key").chmod(0o640)


def _write_key(place: Place, content: bytes) -> None:
    (place.folder / "site.key").write_bytes(content)


def _public_key(place: Place) -> None:
    _write_key(place, b"ecdsa-sha2-nistp384 AAAA north\n")


def _pem_key(place: Place) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    _write_key(place, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _other_kind_of_key(place: Place) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    _write_key(place, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))


def _locked_key(place: Place) -> None:
    (place.folder / "site.key").unlink()
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "a word", "-f", place.folder / "site.key"]
    subprocess.run(command, check=True)


BREAKS: list[tuple[Callable[[Place], None], str, str]] = [
    (_remove_rows, "data", "data.source: the file rows.jsonl does not exist."),
    (_no_source, "data", "data.source is empty; it must name a file, an asset or a data set"),
    (_other_column, "data", "data.label: expected a column 'topic', found text, label in {folder}/rows.jsonl"),
    (_other_test_column, "data", "data.label: expected a column 'label', found text, topic in {folder}/test.jsonl"),
    (_column_missing_later, "data", "data.label: expected a column 'label', found none in row 2"),
    (
        _odd_label,
        "data",
        "data.label: expected a text or whole number, found another value in row 3 (values are not shown)",
    ),
    (
        _label_is_the_text,
        "data",
        "data.label: expected a label seen in training, found another value (values are not shown)",
    ),
    (
        _no_header,
        "data",
        "data.text: expected a column 'text', found very very very very very very …, yes in {folder}/rows.csv",
    ),
    (
        _no_model,
        "model",
        "./not-there",
    ),
    (_no_device, "device", "trainer.device is 'warp', which is not available here; torch supports {there}"),
    (_state_is_a_file, "state", "{folder}/state is not writable: Not a directory ({folder}/state)"),
    (_no_key, "key", "{folder}/site.key cannot be read: No such file or directory"),
    (_open_key, "key", "{folder}/site.key is accessible to other users (mode 0640); use chmod 600"),
    (_public_key, "key", "{folder}/site.key is not an OpenSSH private key; colora provision creates one"),
    (_pem_key, "key", "{folder}/site.key is not an OpenSSH private key; colora provision creates one"),
    (
        _other_kind_of_key,
        "key",
        "{folder}/site.key is a key of type Ed25519, but Flower needs ECDSA (ssh-keygen -t ecdsa -b 384)",
    ),
]


@pytest.mark.parametrize(("spoil", "name", "message"), BREAKS, ids=[spoil.__name__[1:] for spoil, _, _ in BREAKS])
def test_what_is_broken_is_the_only_thing_wrong(
    place: Place, spoil: Callable[[Place], None], name: str, message: str
) -> None:
    spoil(place)
    gpus = torch.cuda.device_count()
    there = f"cpu and {gpus} CUDA device{'s' * (gpus > 1)}" if gpus else "cpu only"
    ((failed, detail),) = place.failed().items()
    assert failed == name
    assert message.format(folder=place.folder.resolve(), there=there) in detail


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen here")
def test_a_key_with_a_passphrase_is_no_use_to_a_service(place: Place) -> None:
    _locked_key(place)
    told = "has a passphrase, which a service cannot enter; ssh-keygen -p removes it"
    assert place.failed() == {"key": f"{place.folder.resolve()}/site.key {told}"}


def test_a_socket_path_that_the_system_does_not_take_is_found_before_the_start(place: Place) -> None:
    _long_socket(place)
    (message,) = place.failed().values()
    assert message.startswith("trainer.listen: the socket path ")
    assert message.endswith(" bytes, at most 100 are allowed")


def test_one_failure_hides_no_other(place: Place) -> None:
    for spoil in (_remove_rows, _no_model, _no_device, _state_is_a_file, _open_key):
        spoil(place)
    (place.folder / "ca.crt").write_text("no certificate")
    place.raw["coordinator"]["address"] = f"localhost:{closed_port()}"
    results = place.check()
    assert {name for name, f in results.items() if not f.ok} == {
        "data",
        "model",
        "device",
        "state",
        "key",
        "CA",
        "coordinator",
    }
    assert results["labels"].detail == results["tokens"].detail == "not checked: no rows"


def test_labels_that_look_like_texts_are_counted_and_not_shown(place: Place) -> None:
    rows = [{"text": "a b c", "label": f"{SECRET} {'word ' * 8}{i % 3}"} for i in range(40)]
    write_lines(place.folder / "rows.jsonl", rows)
    assert place.check()["labels"].detail.startswith("3 labels with 10 to 10 training rows")
    rows = [{"text": "a b c", "label": str(i % 21)} for i in range(210)]
    write_lines(place.folder / "rows.jsonl", rows)
    assert place.check()["labels"].detail.startswith("21 labels with ")


def test_an_unexpected_error_is_a_finding_by_its_kind_alone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError(SECRET)

    monkeypatch.setattr(module, "load_site_rows", fail)
    assert place.failed() == {"data": "unexpected KeyError"}


def test_a_model_that_does_not_fit_is_not_loaded(
    place: Place, monkeypatch: pytest.MonkeyPatch, tiny_bert: Path
) -> None:
    monkeypatch.setattr(module, "memory_left", lambda: (1000, 2_000_000))
    failed = place.failed()
    assert failed["memory"].startswith("1.0 kB of 2.0 MB free, but the model's weights alone need ")
    assert failed["model"] == f"{tiny_bert} was not loaded: not enough memory"
    assert set(failed) == {"memory", "model"}


def test_a_containers_own_limit_is_what_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "CGROUP", tmp_path)
    free, total = system.memory_left()
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1200\n")
    (tmp_path / "memory.stat").write_text("anon 800\ninactive_file 200\n")
    assert system.memory_left() == (2000, 3000)
    (tmp_path / "memory.max").write_text("max\n")
    assert system.memory_left()[1] == total
    assert free <= total


def test_a_full_disk_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "MIN_DISK", 1 << 62)
    assert "state has only " in place.failed()["state"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_state_folder_of_somebody_else_is_told(place: Place) -> None:
    (place.folder / "state").mkdir(mode=0o500)
    assert "Permission denied" in place.failed()["state"]


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def coordinator(place: Place) -> str:
    """Return the detail of the coordinator's check, which must be the only one that fails."""
    failed = place.failed(component="supernode")
    assert list(failed) == ["coordinator"]
    return failed["coordinator"]


def test_a_coordinator_that_is_down_refuses(place: Place) -> None:
    address = place.raw["coordinator"]["address"] = f"localhost:{closed_port()}"
    assert coordinator(place) == f"{address} refused the connection; nothing listens there"


def test_a_host_that_nobody_knows_is_told(place: Place) -> None:
    place.raw["coordinator"]["address"] = "no-such-host.invalid:9443"
    assert coordinator(place) == "no-such-host.invalid:9443: unknown host"


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":9443", "localhost:http"])
def test_an_address_is_host_and_port(place: Place, address: str) -> None:
    place.raw["coordinator"]["address"] = address
    assert coordinator(place) == f"coordinator.address is {address!r}, not host:port"


def test_a_coordinator_of_another_authority_is_not_trusted(place: Place, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = make_keys(tmp_path / "other")
    shutil.copy(other / "ca.crt", place.folder / "ca.crt")
    signed = "is not signed by this site's CA; this is another coordinator, or ca.crt is out of date"
    assert coordinator(place) == f"the certificate of {place.raw['coordinator']['address']} {signed}"


def test_a_certificate_for_other_names_is_not_trusted(place: Place, tmp_path: Path, made: Path) -> None:
    authority = certificates.Authority.read(
        certificates.Pair((made / "ca.crt").read_bytes(), (made / "ca.key").read_bytes())
    )
    pair = authority.sign("coordinator", "coordinator", certificates.SERVER, ["elsewhere.example.org"])
    (tmp_path / "coordinator").mkdir()
    (tmp_path / "coordinator/server.crt").write_bytes(pair.certificate)
    (tmp_path / "coordinator/server.key").write_bytes(pair.key)
    with gate(tmp_path) as address:
        place.raw["coordinator"]["address"] = address
        told = f"the certificate of {address} is signed by the right CA, but not valid for localhost"
        assert coordinator(place) == told


def test_an_expired_authority_is_named_with_its_day(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    then = datetime.datetime(2010, 1, 1, tzinfo=datetime.UTC)
    monkeypatch.setattr(certificates, "_now", lambda: then)
    (tmp_path / "old").mkdir()
    old = make_keys(tmp_path / "old")
    shutil.copy(old / "ca.crt", place.folder / "ca.crt")
    with gate(old) as address:
        place.raw["coordinator"]["address"] = address
        assert place.failed(component="supernode") == {
            "CA": f"{place.folder.resolve()}/ca.crt expired on 2020-01-01",
            "coordinator": f"the certificate of {address} has expired, or this machine's clock is wrong",
        }


def test_a_certificate_that_is_no_authority_vouches_for_nobody(place: Place, made: Path) -> None:
    shutil.copy(made / "coordinator/server.crt", place.folder / "ca.crt")
    failed = place.failed(component="supernode")
    assert failed["CA"].endswith("ca.crt is not the certificate of a CA, so it cannot verify the coordinator")


def test_without_a_ca_it_is_still_told_whether_somebody_answers(place: Place) -> None:
    (place.folder / "ca.crt").unlink()
    failed = place.failed(component="supernode")
    assert failed["CA"] == f"{place.folder.resolve()}/ca.crt cannot be read: No such file or directory"
    address = place.raw["coordinator"]["address"]
    assert failed["coordinator"] == f"{address} answers, but cannot be verified without a CA certificate"


def test_a_plain_server_is_told_from_one_with_tls_both_ways(place: Place) -> None:
    tls = place.raw["coordinator"]["address"]
    with gate(None) as plain:
        place.raw["coordinator"]["address"] = plain
        assert coordinator(place).startswith(f"{plain} answers without TLS (")
        place.raw["coordinator"]["insecure"] = True
        results = place.check(component="supernode")
        assert all(f.ok for f in results.values())
        assert results["key"].detail == results["CA"].detail == module.INSECURE
    place.raw["coordinator"]["address"] = tls
    told = f"{tls} does not answer plain HTTP, which coordinator.insecure = true requires; it may use TLS"
    assert coordinator(place) == told


def test_another_web_server_is_not_taken_for_a_coordinator(place: Place) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        address = f"localhost:{server.server_port}"
        place.raw["coordinator"] |= {"address": address, "insecure": True}
        told = f"{address} answers /health with status 404, so it is not a colora server"
        assert coordinator(place) == told
        server.shutdown()
        thread.join()


def test_a_server_that_hangs_up_and_one_that_is_silent_are_told_apart(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = place.raw["coordinator"]["address"] = f"127.0.0.1:{listener.getsockname()[1]}"
        with monkeypatch.context() as hasty:
            hasty.setattr("colora.client.deployment.checks.credentials.TIMEOUT", 0.3)
            assert coordinator(place) == f"{address} did not answer within 0.3 s; a firewall may block it"
        listener.accept()[0].close()

        def hang_up() -> None:
            with listener.accept()[0] as connection:
                connection.recv(1)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass

        thread = threading.Thread(target=hang_up)
        thread.start()
        assert coordinator(place) == f"{address} closed the connection during the TLS handshake"
        thread.join()


def test_a_site_without_a_coordinator_can_serve_nobody(place: Place) -> None:
    del place.raw["coordinator"]
    assert coordinator(place) == "the site file has no table [coordinator] with address, ca and key"


def test_a_link_between_containers_is_looked_at_in_both_parts(place: Place) -> None:
    place.raw["trainer"]["listen"] = "trainer:9500"
    link, folder = place.folder / "link", place.folder.resolve() / "link"
    assert place.check(component="supernode")["link"].detail.startswith("supernode, signed by link of north")
    (link / "node.key").unlink()  # the trainer does not need it
    assert place.check(component="trainer")["link"].ok
    assert place.failed(component="supernode") == {
        "link": f"{folder}/node.key cannot be read: No such file or directory"
    }
    shutil.copy(link / "trainer.key", link / "node.key")
    assert place.failed(component="supernode") == {"link": f"{folder}/node.key is not the key of node.crt"}
    shutil.copy(place.folder / "ca.crt", link / "ca.crt")
    assert place.failed(component="supernode") == {"link": f"{folder}/node.crt is not signed by {folder}/ca.crt"}


def test_a_site_file_that_cannot_be_read_is_the_only_finding(place: Place) -> None:
    place.raw["trainer"]["threds"] = 2
    (result,) = place.check().values()
    assert (result.name, result.ok) == ("site file", False)
    assert "Did you mean 'threads'?" in result.detail
    (result,) = preflight(place.folder / "absent.toml")
    assert result.detail.endswith("No such file or directory.")


def test_the_page_has_one_line_a_finding_and_the_exit_code_says_whether_all_is_well() -> None:
    page = io.StringIO()
    console = Console(file=page, width=30)
    good, bad = CheckResult("data", True, "[bold]30 rows[/] " + "x" * 40), CheckResult("coordinator", False, "away")
    assert print_checks([good, bad], console) == 2
    assert page.getvalue().splitlines() == [
        f"ok    data         [bold]30 rows[/] {'x' * 40}",
        "FAIL  coordinator  away",
        "1 of 2 checks failed",
    ]
    assert print_checks([good], console) == 0
    assert page.getvalue().endswith("\nAll checks passed\n")


def test_the_command_ends_with_code_2_where_something_is_wrong(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*options: str) -> tuple[object, list[str]]:
        monkeypatch.setattr(sys, "argv", ["colora", "client", str(place.path), "--check", *options])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, capsys.readouterr().out.splitlines()

    code, lines = run()
    assert (code, len(lines), lines[-1]) == (0, len(EVERYTHING) + 1, "All checks passed")
    _open_key(place)
    assert run("--component", "trainer")[0] == 0
    code, lines = run("--component", "supernode")
    assert (code, len(lines), lines[-1]) == (2, 6, "1 of 5 checks failed")
    assert lines[2].startswith("FAIL  key          ")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_600, "1.0 MB"), (90_870_000, "91 MB"), (1.25e15, "1250 TB")],
)
def test_sizes_read_as_people_say_them(count: float, text: str) -> None:
    assert size(int(count)) == text


def recipe_file(place: Place, **changes: Any) -> Path:
    model = {"source": place.raw["allow"]["models"][0], "max_length": 64}
    raw = {"name": "town", "rounds": 4, "model": model, "site": [{"name": "north"}, {"name": "south"}], **changes}
    path = place.folder / "recipe.toml"
    path.write_text(tomli_w.dumps(raw))
    return path


def test_a_recipe_is_compared_with_the_limits_before_the_site_takes_part(place: Place) -> None:
    accepted = place.check(recipe=recipe_file(place))["recipe"]
    assert accepted.ok
    assert accepted.detail.startswith("town: accepted. No differential privacy")
    private = place.check(recipe=recipe_file(place, privacy={"epsilon": 8.0}))["recipe"]
    assert re.search(r"Differential privacy: .* spend ε = [78](\.\d+)? at δ = 1e-05, in 20 steps ", private.detail)
    place.raw["allow"] |= {"max_epsilon": 5.0}
    refused = place.check(recipe=recipe_file(place, privacy={"epsilon": 8.0}))["recipe"]
    assert not refused.ok
    assert re.match(r"privacy.epsilon: expected at most 5 \(allow.max_epsilon\), found (8|7\.9)", refused.detail)
    assert (
        "privacy: expected differential privacy (allow.max_epsilon)"
        in place.failed(recipe=recipe_file(place))["recipe"]
    )


def test_a_recipe_with_secure_aggregation_needs_a_roster_whose_hash_is_shown(place: Place) -> None:
    settings = {"privacy": {"secure_aggregation": True}, "train": {"max_update_norm": 1.0}}
    with (place.folder / "roster.pub").open("ab") as roster:
        roster.writelines(certificates.new_site_key(name)[1] for name in ("south", "east"))
    detail = place.check(recipe=recipe_file(place, **settings))["recipe"].detail
    digest = hashlib.sha256((place.folder / "roster.pub").read_bytes()).hexdigest()
    assert re.search(rf"Secure aggregation: a roster of 3 sites with the SHA-256 {digest}", detail)
    settings["privacy"] = {"secure_aggregation": True, "min_sites": 40}
    assert (
        "min_sites is 40, but the number of sites is 3" in place.failed(recipe=recipe_file(place, **settings))["recipe"]
    )
    (place.folder / "roster.pub").unlink()
    assert "roster.pub (trainer.roster)" in place.failed(recipe=recipe_file(place, **settings))["recipe"]


def test_a_wrong_recipe_is_named(place: Place) -> None:
    assert "rounds" in place.failed(recipe=recipe_file(place, rounds=0))["recipe"]


def test_the_budget_of_a_recipe_is_what_the_sites_trainer_will_spend(place: Place) -> None:
    """Blank rows are no examples for the recipe's model, and its seed decides which of them are training rows."""
    rows = labelled_rows(["yes", "no"], 40)
    for row in rows[::3]:
        row["text"] = " "
    write_lines(place.folder / "rows.jsonl", rows)
    changes = {"seed": 3, "train": {"epochs": 1.0, "batch_size": 4}, "privacy": {"noise_multiplier": 1.0}}
    path = recipe_file(place, **changes)
    plan = load_recipe(path).plan
    session = TrainerSession(load_site(place.path))
    rounds = session.trainer(session.accept(plan.name, to_json(plan))).private_rounds
    assert rounds is not None
    examples = rounds.forecast.examples
    assert examples < 30
    told = place.check(recipe=path)["recipe"].detail.partition("Differential privacy: ")[2]
    assert told.startswith(
        f"all 4 rounds would spend ε = {rounds.forecast.epsilon():.3g} at δ = 1e-05, in {4 * -(-examples // 4)} steps "
        f"that draw each of the {examples} training examples with probability {4 / examples:.3g} (noise multiplier 1)"
    )


def test_without_the_recipes_model_nothing_is_said_about_the_budget(place: Place, tiny_llama: Path) -> None:
    place.raw["allow"]["models"].append(str(tiny_llama))
    path = recipe_file(place, privacy={"epsilon": 8.0})
    assert "Differential privacy: all 4 rounds" in place.check(recipe=path)["recipe"].detail
    other = place.check(recipe=path, model=str(tiny_llama))["recipe"]
    assert "ε is unknown without the rows and the recipe's base model" in other.detail
    alone = recipe_file(place, privacy={"epsilon": 8.0}, method={"name": "local"})
    assert "spends nothing" in place.check(recipe=alone)["recipe"].detail


def test_the_recipes_own_maximum_length_decides_which_texts_are_cut(place: Place) -> None:
    """38 texts of 12 words and one of 299."""
    model = {"source": place.raw["allow"]["models"][0], "max_length": 11}
    told = place.check(recipe=recipe_file(place, model=model))["tokens"].detail
    assert "39 of 39 texts would be truncated to 11 (the recipe's model.max_length)" in told
