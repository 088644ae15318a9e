"""Refusals of real commands, and the messages for the person who can correct the cause."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import tomli_w

from colora.common.processes.supervised import free_port
from colora.server.deployment.provisioning.provision import provision
from tests.conftest import labelled_rows, write_lines
from tests.server.deployment.gateway.test_proxy import SECRET, SPELLINGS

from .conftest import COLORA, QUIET, Town

pytestmark = [pytest.mark.slow, pytest.mark.endurance]
SECONDS = 120.0  # until a client has printed its message
DATA = ("source", "test_source")


@pytest.fixture(scope="module")
def town(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    """A coordinator with a quorum of one, and one site, which train for as long as the tests take.

    The path of the base model is relative, so that another site can have another base model in its place.
    """
    folder = tmp_path_factory.mktemp("refusals")
    sites = []
    for name in ("ada", "bob", "cyd", "dee"):
        rows = {part: labelled_rows(["yes", "no"], 12, seed) for seed, part in enumerate(DATA)}
        files = {part: str(write_lines(folder / "rows" / f"{name}-{part}.jsonl", rows[part])) for part in DATA}
        sites.append({"name": name, **files})
    recipe = {
        "name": "tiny",
        "rounds": 10_000,
        "model": {"source": "base", "max_length": 16},
        "adapter": {"rank": 4, "target_modules": ["query"]},
        "train": {"steps": 2, "batch_size": 4},
        "server": {"quorum": 1},
        "site": sites,
    }
    shutil.copytree(tiny_bert, folder / "home" / "base")
    town = Town(folder / "town", recipe, home=folder / "home").build()
    try:
        town.start("server", "ada")
        town.wait_for("round", 180, round=1)
        yield town
    finally:
        town.commands["server"].terminate()  # before its site, as it ends after the round
        town.commands["server"].wait(60)
        town.stop()
        for process in town.orphans():
            process.kill()


def copy_of(town: Town, name: str, to: str, *, allow: dict[str, Any] | None = None, **coordinator: Any) -> Path:
    """Return the site file in a copy of a site's folder, without the state."""
    folder = town.folder / to
    shutil.copytree(town.site(name), folder, ignore=shutil.ignore_patterns("state"))
    about = {"address": f"127.0.0.1:{town.port}", **coordinator}
    data = {part: site[part] for site in town.recipe["site"] if site["name"] == name for part in DATA}
    site = {"name": name, "data": data, "coordinator": about, "trainer": {"threads": 1}, "allow": allow or {}}
    (folder / "site.toml").write_text(tomli_w.dumps(site))
    return folder / "site.toml"


def foreign_keys(folder: Path) -> Path:
    """Return the keys of a site with the same name and another CA."""
    (folder / "sites.toml").write_text('[coordinator]\naddress = "127.0.0.1:1"\n[[site]]\nname = "bob"\n')
    provision(folder / "sites.toml", folder / "keys")
    return folder / "keys" / "sites" / "bob"


@contextmanager
def client(file: Path, home: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Run ``colora client`` with readable output; kill it after a timeout."""
    environment = {**os.environ, **QUIET, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*COLORA, "client", str(file), *words],
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    watchdog = threading.Timer(SECONDS, process.kill)
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        process.terminate()
        process.wait(20)
        assert process.stdout
        process.stdout.close()


def until(process: subprocess.Popen[str], of: str) -> str:
    """Return the first line of output that contains ``of``."""
    output = ""
    assert process.stdout
    for line in process.stdout:
        output += line
        if of in line:
            return line.strip()
    raise AssertionError(f"{of!r} is not in:\n{output}")


def message_of(file: Path, town: Town) -> str:
    """Return the message of a SuperNode that cannot connect."""
    with client(file, town.home, "--component", "supernode") as process:
        return until(process, "; re")  # "; restarting it" or "; retrying"


# --- keys and certificates, at the site --------------------------------------------------------


def test_a_key_that_the_coordinator_was_not_given(town: Town, tmp_path: Path) -> None:
    file = copy_of(town, "bob", "unknown")
    shutil.copy(foreign_keys(tmp_path) / "site.key", file.parent / "site.key")
    told = message_of(file, town)
    assert told == "no connection to the coordinator: the coordinator does not know this site's key; retrying"


def test_a_coordinator_that_another_authority_vouches_for(town: Town, tmp_path: Path) -> None:
    file = copy_of(town, "bob", "wrong-ca")
    shutil.copy(foreign_keys(tmp_path) / "ca.crt", file.parent / "ca.crt")
    told = message_of(file, town)
    assert (
        told
        == "no connection to the coordinator: the coordinator's certificate is not signed by this site's CA; retrying"
    )


def test_a_client_without_tls_at_a_coordinator_with_it(town: Town) -> None:
    told = message_of(copy_of(town, "bob", "plain", insecure=True), town)
    where = f"127.0.0.1:{town.port}"
    why = f"{where} does not answer plain HTTP, which coordinator.insecure = true requires; it may use TLS"
    assert told == f"cannot reach the coordinator: {why}; retrying"


def test_a_client_where_nobody_listens(town: Town) -> None:
    where = f"127.0.0.1:{free_port()}"
    told = message_of(copy_of(town, "bob", "nowhere", address=where), town)
    why = f"{where} refused the connection; nothing listens there"
    assert told == f"cannot reach the coordinator: {why}; retrying"


def test_a_client_with_tls_at_a_coordinator_without_it(town: Town, tmp_path: Path) -> None:
    port = free_port()
    words = ["--host", "127.0.0.1", "--port", str(port), "--insecure", "--out", str(tmp_path / "run")]
    with (tmp_path / "server.out").open("wb") as out:
        server = subprocess.Popen(
            [*COLORA, "server", str(town.folder / "recipe.toml"), *words],
            cwd=town.home,
            stdout=out,
            stderr=out,
            env={**os.environ, **QUIET},
        )
    try:
        told = message_of(copy_of(town, "bob", "tls", address=f"127.0.0.1:{port}"), town)
    finally:
        server.terminate()
        server.wait(60)
    assert told == "no connection to the coordinator: the coordinator does not use TLS at this address; retrying"


def test_a_second_client_with_the_same_key_and_the_first_goes_on(town: Town) -> None:
    services = json.loads((town.state("ada").parent / "services.json").read_text())
    before = len(town.events())
    told = message_of(copy_of(town, "ada", "twin"), town)
    why = "another client uses this key, or the coordinator has not yet dropped a client that died (up to a minute)"
    assert told == f"no connection to the coordinator: {why}; retrying"
    town.wait_for("round", 60, round=max(event["round"] for event in town.events("round")) + 2)
    since = town.events()[before:]
    assert {event["event"] for event in since} == {"round_started", "reply", "round"}
    assert all(event["admitted"] == ["ada"] for event in since if event["event"] == "round")
    assert json.loads((town.state("ada").parent / "services.json").read_text()) == services
    assert town.said("ada").count("connected") == 1
    assert "ended" not in town.said("ada")


# --- refusals at both sides -------------------------------------------------------------------


def test_another_base_model(town: Town, tmp_path: Path) -> None:
    """The same name and shapes, but other weights: the coordinator shows both fingerprints."""
    import torch
    from transformers import AutoModel

    home = tmp_path / "home"
    shutil.copytree(town.home / "base", home / "base")
    torch.manual_seed(1)
    AutoModel.from_config(AutoModel.from_pretrained(home / "base").config).save_pretrained(home / "base")
    with client(copy_of(town, "bob", "other-model"), home):
        refused = town.wait_for("refused", SECONDS, site="bob")
    pins = town.events("agreed")[0]["pins"]
    assert (refused["field"], refused["expected"]) == ("model", pins["model"][:16])
    assert re.fullmatch("[0-9a-f]{16}", refused["found"])
    assert refused["found"] != refused["expected"]
    assert f"bob left out: {refused['reason'].removeprefix('site bob: ')}" in town.said("server")
    assert not [event for event in town.events("round") if "bob" in event["admitted"]]


def test_a_method_and_steps_that_the_site_does_not_allow(town: Town) -> None:
    """The site shows the field, the limit and the requested value; the coordinator only error type and field."""
    cases = {
        "cyd": ({"methods": ["fedit"]}, "method.name: expected one of fedit (allow.methods), found 'colora'"),
        "dee": ({"max_steps": 1}, "train.steps: expected at most 1 (allow.max_steps), found 2"),
    }
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(client(copy_of(town, name, f"strict-{name}", allow=allow), town.home))
            for name, (allow, _) in cases.items()
        }
        for name, (_, words) in cases.items():
            assert until(running[name], "refused") == f"refused: site {name}: {words}"
            failed = town.wait_for("failed", SECONDS, site=name)
            assert failed["reason"] == f"RefusedError: {words.partition(':')[0]}"
    for name in cases:
        assert f"{name} left out: RefusedError: " in town.said("server")
        assert not list((town.folder / f"strict-{name}" / "state").rglob("round-*"))


def test_as_one_user_a_client_says_what_that_means(town: Town) -> None:
    assert town.said("ada").startswith(
        "trainer and SuperNode run as one user: code from the coordinator could read this site's files\n"
    )


# --- the public port ------------------------------------------------------------------------------------------------


def control(town: Town, port: int) -> Any:
    """Return Flower's own client of the Control API."""
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    return ControlHttpClient.from_server_address(
        f"127.0.0.1:{port}",
        insecure=False,
        root_certificates=str(town.folder / "keys" / "ca.crt"),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="stranger")],
    )


def inside(town: Town) -> int:
    """Return the loopback port of the coordinator's SuperLink."""
    words = town.below("server", "flower-superlink")[0].cmdline()
    return int(words[words.index("--port") + 1])


def test_from_outside_there_is_no_control_and_no_runtime_api(town: Town) -> None:
    """With Flower's own client, and with every spelling of the paths; the SuperLink itself answers them."""
    from flwr.proto import control_pb2 as asked

    with control(town, inside(town)) as open_door:
        runs = open_door.ListRuns(asked.ListRunsRequest())
        nodes = open_door.ListNodes(asked.ListNodesRequest()).nodes_info
    with control(town, town.port) as outside:
        for call, request in (
            (outside.ListRuns, asked.ListRunsRequest()),
            (outside.ListNodes, asked.ListNodesRequest()),
            (outside.StartRun, asked.StartRunRequest()),
            (outside.RegisterNode, asked.RegisterNodeRequest(public_key=b"key", name="eve")),
        ):
            with pytest.raises(Exception, match=r"404|UNIMPLEMENTED|not found|Not Found"):
                call(request)
    context = ssl.create_default_context(cafile=town.folder / "keys" / "ca.crt")
    for spelling in SPELLINGS.values():
        for path in SECRET:
            target = spelling.format(path, path.removeprefix("/v1/").lstrip("/"), path.upper())
            assert first_line(context, town.port, target) == b"HTTP/1.1 404 Not Found", target
    with control(town, inside(town)) as open_door:
        assert open_door.ListRuns(asked.ListRunsRequest()).run_dict.keys() == runs.run_dict.keys()
        assert [n.name for n in open_door.ListNodes(asked.ListNodesRequest()).nodes_info] == [n.name for n in nodes]
    assert httpx.get(f"https://127.0.0.1:{town.port}/health", verify=context, trust_env=False).text == "ok"


def first_line(context: ssl.SSLContext, port: int, target: str) -> bytes:
    head = f"POST {target} HTTP/1.1\r\nHost: gate\r\nConnection: close\r\nContent-Type: application/protobuf\r\n"
    with (
        socket.create_connection(("127.0.0.1", port), 10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(f"{head}Content-Length: 1\r\n\r\n\n".encode())
        return connection.recv(65536).partition(b"\r\n")[0]
