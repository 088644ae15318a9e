"""A site whose trainer runs as a real process."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from colora.client.trainer_service import serde
from colora.client.trainer_service.client import TrainerClient
from colora.client.trainer_service.proto import trainer_pb2 as pb
from colora.client.trainer_service.proto import trainer_pb2_grpc
from colora.common.config.loader import load_site
from colora.common.config.schema import AdapterSettings, MethodSettings, ModelSettings, Plan, TrainSettings, to_json
from colora.common.protocol.types import TrainReply, TrainRequest
from tests.forked import Forked

LETTERS = "a b c d e f g h i j k l m n o p q r s t u v w x y z".split()  # noqa: SIM905
SERVICE = "colora.client.trainer_service.server"
FAST_PROGRESS = "from colora.client.trainer_service import server; server.PROGRESS = 0.05"  # seconds


class TrainerProcess:
    """``main`` of colora.client.trainer_service.server in its own process; its output is read continuously."""

    def __init__(self, site_file: Path, before: str = "") -> None:
        """``before`` is code that the process runs first."""
        self.process = Forked(SERVICE, [site_file], f"{FAST_PROGRESS}\n{before}", together=True)
        self.lines: list[str] = []
        self.changed = threading.Condition()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            with self.changed:
                self.lines.append(line.rstrip("\n"))
                self.changed.notify_all()
        with self.changed:
            self.lines.append("END")
            self.changed.notify_all()

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, text: str, seconds: float = 300.0) -> TrainerProcess:
        """Wait until a line contains ``text``. Fails when the process ends first."""
        with self.changed:
            self.changed.wait_for(lambda: any(text in line or line == "END" for line in self.lines), seconds)
        assert text in self.log, f"{text!r} is not in:\n{self.log}"
        return self

    def count(self, text: str) -> int:
        return sum(text in line for line in self.lines)

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(30)
        self.reader.join(10)
        self.process.close()
        return code


@dataclass
class SiteSetup:
    """A site's folder, and the plans, requests and trainer processes of a test."""

    folder: Path
    model: Path
    name: str = "ada"
    running: list[TrainerProcess] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.folder / "site.toml"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def configure(
        self, *extra: str, listen: str = "unix:state/trainer.sock", data: str = "", trainer: str = ""
    ) -> SiteSetup:
        """Write the site file and the rows; ``extra`` lines are appended to the site file."""
        own = f'listen = "{listen}"\nthreads = 1\ndevice = "cpu"'
        seeds = "" if "seeds = " in trainer else 'seeds = "recipe"  # as a Trainer of the test has them'
        trainer = f"[trainer]\n{own}\n{seeds}\n{trainer}\n"
        source = data or 'source = "rows.csv"\n'
        self.file.write_text(f'name = "{self.name}"\n[data]\n{source}{trainer}' + "\n".join(extra) + "\n")
        rows = [f"{' '.join(np.roll(LETTERS, k)[:8])},{('no', 'yes')[k % 2]}" for k in range(24)]
        (self.folder / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
        return self

    def start(self, before: str = "") -> TrainerProcess:
        """Start a trainer and wait until it listens."""
        self.running.append(TrainerProcess(self.file, before))
        return self.running[-1].wait_for("listens on")

    @property
    def address(self) -> str:
        return load_site(self.file).trainer.listen

    def client(self, **changes: Any) -> TrainerClient:
        return TrainerClient(**{"name": self.name, "address": self.address, "link": "", **changes})

    def plan(self, name: str = "town", *, method: str = "colora", rounds: int = 4, **train: Any) -> Plan:
        settings = TrainSettings(**{"steps": 2, "batch_size": 4, "lr": 1e-2, **train})
        adapter = AdapterSettings(4, 8.0, 0.0, ("query", "value"))
        model, row = ModelSettings(str(self.model), max_length=16), MethodSettings(method)
        return Plan(name, rounds, model, seed=3, adapter=adapter, method=row, train=settings)

    def request(self, plan: Plan, t: int = 1, /, *, seed: int = 0, **changes: Any) -> TrainRequest:
        """Return the request for round t of a plan, with a shared adapter that changes the model's output."""
        from colora.common.adapters.initialization import initial_shared_state

        rng = np.random.default_rng(seed)
        start = initial_shared_state(plan)
        shared = {key: value + rng.normal(0, 0.3, value.shape).astype(np.float32) for key, value in start.items()}
        values = {"round": t, "admitted_round": t - 1, "kind": "train", "evaluate": True, "shared": shared}
        return TrainRequest(**{**values, "federation": plan.name, "plan": to_json(plan), **changes})

    def expected(self, plan: Plan, *requests: TrainRequest) -> list[TrainReply]:
        """Return the replies of a Trainer in this process, which those of a trainer process must equal."""
        import torch

        from colora.client.data.selection import load_site_rows
        from colora.client.training.adapted_model import attach_adapters
        from colora.client.training.state_store import StateStore
        from colora.client.training.trainer import Trainer
        from colora.common.models.base_model import load_base_model

        torch.set_num_threads(1)
        site = load_site(self.file)
        base = load_base_model(plan.model, generates=site.data.task == "generation")
        store = StateStore(self.folder / "expected" / plan.name, plan.name)
        trainer = Trainer(attach_adapters(base, plan), load_site_rows(site, plan.seed), store)
        return [trainer.handle(request) for request in requests]

    def audit(self, federation: str = "town") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.state / federation / "audit.jsonl").read_text().splitlines()]

    @contextmanager
    def call(self, *sent: pb.TrainRequestPart) -> Iterator[Any]:
        """Call Train with arbitrary messages, which TrainerClient would never send."""
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(serde.target_of(self.address), options) as channel:
            yield trainer_pb2_grpc.TrainerStub(channel).Train(iter(sent))

    @staticmethod
    def equal(one: TrainReply, other: TrainReply) -> bool:
        """Whether two replies are equal bit for bit, except for the duration."""
        bits = [
            {key: (str(v.dtype), v.shape, v.tobytes()) for key, v in reply.shared.items()} for reply in (one, other)
        ]
        fields = [{**vars(reply), "shared": None, "seconds": None, "measuring": None} for reply in (one, other)]
        return bits[0] == bits[1] and fields[0] == fields[1]


@pytest.fixture(scope="session")
def wide_bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT whose feed-forward layer has LoRA factors of more than 2 MiB at rank 4."""
    import torch
    from transformers import AutoConfig, BertModel

    folder = tmp_path_factory.mktemp("wide-bert")
    shutil.copytree(tiny_bert, folder, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(tiny_bert)
    config.intermediate_size, config.num_hidden_layers = 150_000, 1
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def site_setup(tiny_bert: Path, tmp_path: Path) -> Iterator[SiteSetup]:
    made = SiteSetup(tmp_path, tiny_bert)
    yield made
    for trainer in made.running:
        trainer.end(signal.SIGKILL)


@pytest.fixture(scope="session")
def running_site(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SiteSetup]:
    """A site whose trainer runs for all tests; each test uses its own federation."""
    made = SiteSetup(tmp_path_factory.mktemp("site_setup"), tiny_bert).configure()
    try:
        made.start()
        yield made
    finally:
        for trainer in made.running:
            trainer.end(signal.SIGKILL)
