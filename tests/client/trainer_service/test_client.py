"""The thin side: what it waits for, what it gives up on, and what it passes on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from colora.client.trainer_service import client as module
from colora.client.trainer_service import serde as parts
from colora.client.trainer_service.client import TrainerClient, TrainerError, connect
from colora.client.trainer_service.proto import trainer_pb2 as wire
from colora.client.trainer_service.proto import trainer_pb2_grpc
from colora.common.errors import ColoraError, ConfigError, RefusedError, StateError
from colora.common.protocol.types import TrainReply, TrainRequest

if TYPE_CHECKING:
    from conftest import House

SHARED = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
ORDER = TrainRequest("town", 1, "train", 0, "{}", SHARED, True)
REPLY = TrainReply("ada", "town", 1, "key", SHARED, 8, 8, {"train.loss": 0.5})
Behaviour = Callable[[grpc.ServicerContext, int], Iterator[wire.ReplyPart]]


class Actor(trainer_pb2_grpc.TrainerServicer):
    """A trainer that behaves as told; ``calls`` counts."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour, self.calls = behaviour, 0

    def Train(self, request_iterator: Iterator[wire.OrderPart], context: grpc.ServicerContext) -> Any:
        list(request_iterator)
        self.calls += 1
        yield from self.behaviour(context, self.calls)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Behaviour], Actor]]:
    """Puts an actor behind ``tmp_path/t.sock``; nobody waits between two tries."""
    monkeypatch.setattr(module, "SHORTEST", 0.001)
    monkeypatch.setattr(module, "LONGEST", 0.01)
    running = []

    def put(behaviour: Behaviour) -> Actor:
        actor, server = Actor(behaviour), grpc.server(futures.ThreadPoolExecutor(4))
        trainer_pb2_grpc.add_TrainerServicer_to_server(actor, server)
        server.add_insecure_port(f"unix:{tmp_path}/t.sock")
        server.start()
        running.append(server)
        return actor

    yield put
    for server in running:
        server.stop(0).wait()


def answered(context: grpc.ServicerContext, call: int) -> Iterator[wire.ReplyPart]:
    yield wire.ReplyPart(progress=wire.Progress(step=1, total=2, phase="train"))
    yield wire.ReplyPart(head=parts.reply_head(REPLY))
    for chunk in parts.chunks(REPLY.shared):
        yield wire.ReplyPart(chunk=chunk)


def site(folder: Path, patience: float = 5.0) -> TrainerClient:
    return TrainerClient("ada", f"unix:{folder}/t.sock", patience=patience)


def test_a_reply_comes_out_as_it_went_in(tmp_path: Path, stage: Callable[[Behaviour], Actor]) -> None:
    stage(answered)
    reply = site(tmp_path).handle(ORDER)
    assert reply.shared["a"].tobytes() == SHARED["a"].tobytes()
    assert {**vars(reply), "shared": None} == {**vars(REPLY), "shared": None}


def test_a_trainer_that_is_away_for_a_while_is_waited_for(
    tmp_path: Path, stage: Callable[[Behaviour], Actor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It appears while the connection sleeps for the third time."""
    pauses: list[float] = []
    monkeypatch.setattr(
        module.time, "sleep", lambda pause: (pauses.append(pause), len(pauses) == 3 and stage(answered))
    )
    assert site(tmp_path).handle(ORDER).key == "key"
    assert pauses[:3] == [0.001, 0.002, 0.004]


def test_a_trainer_that_dies_under_the_order_is_asked_again(
    tmp_path: Path, stage: Callable[[Behaviour], Actor]
) -> None:
    def dying(context: grpc.ServicerContext, call: int) -> Iterator[wire.ReplyPart]:
        if call < 4:
            yield wire.ReplyPart(progress=wire.Progress(step=call))
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        yield from answered(context, call)

    actor = stage(dying)
    assert site(tmp_path).handle(ORDER).key == "key"
    assert actor.calls == 4


def test_a_trainer_that_dies_each_time_is_given_up(tmp_path: Path, stage: Callable[[Behaviour], Actor]) -> None:
    def doomed(context: grpc.ServicerContext, call: int) -> Iterator[wire.ReplyPart]:
        yield wire.ReplyPart(progress=wire.Progress(step=call))
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    actor = stage(doomed)
    with pytest.raises(StateError, match="no more than 10 deaths in one order, found 11 deaths"):
        site(tmp_path, patience=60.0).handle(ORDER)
    assert actor.calls == 11


def test_without_a_trainer_it_gives_up_when_its_patience_ends(tmp_path: Path) -> None:
    for ask in (
        lambda: site(tmp_path, 0.3).handle(ORDER),
        lambda: site(tmp_path, 0.0).site_info("town", "{}"),
    ):
        with pytest.raises(StateError, match="site ada: trainer: expected a sign of it within") as caught:
            ask()
        assert caught.value.public() == "StateError: trainer"


@pytest.mark.parametrize(
    ("code", "said", "public"),
    [
        (grpc.StatusCode.FAILED_PRECONDITION, "RefusedError: allow.max_rank", "RefusedError: allow.max_rank"),
        (grpc.StatusCode.ABORTED, "KeyError", "KeyError"),
        # words of gRPC itself, which may name paths of the site
        (grpc.StatusCode.INTERNAL, "unix:/srv/patients/t.sock broke", "INTERNAL"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max", "RESOURCE_EXHAUSTED"),
    ],
)
def test_an_error_passes_on_what_the_trainer_said_and_nothing_else(
    tmp_path: Path, stage: Callable[[Behaviour], Actor], code: grpc.StatusCode, said: str, public: str
) -> None:
    def refusing(context: grpc.ServicerContext, call: int) -> Iterator[wire.ReplyPart]:
        context.abort(code, said)
        yield wire.ReplyPart()

    actor = stage(refusing)
    with pytest.raises(TrainerError) as caught:
        site(tmp_path).handle(ORDER)
    assert isinstance(caught.value, ColoraError)
    assert caught.value.public() == public
    assert actor.calls == 1


def test_an_answer_with_more_than_the_orders_arrays_is_not_passed_on(
    tmp_path: Path, stage: Callable[[Behaviour], Actor]
) -> None:
    def leaking(context: grpc.ServicerContext, call: int) -> Iterator[wire.ReplyPart]:
        yield from answered(context, call)
        yield wire.ReplyPart(chunk=next(parts.chunks({"head.classifier.weight": np.ones(3, np.float32)})))

    stage(leaking)
    with pytest.raises(RefusedError, match=r"also head.classifier.weight"):
        site(tmp_path).handle(ORDER)


def test_an_answer_without_a_reply_is_none(tmp_path: Path, stage: Callable[[Behaviour], Actor]) -> None:
    stage(lambda context, call: iter(()))
    with pytest.raises(StateError, match="expected a reply"):
        site(tmp_path).handle(ORDER)


def test_the_environment_says_where_the_trainer_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (module.TRAINER, module.LINK, module.SITE):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="COLORA_TRAINER: expected set in the environment"):
        connect()
    monkeypatch.setenv(module.TRAINER, "trainer:50051")
    with pytest.raises(ConfigError, match="COLORA_SITE"):
        connect()
    monkeypatch.setenv(module.SITE, "ada")
    monkeypatch.setenv(module.LINK, "/keys/link")
    assert connect(object()) == TrainerClient("ada", "trainer:50051", "/keys/link")
    with pytest.raises(ConfigError, match=r"trainer.link: expected a folder with ca.crt, node.crt and node.key"):
        connect().site_info("town", "{}")


@pytest.mark.parametrize("name", ["client.connection", "client.app"])
def test_the_thin_side_loads_no_model_code(name: str) -> None:
    """A SuperNode starts a process for every message."""
    heavy = ("torch", "transformers", "peft", "sklearn", "datasets", *(["flwr"] if name == "client.connection" else []))
    code = f"import sys, colora.{name}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"


def test_the_app_of_a_flower_bundle_answers_through_the_connection(
    standing: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``colora.client.client_app:app`` as Flower calls it, before a real trainer; an error crosses by its public text."""
    from flwr.app import Context, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from colora.client.client_app import app
    from colora.common.config.schema import to_json
    from colora.common.protocol import flower_messages as messages

    monkeypatch.setenv(module.TRAINER, standing.address)
    monkeypatch.setenv(module.SITE, "ada")
    for name in ("run_id", "node_id", "task_id"):  # as Flower sets them in its processes
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    plan = standing.plan("bundled")
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    joined = app(messages.join_message(plan.name, to_json(plan), 2), context)
    assert messages.site_info_from(joined).site == "ada"
    order = standing.order(plan)
    asked = messages.train_message(order, messages.pack_arrays(order.shared), 2)
    assert standing.alike(messages.reply_from(app(asked, context), order), standing.oracle(plan, order)[0])
    refused = app(messages.join_message("elsewhere", to_json(plan), 2), context)
    assert refused.error.reason == "RefusedError: federation"
