"""Memory and arithmetic of a coordinator: many sites with large adapters, one fold, one product-exact mean.

``memory``: the peak resident set of a coordinator with many sites ÷ with few, each with 50 MiB of shared arrays, in one
round. The sites are in another process. Messages cross as Flower's objects, which lie on disk as in a SuperLink, and
all replies of a round are there before the coordinator asks for the first one. ``fold``: seconds to add one update to
the mean, from the file that it waits in, ÷ seconds to copy its bytes in memory. ``product``: seconds of the
product-exact mean of four sites for one module of width 4096 and rank 32.

python benchmarks/coordinator.py [memory fold product]     (all; memory takes 20 minutes, and needs 2 GB of disk)
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from figures import Figure, show
from flwr.app import Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from colora.client.client_app import make_app
from colora.common.atomic_io import ArrayFile, save_arrays
from colora.common.config.loader import recipe_from
from colora.common.config.schema import ServerSettings
from colora.common.event_log import EventLog
from colora.common.protocol.types import PROTOCOL, Arrays, SiteInfo, TrainReply, TrainRequest, hash_layout
from colora.server.flower_compat import set_message_id
from colora.server.rounds.aggregation import RoundState, WeightedUpdate, aggregate
from colora.server.rounds.run_options import RosterEntry, RunOptions
from colora.server.rounds.strategy import AdapterStrategy
from colora.simulation.local_grid import LocalGrid

FEW, MANY, ROUNDS, BARS = 10, 200, 1, (1.1, 6.0, 0.5)
MODULES, RANK, WIDTH = 8, 128, 6400  # 8 × 2 × 128 × 6400 numbers of 4 bytes: 50 MiB


def shapes() -> dict[str, tuple[int, int]]:
    """Names and shapes of 50 MiB of shared arrays."""
    names = [f"base_model.model.layer.{k}.query" for k in range(MODULES)]
    a = {f"{name}.lora_A.weight": (RANK, WIDTH) for name in names}
    return a | {f"{name}.lora_B.weight": (WIDTH, RANK) for name in names}


@dataclass
class Pretender:
    """A site that adds the same noise to what it receives. All sites send equal arrays, which saves disk."""

    name: str

    def site_info(self, federation: str, plan: str) -> SiteInfo:
        layout = hash_layout(shapes())
        return SiteInfo(self.name, PROTOCOL, "model", "tokenizer", "", layout, "regression", 20, 5, 0, 0)

    def handle(self, order: TrainRequest) -> TrainReply:
        rng, step = np.random.default_rng(order.round), np.float32(1e-3)
        sent = {k: v + step * rng.standard_normal(v.shape, np.float32) for k, v in order.shared.items()}
        return TrainReply(self.name, order.federation, order.round, order.key, sent, 10, 5, {"personal.loss": 1.0})


@dataclass
class Store:
    """Objects of messages in a folder, by id: what a SuperLink's database is."""

    folder: Path

    def write(self, message: Message) -> tuple[bytes, bytes]:
        """Write the objects of a message, and return the message without its content, and the tree of its objects."""
        tree = get_object_tree(message)
        for name, thing in get_all_nested_objects(message).items():
            path = self.folder / name
            if not path.exists():
                path.write_bytes(thing.deflate())
        set_message_id(message, message.object_id)
        return message_to_proto(remove_content_from_message(message)).SerializeToString(), tree.SerializeToString()

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


def serve(sites: int, store: Store, pipe: Connection) -> None:
    """Answer requests in a process of their own, until the pipe closes."""
    pretenders = [Pretender(f"site-{k}") for k in range(sites)]

    def connect(context: Context) -> Pretender:
        return pretenders[int(context.node_config["partition-id"])]

    app = make_app(connect)  # type: ignore[arg-type]
    while asked := pipe.recv():
        name, node, tree = asked
        parts = [part.object_id for part in iterate_object_tree(ObjectTree.FromString(tree))]
        message = inflate_object_from_contents(name, {part: store.read(part) for part in parts})
        set_message_id(message, name)
        context = Context(1, node, {"partition-id": node - 1, "num-partitions": sites}, RecordDict(), {})
        pipe.send(store.write(app(message, context)))


class StoredGrid(LocalGrid):
    """A grid like ``HttpGrid``: the coordinator's messages and the replies cross a store, part by part."""

    def __init__(self, sites: int, store: Store, pipe: Connection) -> None:
        super().__init__(make_app(lambda context: Pretender("")), sites)  # type: ignore[arg-type]
        self.sites, self.store, self.pipe = sites, store, pipe
        self.node, self._runtime_client = None, self
        self.open: dict[str, tuple[int, bytes]] = {}  # id of a request → its node, and the tree of its objects

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=k + 1, last_activated_at="now", name=f"site-{k}") for k in range(self.sites)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            _, tree = self.store.write(message)
            ids.append(message.metadata.message_id)
            self.open[ids[-1]] = message.metadata.dst_node_id, tree
        return ids

    def PullMessages(self, request: Any) -> Any:
        """Let the sites answer all requests that are open, and announce their replies."""
        answers = []
        for name in [name for name in request.message_ids if name in self.open]:
            self.pipe.send((name, *self.open.pop(name)))
            answers.append(self.pipe.recv())
        protos = [MessageProto.FromString(proto) for proto, _ in answers]
        return SimpleNamespace(
            messages_list=protos, message_object_trees=[ObjectTree.FromString(tree) for _, tree in answers]
        )

    def PullObject(self, request: Any) -> Any:
        return SimpleNamespace(
            object_found=True, object_available=True, object_content=self.store.read(request.object_id)
        )

    def ConfirmMessageReceived(self, request: Any) -> None: ...


def run(sites: int) -> None:
    """Run a coordinator in this process, and print its peak resident set before the first round and at its end."""
    names = [f"site-{k}" for k in range(sites)]
    raw = {
        "name": "memory",
        "rounds": ROUNDS,
        "model": {"source": "synthetic:bilinear-6"},
        "adapter": {"rank": 2, "target_modules": ["proj"]},
        "data": {"task": "regression"},
        "server": {"quorum": sites},
        "site": [{"name": name, "source": "none.npz"} for name in names],
    }
    initial = {key: np.zeros(shape, np.float32) for key, shape in shapes().items()}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "store").mkdir()
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        worker = multiprocessing.get_context("spawn").Process(
            target=serve, args=(sites, Store(folder / "store"), theirs), daemon=True
        )
        worker.start()
        strategy = AdapterStrategy(
            recipe_from(raw),
            tuple(map(RosterEntry, names)),
            EventLog(folder / "events.jsonl"),
            folder / "spool",
            RunOptions(deployed=True),
        )
        state = strategy.join(StoredGrid(sites, Store(folder / "store"), ours), None, lambda classes: initial)
        before = _peak()
        for t in range(1, ROUNDS + 1):
            state = strategy.aggregate_train(t, state, strategy.configure_train(t, state))
        ours.send(())
    assert len(state.admitted) == sites
    print(json.dumps({"before": before, "peak": _peak()}))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory() -> Iterator[Figure]:
    """Compare the two sizes, each in a new process."""
    peaks = {}
    for sites in (FEW, MANY):
        done = subprocess.run([sys.executable, __file__, "sites", str(sites)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        peaks[sites] = found["peak"]
        yield Figure(f"peak memory, {sites} sites ({found['before']:.0f} before round 1)", [found["peak"]], "MiB")
    yield Figure(f"{MANY} sites ÷ {FEW} sites", [peaks[MANY] / peaks[FEW]], bar=BARS[0])


def updates_in(folder: Path, count: int) -> list[WeightedUpdate]:
    """Write updates to files, as they wait for the end of a round."""
    rng = np.random.default_rng(0)
    for k in range(count):
        arrays: Arrays = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes().items()}
        save_arrays(folder / f"{k}.safetensors", arrays, {}, lasting=False)
    return [WeightedUpdate(1.0 + k, ArrayFile(folder / f"{k}.safetensors")) for k in range(count)]


def fold() -> Iterator[Figure]:
    """Seconds per update of the mean of sixteen ÷ those of a copy."""
    with tempfile.TemporaryDirectory() as folder:
        updates, ratios, seconds = updates_in(Path(folder), 16), [], []
        source = np.ones(sum(map(np.prod, shapes().values())), np.float32)
        target = np.empty_like(source)
        state = RoundState(1, {}, ServerSettings())
        for _ in range(7):
            began = time.perf_counter()
            for _ in updates:
                np.copyto(target, source)
            copied = time.perf_counter()
            aggregate(iter(updates), state)
            seconds.append((time.perf_counter() - copied) / len(updates))
            ratios.append(seconds[-1] * len(updates) / (copied - began))
    yield Figure("fold of one update of 50 MiB", seconds, "s")
    yield Figure("fold ÷ copy of its bytes", ratios, bar=BARS[1])


def product() -> Iterator[Figure]:
    """Seconds of the product-exact mean for one module."""
    rng, width, rank, seconds = np.random.default_rng(0), 4096, 32, []
    module = "base_model.model.layer.0.query"
    updates = [
        WeightedUpdate(
            1.0,
            {
                f"{module}.lora_A.weight": rng.standard_normal((rank, width), np.float32),
                f"{module}.lora_B.weight": rng.standard_normal((width, rank), np.float32),
            },
        )
        for _ in range(4)
    ]
    state = RoundState(1, {}, ServerSettings(aggregator="product"))
    for _ in range(7):
        began = time.perf_counter()
        aggregate(iter(updates), state)
        seconds.append(time.perf_counter() - began)
    yield Figure("product-exact mean, width 4096, rank 32, 4 sites, a module", seconds, "s", BARS[2])


MEASURES = {"memory": memory, "fold": fold, "product": product}


def main() -> None:
    if sys.argv[1:2] == ["sites"]:
        return run(int(sys.argv[2]))
    names = sys.argv[1:] or list(MEASURES)
    show("A coordinator", list(itertools.chain.from_iterable(MEASURES[name]() for name in names)))


if __name__ == "__main__":
    main()
