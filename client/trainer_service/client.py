"""The ClientApp's gRPC client of the site's trainer. Imports neither torch nor transformers nor Flower.

Training requests are idempotent, so the client repeats a call when the trainer restarts.
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
from ...common.protocol.types import PROTOCOL, Arrays, SiteInfo, SumReply, SumRequest, TrainReply, TrainRequest
from . import serde
from .proto import trainer_pb2 as pb
from .proto import trainer_pb2_grpc

logger = logging.getLogger("colora.site")
TRAINER, LINK, SITE = "COLORA_TRAINER", "COLORA_LINK", "COLORA_SITE"  # environment variables, see connect
PATIENCE = 300.0  # seconds without a sign of life from the trainer before a call fails
MAX_CRASHES = 10  # of the trainer during one call; more indicate a fault that no restart repairs
CONNECT_TIMEOUT = 60.0  # seconds; a call that fails later than this had reached a trainer
MIN_PAUSE, MAX_PAUSE = 0.2, 2.0  # seconds between two attempts
TRAINER_CODES = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ABORTED)  # gRPC itself never uses these two
CERTIFICATE_NAME = "trainer"  # in the trainer's certificate, whatever its host is called
LINK_FILES = ("ca.crt", "node.crt", "node.key")  # in the link folder: the client side of the mutual TLS
OPTIONS = [
    *serde.OPTIONS,
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel connects at once, without the backoff of earlier channels
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
]
T = TypeVar("T")


class TrainerError(ColoraError):
    """The trainer returned an error. ``found`` is its public text; the details are in the trainer's log."""

    def public(self) -> str:
        """Return the trainer's public text, which may be sent to the coordinator."""
        return self.found


@dataclass
class TrainerClient:
    """A site whose trainer listens at ``unix:PATH``, or at ``HOST:PORT`` with the certificates in ``link``."""

    name: str
    address: str
    link: str = ""
    patience: float = PATIENCE  # seconds

    def site_info(self, federation: str, plan: str) -> SiteInfo:
        """Return the site's description. Raises TrainerError, or StateError when no trainer answers."""
        request = pb.SiteInfoRequest(federation=federation, plan=plan, protocol=PROTOCOL)
        return self._call(lambda stub, alive: serde.site_info_from(stub.GetSiteInfo(request)))

    def received(self, federation: str, plan: str, number: int) -> Arrays:
        """Return the shared adapter that the site received in a round. Raises the errors of ``site_info``."""
        request = pb.ReceivedRequest(federation=federation, plan=plan, round=number, protocol=PROTOCOL)
        return self._call(lambda stub, alive: serde.arrays_from(stub.GetReceived(request), self.name))

    def handle(self, request: TrainRequest) -> TrainReply:
        """Run a training request, however long it takes. Raises the errors of ``site_info``."""
        return self._call(lambda stub, alive: self._train(stub, alive, request))

    def sum(self, request: SumRequest) -> SumReply:
        """Take a step of a secure sum. Raises the errors of ``site_info``."""
        message = serde.sum_message(request)
        body = self._call(lambda stub, alive: b"".join(part.data for part in stub.Sum(message)))
        return SumReply(self.name, request.federation, request.round, request.step, request.key, body)

    def _train(
        self, stub: trainer_pb2_grpc.TrainerStub, alive: Callable[[], None], request: TrainRequest
    ) -> TrainReply:
        """Send a request and assemble the reply, which may hold only the arrays that the request has."""
        assembler = serde.ArrayAssembler({key: array.shape for key, array in request.shared.items()}, self.name)
        head = None
        for part in stub.Train(serde.request_parts(request)):
            alive()
            match part.WhichOneof("part"):
                case "head":
                    head = part.head
                case "chunk":
                    assembler.add(part.chunk)
        if head is None:
            raise StateError(
                "trainer",
                "a reply",
                "an answer without one",
                site=self.name,
                message="The trainer ended the call without a reply.",
            )
        return serde.reply_from(head, assembler.arrays())

    def _call(self, call: Callable[[trainer_pb2_grpc.TrainerStub, Callable[[], None]], T]) -> T:
        """Make a call, and repeat it while the trainer is unavailable. The call reports signs of life to ``alive``."""
        retry = RetryState(self.patience)
        while True:
            retry.begin()
            try:
                with self.channel() as channel:
                    return call(trainer_pb2_grpc.TrainerStub(channel), retry.alive)
            except grpc.RpcError as error:
                code, details = error.code(), error.details() or ""  # type: ignore[attr-defined]
            if code in TRAINER_CODES:
                message = f"The trainer returned an error: {details}."
                hint = "See the trainer's log."
                raise TrainerError("trainer", "a reply", details, site=self.name, message=message, hint=hint)
            if code is not grpc.StatusCode.UNAVAILABLE:
                logger.error("the call to the trainer failed with %s: %s", code.name, details)
                message = f"The call to the trainer failed with {code.name}."
                raise TrainerError("trainer", "a reply", code.name, site=self.name, message=message)
            pause = retry.pause()
            if pause is None:
                logger.error("no trainer at %s: %s", self.address, details)
                raise self._unavailable(retry.crashes)
            time.sleep(pause)

    def _unavailable(self, crashes: int) -> StateError:
        if crashes > MAX_CRASHES:
            message = f"The trainer stopped {crashes} times during one call."
        else:
            message = f"The trainer did not answer within {self.patience:g} s."
        return StateError(
            "trainer",
            f"an answer within {self.patience:g} s, and at most {MAX_CRASHES} crashes during one call",
            f"{crashes} crashes",
            site=self.name,
            message=message,
            hint="See the trainer's log.",
        )

    def channel(self) -> grpc.Channel:
        """Open a channel to the trainer. Raises ConfigError when its certificates are missing."""
        target = serde.target_of(self.address)
        if self.address.startswith(serde.UNIX):
            return grpc.insecure_channel(target, OPTIONS)
        link = Path(self.link)
        try:
            ca, certificate, key = ((link / name).read_bytes() for name in LINK_FILES)
        except OSError as error:
            raise ConfigError(
                "trainer.link",
                f"a folder with {', '.join(LINK_FILES)}",
                f"{error.filename} ({error.strerror})",
                site=self.name,
                message=f"Cannot read the certificate file {error.filename}: {error.strerror}.",
                hint=f"{LINK} must name a folder with {', '.join(LINK_FILES)}.",
            ) from None
        name_override = ("grpc.ssl_target_name_override", CERTIFICATE_NAME)
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        return grpc.secure_channel(target, credentials, [*OPTIONS, name_override])


class RetryState:
    """Counts how long the trainer has been unavailable, and how often it crashed during one call."""

    def __init__(self, patience: float) -> None:
        self.patience, self.crashes, self.attempts = patience, 0, 0
        self.reached, self.began, self.unavailable_since = False, 0.0, time.monotonic()

    def begin(self) -> None:
        """Start an attempt."""
        self.reached, self.began = False, time.monotonic()

    def alive(self) -> None:
        """Record that this attempt reached a trainer."""
        self.reached = True

    def pause(self) -> float | None:
        """Return the seconds until the next attempt, or None when there should be no further one."""
        now = time.monotonic()
        if self.reached or now - self.began > CONNECT_TIMEOUT:
            self.crashes, self.attempts, self.unavailable_since = self.crashes + 1, 0, now
        if now - self.unavailable_since > self.patience or self.crashes > MAX_CRASHES:
            return None
        self.attempts += 1
        return min(MIN_PAUSE * 2 ** (self.attempts - 1), MAX_PAUSE)


def connect(context: object = None) -> TrainerClient:
    """Return a client of the trainer that the environment names. Raises ConfigError when a variable is missing.

    ``COLORA_TRAINER`` is ``unix:PATH`` or ``HOST:PORT``, ``COLORA_LINK`` the folder with this side's certificates, and
    ``COLORA_SITE`` the site's name.
    """
    for variable in (TRAINER, SITE):
        if not os.environ.get(variable):
            raise ConfigError(
                variable,
                "a value in the environment of the SuperNode",
                "nothing",
                message=f"The environment variable {variable} is not set.",
                hint="colora client sets it for the SuperNode that it starts.",
            )
    return TrainerClient(os.environ[SITE], os.environ[TRAINER], os.environ.get(LINK, ""))
