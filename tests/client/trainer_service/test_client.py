"""The trainer's client: when it retries, when it gives up, and which errors it passes on."""

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
from colora.client.trainer_service import serde
from colora.client.trainer_service.client import TrainerClient, TrainerError, connect
from colora.client.trainer_service.proto import trainer_pb2 as pb
from colora.client.trainer_service.proto import trainer_pb2_grpc
from colora.common.errors import ColoraError, ConfigError, RefusedError, StateError
from colora.common.protocol.types import TrainReply, TrainRequest

if TYPE_CHECKING:
    from conftest import SiteSetup

SHARED = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
REQUEST = TrainRequest("town", 1, "train", 0, "{}", SHARED, True)
REPLY = TrainReply("ada", "town", 1, "key", SHARED, 8, 8, {"train.loss": 0.5})
Behaviour = Callable[[grpc.ServicerContext, int], Iterator[pb.TrainReplyPart]]


class Actor(trainer_pb2_grpc.TrainerServicer):
    """A trainer with a given behaviour, which counts its calls."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour, self.calls = behaviour, 0

    def Train(self, request_iterator: Iterator[pb.TrainRequestPart], context: grpc.ServicerContext) -> Any:
        list(request_iterator)
        self.calls += 1
        yield from self.behaviour(context, self.calls)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Behaviour], Actor]]:
    """Serve an actor on ``tmp_path/t.sock``; the pauses between attempts are short."""
    monkeypatch.setattr(module, "MIN_PAUSE", 0.001)
    monkeypatch.setattr(module, "MAX_PAUSE", 0.01)
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


def answered(context: grpc.ServicerContext, call: int) -> Iterator[pb.TrainReplyPart]:
    yield pb.TrainReplyPart(progress=pb.Progress(step=1, total=2, kind="train"))
    yield pb.TrainReplyPart(head=serde.reply_head(REPLY))
    for chunk in serde.chunks(REPLY.shared):
        yield pb.TrainReplyPart(chunk=chunk)


def site(folder: Path, patience: float = 5.0) -> TrainerClient:
    return TrainerClient("ada", f"unix:{folder}/t.sock", patience=patience)


def test_a_reply_comes_out_as_it_went_in(tmp_path: Path, stage: Callable[[Behaviour], Actor]) -> None:
    stage(answered)
    reply = site(tmp_path).handle(REQUEST)
    assert reply.shared["a"].tobytes() == SHARED["a"].tobytes()
    assert {**vars(reply), "shared": None} == {**vars(REPLY), "shared": None}


def test_a_trainer_that_is_away_for_a_while_is_waited_for(
    tmp_path: Path, stage: Callable[[Behaviour], Actor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts during the client's third pause."""
    pauses: list[float] = []
    monkeypatch.setattr(
        module.time, "sleep", lambda pause: (pauses.append(pause), len(pauses) == 3 and stage(answered))
    )
    assert site(tmp_path).handle(REQUEST).key == "key"
    assert pauses[:3] == [0.001, 0.002, 0.004]


def test_a_trainer_that_dies_under_the_order_is_asked_again(
    tmp_path: Path, stage: Callable[[Behaviour], Actor]
) -> None:
    def dying(context: grpc.ServicerContext, call: int) -> Iterator[pb.TrainReplyPart]:
        if call < 4:
            yield pb.TrainReplyPart(progress=pb.Progress(step=call))
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        yield from answered(context, call)

    actor = stage(dying)
    assert site(tmp_path).handle(REQUEST).key == "key"
    assert actor.calls == 4


def test_a_trainer_that_dies_each_time_is_given_up(tmp_path: Path, stage: Callable[[Behaviour], Actor]) -> None:
    def doomed(context: grpc.ServicerContext, call: int) -> Iterator[pb.TrainReplyPart]:
        yield pb.TrainReplyPart(progress=pb.Progress(step=call))
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    actor = stage(doomed)
    with pytest.raises(StateError, match="stopped 11 times during one call"):
        site(tmp_path, patience=60.0).handle(REQUEST)
    assert actor.calls == 11


def test_without_a_trainer_it_gives_up_when_its_patience_ends(tmp_path: Path) -> None:
    for ask in (
        lambda: site(tmp_path, 0.3).handle(REQUEST),
        lambda: site(tmp_path, 0.0).site_info("town", "{}"),
    ):
        with pytest.raises(StateError, match="site ada: The trainer did not answer within") as caught:
            ask()
        assert caught.value.public() == "StateError: trainer"


@pytest.mark.parametrize(
    ("code", "details", "public"),
    [
        (grpc.StatusCode.FAILED_PRECONDITION, "RefusedError: allow.max_rank", "RefusedError: allow.max_rank"),
        (grpc.StatusCode.ABORTED, "KeyError", "KeyError"),
        # texts of gRPC itself, which may contain paths of the site
        (grpc.StatusCode.INTERNAL, "unix:/srv/patients/t.sock broke", "INTERNAL"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max", "RESOURCE_EXHAUSTED"),
    ],
)
def test_an_error_passes_on_what_the_trainer_said_and_nothing_else(
    tmp_path: Path, stage: Callable[[Behaviour], Actor], code: grpc.StatusCode, details: str, public: str
) -> None:
    def refusing(context: grpc.ServicerContext, call: int) -> Iterator[pb.TrainReplyPart]:
        context.abort(code, details)
        yield pb.TrainReplyPart()

    actor = stage(refusing)
    with pytest.raises(TrainerError) as caught:
        site(tmp_path).handle(REQUEST)
    assert isinstance(caught.value, ColoraError)
    assert caught.value.public() == public
    assert actor.calls == 1


def test_an_answer_with_more_than_the_orders_arrays_is_not_passed_on(
    tmp_path: Path, stage: Callable[[Behaviour], Actor]
) -> None:
    def leaking(context: grpc.ServicerContext, call: int) -> Iterator[pb.TrainReplyPart]:
        yield from answered(context, call)
        yield pb.TrainReplyPart(chunk=next(serde.chunks({"head.classifier.weight": np.ones(3, np.float32)})))

    stage(leaking)
    with pytest.raises(RefusedError, match=r"also head.classifier.weight"):
        site(tmp_path).handle(REQUEST)


def test_an_answer_without_a_reply_is_none(tmp_path: Path, stage: Callable[[Behaviour], Actor]) -> None:
    stage(lambda context, call: iter(()))
    with pytest.raises(StateError, match="ended the call without a reply"):
        site(tmp_path).handle(REQUEST)


def test_the_environment_says_where_the_trainer_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (module.TRAINER, module.LINK, module.SITE):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="variable COLORA_TRAINER is not set"):
        connect()
    monkeypatch.setenv(module.TRAINER, "trainer:50051")
    with pytest.raises(ConfigError, match="COLORA_SITE"):
        connect()
    monkeypatch.setenv(module.SITE, "ada")
    monkeypatch.setenv(module.LINK, "/keys/link")
    assert connect(object()) == TrainerClient("ada", "trainer:50051", "/keys/link")
    with pytest.raises(ConfigError, match=r"COLORA_LINK must name a folder with ca.crt, node.crt, node.key"):
        connect().site_info("town", "{}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["client.trainer_service.client", "client.client_app"])
def test_the_thin_side_loads_no_model_code(name: str) -> None:
    """A ClientApp starts for every message."""
    heavy = (
        "torch",
        "transformers",
        "peft",
        "sklearn",
        "datasets",
        *(["flwr"] if name.endswith("trainer_service.client") else []),
    )
    code = f"import sys, colora.{name}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_app_of_a_flower_bundle_answers_through_the_connection(
    running_site: SiteSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``colora.client.client_app:app``, called as Flower does, with a real trainer; an error sends its public text."""
    from flwr.app import Context, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from colora.client.client_app import app
    from colora.common.config.schema import to_json
    from colora.common.protocol import flower_messages as messages

    monkeypatch.setenv(module.TRAINER, running_site.address)
    monkeypatch.setenv(module.SITE, "ada")
    for name in ("run_id", "node_id", "task_id"):  # as Flower sets them in its processes
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    plan = running_site.plan("bundled")
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    joined = app(messages.join_message(plan.name, to_json(plan), 2), context)
    assert messages.site_info_from(joined).site == "ada"
    request = running_site.request(plan)
    asked = messages.train_message(request, messages.pack_arrays(request.shared), 2)
    reply = messages.reply_from(app(asked, context), request)
    assert running_site.equal(reply, running_site.expected(plan, request)[0])
    refused = app(messages.join_message("elsewhere", to_json(plan), 2), context)
    assert refused.error.reason == "RefusedError: federation"
