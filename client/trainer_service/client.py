"""The thin ClientApp's connection to the site's resident trainer: no torch, no transformers, no Flower.

An order is idempotent, so when the trainer dies the connection waits for the next one and asks again.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc

from ...common.errors import ColoraError, ConfigError, StateError
from ...common.protocol.types import PROTOCOL, SiteInfo, TrainReply, TrainRequest
from . import serde as parts
from .proto import trainer_pb2 as wire
from .proto import trainer_pb2_grpc

logger = logging.getLogger("colora.site")
TRAINER, LINK, SITE = "COLORA_TRAINER", "COLORA_LINK", "COLORA_SITE"
PATIENCE = 300.0  # seconds without a sign of the trainer
DEATHS = 10  # of the trainer under one order: more is a fault that no restart mends
SILENCE = 60.0  # seconds after which a call that fails was one with a trainer: connecting fails sooner
SHORTEST, LONGEST = 0.2, 2.0  # seconds between two tries
OURS = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ABORTED)  # gRPC itself ends no call with them
NAME_ON_CERTIFICATE = "trainer"  # whatever the container is called: the link's authority is the site's own
OPTIONS = [
    *parts.OPTIONS,
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel tries at once, whatever the last one met
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
]
T = TypeVar("T")


class TrainerError(ColoraError):
    """The trainer answered with an error; ``found`` is its public text, the rest is in the trainer's own log."""

    def public(self) -> str:
        """What the trainer said, which is fit for the coordinator."""
        return self.found


@dataclass
class TrainerClient:
    """A site behind gRPC: ``unix:PATH``, or ``HOST:PORT`` with the certificates in ``link``."""

    name: str
    address: str
    link: str = ""
    patience: float = PATIENCE

    def site_info(self, federation: str, plan: str) -> SiteInfo:
        """Introduces the site. Raises TrainerError, or StateError when no trainer is there."""
        request = wire.DescribeRequest(federation=federation, plan=plan, protocol=PROTOCOL)
        return self._ask(lambda stub, alive: parts.site_info_from(stub.Describe(request)))

    def handle(self, order: TrainRequest) -> TrainReply:
        """Answers an order, however long the training takes. Raises as :meth:`describe`."""
        return self._ask(lambda stub, alive: self._train(stub, alive, order))

    def _train(self, stub: trainer_pb2_grpc.TrainerStub, alive: Callable[[], None], order: TrainRequest) -> TrainReply:
        """The arrays of a reply are those of its order, at most."""
        gathering = parts.ArrayAssembler({key: array.shape for key, array in order.shared.items()}, self.name)
        head = None
        for part in stub.Train(parts.request_parts(order)):
            alive()
            match part.WhichOneof("part"):
                case "head":
                    head = part.head
                case "chunk":
                    gathering.add(part.chunk)
        if head is None:
            raise StateError("trainer", "a reply", "the end of an answer without one", site=self.name)
        return parts.reply_from(head, gathering.arrays())

    def _ask(self, call: Callable[[trainer_pb2_grpc.TrainerStub, Callable[[], None]], T]) -> T:
        """One call, again and again while the trainer is away. ``alive`` notes a sign of life."""
        absence = RetryState(self.patience)
        while True:
            absence.begin()
            try:
                with self.channel() as channel:
                    return call(trainer_pb2_grpc.TrainerStub(channel), absence.alive)
            except grpc.RpcError as error:
                code, said = error.code(), error.details() or ""  # type: ignore[attr-defined]
            if code in OURS:
                raise TrainerError("trainer", "an answer", said, site=self.name)
            if code is not grpc.StatusCode.UNAVAILABLE:
                logger.error("the trainer's call ended with %s: %s", code.name, said)
                raise TrainerError("trainer", "an answer", code.name, site=self.name)
            pause = absence.pause()
            if pause is None:
                logger.error("no trainer at %s: %s", self.address, said)
                wanted = f"a sign of it within {self.patience:g} s, and no more than {DEATHS} deaths in one order"
                raise StateError("trainer", wanted, f"{absence.deaths} deaths", site=self.name)
            time.sleep(pause)

    def channel(self) -> grpc.Channel:
        """The way to the trainer. Raises ConfigError when the certificates for it are not there."""
        target = parts.target_of(self.address)
        if self.address.startswith(parts.UNIX):
            return grpc.insecure_channel(target, OPTIONS)
        link = Path(self.link)
        try:
            ca, certificate, key = ((link / name).read_bytes() for name in ("ca.crt", "node.crt", "node.key"))
        except OSError as error:
            wanted = f"a folder with ca.crt, node.crt and node.key in {LINK}"
            raise ConfigError("trainer.link", wanted, f"{error.filename} ({error.strerror})", site=self.name) from None
        named = ("grpc.ssl_target_name_override", NAME_ON_CERTIFICATE)
        return grpc.secure_channel(target, grpc.ssl_channel_credentials(ca, key, certificate), [*OPTIONS, named])


class RetryState:
    """How long the trainer has been away, and how often it died under one order."""

    def __init__(self, patience: float) -> None:
        self.patience, self.deaths, self.tries = patience, 0, 0
        self.lived, self.began, self.since = False, 0.0, time.monotonic()

    def begin(self) -> None:
        self.lived, self.began = False, time.monotonic()

    def alive(self) -> None:
        self.lived = True

    def pause(self) -> float | None:
        """Seconds until the next try; None when it is time to give up."""
        now = time.monotonic()
        if self.lived or now - self.began > SILENCE:
            self.deaths, self.tries, self.since = self.deaths + 1, 0, now
        if now - self.since > self.patience or self.deaths > DEATHS:
            return None
        self.tries += 1
        return min(SHORTEST * 2 ** (self.tries - 1), LONGEST)


def connect(context: object = None) -> TrainerClient:
    """The connection that the environment names. Raises ConfigError when it names none.

    ``COLORA_TRAINER`` is ``unix:PATH`` or ``HOST:PORT``, ``COLORA_LINK`` the folder with this side's certificates, and
    ``COLORA_SITE`` the site's name.
    """
    for variable in (TRAINER, SITE):
        if not os.environ.get(variable):
            raise ConfigError(variable, "set in the environment of the SuperNode", "nothing")
    return TrainerClient(os.environ[SITE], os.environ[TRAINER], os.environ.get(LINK, ""))
