"""A hostile coordinator: its ClientApp, run by a real SuperNode, attacks a real trainer.

ada and bob run the trainer as another user than the SuperNode; ada has an ``[allow]`` table, bob has none. cyd runs
both as one user: what is found there shows that the search works.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tomli_w

from colora.client.trainer_service.proto import trainer_pb2 as pb
from colora.common.processes.supervised import free_port, listens
from colora.server.deployment import superlink
from colora.server.deployment.gateway.proxy import Upstream
from colora.server.deployment.gateway.server import GatewayServer, ListenAddress
from colora.server.deployment.provisioning.provision import provision
from colora.server.deployment.superlink import SuperLink
from colora.server.deployment.supervisor import read_keys
from tests.conftest import labelled_rows, write_lines
from tests.leaks import leaks_in, numbers_in, personal_tensors, text_windows

from .conftest import COLORA, QUIET
from .other_user import as_user, environment, why_not

pytestmark = [pytest.mark.slow, pytest.mark.endurance]
SECONDS = 400.0
UIDS = {"ada": (61001, 61002), "bob": (61003, 61004), "cyd": (61005, 61005)}  # trainer, SuperNode
HOSTILE = Path(__file__).with_name("hostile")


@dataclass
class Site:
    """A site's two folders (one folder if one user runs both), and what the coordinator got from it."""

    name: str
    top: Path
    listen: str
    seen: dict[tuple[int, int], Path] = field(default_factory=dict)  # every version of every state file
    loot: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def alone(self) -> bool:
        return self.listen.startswith("unix:")

    @property
    def trainer(self) -> Path:
        return self.top / self.name / ("site" if self.alone else "trainer")

    @property
    def node(self) -> Path:
        return self.top / self.name / ("site" if self.alone else "node")

    @property
    def rows(self) -> Path:
        return self.trainer / "data" / "rows.jsonl"

    @property
    def log(self) -> str:
        return (self.trainer / "state" / "logs" / "trainer.log").read_text()

    def furnish(self, keys: Path, about: dict[str, Any]) -> None:
        """Write each process's folder, which its user owns."""
        shutil.copytree(keys / "sites" / self.name, self.trainer)
        if not self.alone:
            shutil.copytree(self.trainer, self.node)
            for path in ("site.key", "ca.crt", "link/node.key", "link/node.crt"):
                (self.trainer / path).unlink()
            for path in ("link/trainer.key", "link/trainer.crt"):
                (self.node / path).unlink()
        write_lines(self.rows, labelled_rows(["quite so", "not at all"], 40, seed=len(self.listen)))
        for folder, uid in zip((self.trainer, self.node), UIDS[self.name], strict=True):
            (folder / "site.toml").write_text(tomli_w.dumps(about))
            for path in (folder, *folder.rglob("*")):
                os.chown(path, uid, uid)
                path.chmod(0o700 if path.is_dir() else 0o600)
        (self.top / self.name).chmod(0o755)

    def watch(self) -> None:
        """Keep a link to every state file, since later rounds replace them."""
        for path in (self.trainer / "state").glob("*/round-*.safetensors"):
            with contextlib.suppress(OSError):
                about = path.stat()
                key = about.st_ino, about.st_mtime_ns
                if key not in self.seen:
                    kept = self.top / "kept" / f"{self.name}-{path.parent.name}-{len(self.seen)}.safetensors"
                    os.link(path, kept)
                    self.seen[key] = kept

    def take(self, folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            what, _, data = path.read_bytes().partition(b"\n")
            self.loot.append((what.decode().partition(" ")[2], data))

    def leaks(self, kind: str = "") -> list[str]:
        """Return what of this site's personal data the coordinator got."""
        secrets, windows = list(personal_tensors(self.seen.values())), text_windows([self.rows])
        assert secrets
        assert windows
        taken = [(what, data) for what, data in self.loot if what.startswith(kind)]
        assert taken
        text = "\n".join(f"{what}\n{data.decode(errors='replace')}" for what, data in taken)
        return leaks_in(np.concatenate([numbers_in(data) for _, data in taken]), text, secrets, windows)

    def replies(self) -> Iterator[pb.TrainReplyPart]:
        for what, data in self.loot:
            if what.startswith("train "):
                yield pb.TrainReplyPart.FromString(data)

    def errors(self) -> list[str]:
        return [data.decode() for what, data in self.loot if what.startswith("error: ")]


def eventually(true: Callable[[], object], seconds: float, about: Callable[[], str] = str) -> None:
    """Poll until a condition holds."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        with contextlib.suppress(OSError, ValueError):
            if true():
                return
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds:g} s: {about()}")


@dataclass
class World:
    """All sites and processes, below one folder that every user may enter."""

    top: Path
    sites: dict[str, Site]
    said: dict[str, Path] = field(default_factory=dict)
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, name: str, folder: Path, uid: int, *words: str) -> None:
        """Run ``colora client`` as another user."""
        hold = self.top / "hold" / name
        hold.mkdir(parents=True)
        self.said[name] = self.top / f"{name}.out"
        command = as_user(uid, [*COLORA, "client", str(folder / "site.toml"), *words], hold)
        more = {**QUIET, "COLORA_CACHE": f"{folder}/cache", "TOKENIZERS_PARALLELISM": "false"}
        with self.said[name].open("wb") as out:
            self.running.append(
                subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, env=environment(folder, **more))
            )

    def start(self, site: Site) -> None:
        trainer, node = UIDS[site.name]
        if site.alone:
            self.run(site.name, site.node, node)
            return
        self.run(f"{site.name}-trainer", site.trainer, trainer, "--component", "trainer")
        self.run(f"{site.name}-supernode", site.node, node, "--component", "supernode")

    def pids(self, site: Site) -> list[int]:
        """Return the process ids of the trainer and of its command."""
        found = json.loads((site.trainer / "state" / "services.json").read_text())["pids"]
        assert psutil.Process(found["trainer"]).uids().real == UIDS[site.name][0]
        return [found["trainer"], found["client"]]

    def stop(self) -> None:
        for process in self.running:
            process.terminate()
        for process in self.running:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def told(self) -> str:
        return "\n".join(f"--- {name}\n{path.read_text()}" for name, path in self.said.items())


def plan_of(model: Path) -> dict[str, Any]:
    return {
        "name": "town",
        "rounds": 4,
        "model": {"source": str(model), "max_length": 16},
        "adapter": {"rank": 4, "alpha": 8.0, "target_modules": ["query", "value"]},
        "method": {"name": "colora"},
        "train": {"steps": 2, "batch_size": 4, "lr": 1e-2, "final_steps": 2, "persist_optimizer_state": True},
    }


def build(top: Path, model: Path, port: int) -> World:
    shutil.copytree(model, top / "model")
    (top / "model").chmod(0o755)
    for path in (top / "model").iterdir():
        path.chmod(0o644)
    (top / "drop").mkdir()
    (top / "drop").chmod(0o1777)
    (top / "kept").mkdir(mode=0o700)
    listen = {"ada": f"127.0.0.1:{free_port()}", "bob": f"127.0.0.1:{free_port()}"}
    listen["cyd"] = f"unix:{top}/cyd/site/state/trainer.sock"
    sites = {name: Site(name, top, listen[name]) for name in UIDS}
    asked = {"coordinator": {"address": f"127.0.0.1:{port}"}, "site": [{"name": name} for name in sites]}
    (top / "sites.toml").write_text(tomli_w.dumps(asked))
    provision(top / "sites.toml", top / "keys")
    (top / "keys").chmod(0o700)
    allow = {"federations": ["town"], "models": [str(top / "model")], "methods": ["colora"], "precision": ["fp32"]}
    allow |= {"max_rank": 4, "max_steps": 2, "max_tokens": 16, "max_seconds": 60.0}
    for site in sites.values():
        trainer = {"listen": site.listen, "threads": 1, "device": "cpu"}
        about = {"name": site.name, "data": {"source": "data/rows.jsonl"}, "trainer": trainer}
        about |= {"coordinator": asked["coordinator"], "allow": allow if site.name == "ada" else {}}
        site.furnish(top / "keys", about)
    return World(top, sites)


@contextlib.contextmanager
def coordinator(world: World, port: int) -> Iterator[SuperLink]:
    """Run a SuperLink behind a gateway, as ``colora server`` does, with another app."""
    stub = superlink.STUB["pyproject.toml"].replace("colora_stub", "hostile")
    files = {f"hostile/{path.name}": path.read_text() for path in HOSTILE.glob("*.py")}
    keys = read_keys(world.top / "keys" / "coordinator")
    run = world.top / "run"
    run.mkdir(mode=0o700)
    link = SuperLink(run / "flower", run, run / "superlink.log", keys.certificates)
    door = ListenAddress("127.0.0.1", port, keys.certificates.certificate, keys.certificates.key)
    with pytest.MonkeyPatch.context() as patch, GatewayServer(door, Upstream(link.url, keys.certificates.ca)) as gate:
        patch.setattr(superlink, "STUB", {"pyproject.toml": stub, **files})
        gate.hold()
        link.start()
        link.prepare()
        try:
            eventually(lambda: listens("127.0.0.1", link.port), 60, (run / "superlink.log").read_text)
            link.register(keys.sites)
            gate.release()
            yield link
        finally:
            link.child.kill()


@pytest.fixture(scope="module")
def world(tiny_bert: Path) -> Iterator[World]:
    """The sites after the attack."""
    top, port, over = Path(tempfile.mkdtemp(prefix="colora-")), free_port(), threading.Event()
    top.chmod(0o755)
    if reason := why_not(UIDS["ada"][0], top / "hold" / "trial"):
        shutil.rmtree(top)
        pytest.skip(reason)
    world = build(top, tiny_bert, port)
    sites = world.sites

    def watch() -> None:
        while not over.wait(0.02):
            for site in sites.values():
                site.watch()

    watcher = threading.Thread(target=watch)
    try:
        for site in sites.values():
            world.start(site)
        with coordinator(world, port) as link:
            eventually(lambda: all("listens on" in site.log for site in sites.values()), 240, world.told)
            about = {
                site.name: {
                    "listen": site.listen,
                    "paths": [str(site.rows), str(site.trainer)],
                    "pids": world.pids(site),
                    "open": site.alone,
                }
                for site in sites.values()
            }
            targets = {"plan": plan_of(top / "model"), "drop": str(top / "drop"), "sites": about}
            (top / "run" / "targets.json").write_text(json.dumps(targets))
            watcher.start()
            link.submit()
            found = [top / "run" / f"{name}.loot" for name in sites]
            log = top / "run" / "superlink.log"
            eventually(
                lambda: all(path.is_dir() for path in found), SECONDS, lambda: world.told() + log.read_text()[-3000:]
            )
        over.set()
        for site in sites.values():
            site.take(top / "run" / f"{site.name}.loot")
            assert not [(what, data) for what, data in site.loot if what.startswith("broken")]
        yield world
    finally:
        over.set()
        if watcher.ident:
            watcher.join()
        world.stop()
        shutil.rmtree(top, ignore_errors=True)


SEPARATE = pytest.mark.parametrize("name", ["ada", "bob"])
PUBLIC = {"cmdline", "status", "task"}  # in /proc, readable for every user
OF_GRPC = {"UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "NOT_FOUND", "UNAVAILABLE"}


@SEPARATE
def test_nothing_personal_and_no_text_comes_out_of_a_trainer_of_another_user(world: World, name: str) -> None:
    site = world.sites[name]
    assert len(site.seen) > 4, "it did train"
    assert len(list(site.replies())) > 100, "and it did answer"
    assert site.leaks() == []
    left = {path.name for path in (world.top / "drop").iterdir()}
    assert left.isdisjoint({"taken"})
    assert f"{name}-code" in left, "its models were tried"


@SEPARATE
def test_nothing_of_the_trainer_can_be_opened(world: World, name: str) -> None:
    site = world.sites[name]
    own = str(site.node)
    opened = [
        what.split(": ", 1)
        for what, _ in site.loot
        if what.startswith(("file: ", "list: ", "link: ", "memory: ", "traced: "))
    ]
    assert {path for _, path in opened if not path.startswith("/proc/")} == set(), f"besides {own}"
    assert {path.rpartition("/")[2] for _, path in opened} <= PUBLIC
    elsewhere = [
        (what, data) for what, data in site.loot if "another's trainer" in what or what.startswith("connected")
    ]
    assert [what.partition(":")[0] for what, _ in elsewhere] == ["error"], "one other site has a port, and no way in"
    assert elsewhere[0][1].startswith(b"StatusCode.UNAVAILABLE")


@SEPARATE
def test_errors_say_their_kind_and_their_field(world: World, name: str) -> None:
    for error in world.sites[name].errors():
        code, details, *_ = error.split("\n")
        if code.removeprefix("StatusCode.") not in OF_GRPC:
            assert code in ("StatusCode.FAILED_PRECONDITION", "StatusCode.ABORTED")
            assert re.fullmatch(r"[A-Z]\w+(: [\w.+*/ ]{1,80})?", details), details


@SEPARATE
def test_whatever_array_came_stands_in_the_audit_log(world: World, name: str) -> None:
    site = world.sites[name]
    lines = [line for path in (site.trainer / "state").glob("*/audit.jsonl") for line in path.read_text().splitlines()]
    noted = {array["sha256"] for line in lines for array in json.loads(line).get("arrays", ())}
    came = [part.chunk for part in site.replies() if part.WhichOneof("part") == "chunk"]
    assert came
    assert {hashlib.sha256(chunk.data).hexdigest() for chunk in came} <= noted
    assert {chunk.name.rpartition(".lora_")[2] for chunk in came} <= {"A.weight", "B.weight"}


def test_a_site_with_limits_answers_its_own_plan_only(world: World) -> None:
    site = world.sites["ada"]
    answered = {what.split(" ", 1)[1] for what, _ in site.loot if what.startswith(("train method", "train source"))}
    same = ("method colora {}", "method colora {'A': 'shared', 'B': 'shared'}")  # as the table has it
    assert answered == {f"{plan}{close}" for plan in same for close in ("", ", close")}
    assert {path.name for path in (site.trainer / "state").iterdir() if path.is_dir()} == {"town", "logs"}


def test_a_site_without_limits_shares_no_group_that_the_table_leaves_at_it(world: World) -> None:
    """The site's log says how to allow it; the coordinator gets only the name of the field."""
    site = world.sites["bob"]
    assert any("RefusedError: method.head" in error for error in site.errors())
    words = 'site bob: method.head: expected personal as in colora (or "colora+head" in allow.methods), found shared'
    assert words in site.log
    assert f"refused: {words}" in world.said["bob-trainer"].read_text()


def test_as_one_user_a_site_is_open_and_says_so_at_its_start(world: World) -> None:
    """The documented limitation; it also shows that the search above works."""
    site = world.sites["cyd"]
    said = world.said["cyd"].read_text()
    assert said.startswith(
        "trainer and SuperNode run as one user: code from the coordinator could read this site's files"
    )
    found = site.leaks("file: ")
    assert [leak for leak in found if "lora_core" in leak]
    assert [leak for leak in found if leak in site.rows.read_text()]
    assert any(what.startswith("memory: ") for what, _ in site.loot)
    for name in ("ada", "bob"):
        assert "one user" not in world.said[f"{name}-trainer"].read_text() + world.said[f"{name}-supernode"].read_text()
