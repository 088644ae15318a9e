"""A site with a resident trainer, as real processes."""

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

from colora.client.trainer_service import serde as parts
from colora.client.trainer_service.client import TrainerClient
from colora.client.trainer_service.proto import trainer_pb2 as wire
from colora.client.trainer_service.proto import trainer_pb2_grpc
from colora.common.config.loader import load_site
from colora.common.config.schema import AdapterSettings, MethodSettings, ModelSettings, Plan, TrainSettings, to_json
from colora.common.protocol.types import TrainReply, TrainRequest
from tests.forked import Forked

LETTERS = "a b c d e f g h i j k l m n o p q r s t u v w x y z".split()  # noqa: SIM905
SERVICE = "colora.client.trainer_service.server"
OFTEN = "from colora.client.trainer_service import server; server.PROGRESS = 0.05"  # seconds between two messages


class TrainerProcess:
    """``main`` of colora.client.trainer_service.server in a process of its own; what it prints is read as it comes."""

    def __init__(self, site_file: Path, before: str = "") -> None:
        """``before`` is code that runs in the process first."""
        self.process = Forked(SERVICE, [site_file], f"{OFTEN}\n{before}", together=True)
        self.lines: list[str] = []
        self.news = threading.Condition()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            with self.news:
                self.lines.append(line.rstrip("\n"))
                self.news.notify_all()
        with self.news:
            self.lines.append("END")
            self.news.notify_all()

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, text: str, seconds: float = 300.0) -> TrainerProcess:
        """Until a line says so, or the process has ended."""
        with self.news:
            self.news.wait_for(lambda: any(text in line or line == "END" for line in self.lines), seconds)
        assert text in self.log, f"nothing about {text!r} in:\n{self.log}"
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
class House:
    """A site's folder and its plan; its trainers end with the test."""

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

    def furnish(self, *extra: str, listen: str = "unix:state/trainer.sock", data: str = "", trainer: str = "") -> House:
        """Writes the site file; ``extra`` lines come last."""
        trainer = f'[trainer]\nlisten = "{listen}"\nthreads = 1\ndevice = "cpu"\n{trainer}\n'
        source = data or 'source = "rows.csv"\n'
        self.file.write_text(f'name = "{self.name}"\n[data]\n{source}{trainer}' + "\n".join(extra) + "\n")
        rows = [f"{' '.join(np.roll(LETTERS, k)[:8])},{('no', 'yes')[k % 2]}" for k in range(24)]
        (self.folder / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
        return self

    def start(self, before: str = "") -> TrainerProcess:
        """A trainer that listens."""
        self.running.append(TrainerProcess(self.file, before))
        return self.running[-1].wait_for("listens at")

    @property
    def address(self) -> str:
        return load_site(self.file).trainer.listen

    def connection(self, **changes: Any) -> TrainerClient:
        return TrainerClient(**{"name": self.name, "address": self.address, "link": "", **changes})

    def plan(self, name: str = "town", *, method: str = "colora", rounds: int = 4, **train: Any) -> Plan:
        settings = TrainSettings(**{"steps": 2, "batch_size": 4, "lr": 1e-2, **train})
        adapter = AdapterSettings(4, 8.0, 0.0, ("query", "value"))
        model, row = ModelSettings(str(self.model), max_length=16), MethodSettings(method)
        return Plan(name, rounds, model, seed=3, adapter=adapter, method=row, train=settings)

    def order(self, plan: Plan, t: int = 1, /, *, seed: int = 0, **changes: Any) -> TrainRequest:
        """Round t of a plan with a shared adapter that does something."""
        from colora.common.adapters.initialization import initial_shared_state

        rng = np.random.default_rng(seed)
        start = initial_shared_state(plan)
        shared = {key: value + rng.normal(0, 0.3, value.shape).astype(np.float32) for key, value in start.items()}
        values = {"round": t, "admitted_round": t - 1, "kind": "train", "evaluate": True, "shared": shared}
        return TrainRequest(**{**values, "federation": plan.name, "plan": to_json(plan), **changes})

    def oracle(self, plan: Plan, *orders: TrainRequest) -> list[TrainReply]:
        """What a Trainer in this process answers."""
        import torch

        from colora.client.data.selection import load_site_rows
        from colora.client.training.adapted_model import attach_adapters
        from colora.client.training.state_store import StateStore
        from colora.client.training.trainer import Trainer
        from colora.common.models.base_model import load_base_model

        torch.set_num_threads(1)
        site = load_site(self.file)
        base = load_base_model(plan.model, generates=site.data.task == "generation")
        store = StateStore(self.folder / "oracle" / plan.name, plan.name)
        trainer = Trainer(attach_adapters(base, plan), load_site_rows(site, plan.seed), store)
        return [trainer.handle(order) for order in orders]

    def audit(self, federation: str = "town") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.state / federation / "audit.jsonl").read_text().splitlines()]

    @contextmanager
    def call(self, *sent: wire.OrderPart) -> Iterator[Any]:
        """A bare call of Train, to say and see what the connection never would."""
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(parts.target_of(self.address), options) as channel:
            yield trainer_pb2_grpc.TrainerStub(channel).Train(iter(sent))

    @staticmethod
    def alike(one: TrainReply, other: TrainReply) -> bool:
        """Bit for bit, but for the seconds that it took."""
        bits = [
            {key: (str(v.dtype), v.shape, v.tobytes()) for key, v in reply.shared.items()} for reply in (one, other)
        ]
        told = [{**vars(reply), "shared": None, "seconds": None} for reply in (one, other)]
        return bits[0] == bits[1] and told[0] == told[1]


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
def house(tiny_bert: Path, tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path, tiny_bert)
    yield made
    for trainer in made.running:
        trainer.end(signal.SIGKILL)


@pytest.fixture(scope="session")
def standing(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A house whose trainer runs for all tests; each test has a federation of its own."""
    made = House(tmp_path_factory.mktemp("house"), tiny_bert).furnish()
    try:
        made.start()
        yield made
    finally:
        for trainer in made.running:
            trainer.end(signal.SIGKILL)
