"""The resident trainer as a process: ``python -m colora.client.trainer_service.server SITE.toml``.

It holds the base model for its whole life and answers Describe and Train over gRPC. One thread does all work on the
model, one piece after the other; a piece that has begun goes on when nobody waits for it any more, and who asks again
finds the stored reply. Nothing leaves but descriptions, replies and the kinds of errors, each noted in the audit log.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ...common.config.loader import load_site
from ...common.config.schema import Plan
from ...common.config.site_schema import SiteSettings
from ...common.errors import ColoraError, ConfigError, RefusedError
from ...common.protocol.types import Arrays, TrainReply, TrainRequest
from . import listener as door
from . import serde as parts
from .audit_log import AuditLog
from .proto import trainer_pb2 as wire
from .proto import trainer_pb2_grpc

if TYPE_CHECKING:
    from .session import TrainerSession


logger = logging.getLogger("colora.trainer")
SERVICE = "colora.trainer.v1.Trainer"
BAD_INPUT = 2
ORDERS = 4  # at once: one at work, the others wait for it
CALLS = 64  # at once, health checks among them
RECEIVING = 600.0  # seconds for an order to come in
PROGRESS = 1.0  # seconds between two messages of progress
ERROR_BYTES = 200  # of an error's public text, which travels in a header
# gRPC itself never ends a call with one of these two, so the other side knows whose words it reads
REFUSED, FAILED = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ABORTED
OPTIONS = [
    *parts.OPTIONS,
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # of a caller that waits for a long training
]
Context = grpc.aio.ServicerContext
T = TypeVar("T")
END: Any = grpc.aio.EOF  # type: ignore[attr-defined]


@dataclass(frozen=True)
class TrainResult:
    """A reply, and the steps that were taken for it; None for a stored one."""

    reply: TrainReply
    steps: int | None


class TrainerServicer(trainer_pb2_grpc.TrainerServicer):
    """The two calls. ``work`` is the one thread of the model, ``notes`` that of the audit log."""

    def __init__(self, resident: TrainerSession, work: ThreadPoolExecutor) -> None:
        self.resident, self.site, self.work = resident, resident.site, work
        self.notes = ThreadPoolExecutor(1, "audit")
        self.progress = wire.Progress()
        self.orders = asyncio.Semaphore(ORDERS)

    async def Describe(self, request: wire.DescribeRequest, context: Context) -> wire.Description:
        """Introduces the site, ready to train by the plan."""
        audit = None
        try:
            parts.check_protocol(request.protocol)
            plan, audit = self._accept(request.federation, request.plan)
            description = await _done(self.work.submit(lambda: self.resident.trainer(plan).site_info()))
            await _done(self.notes.submit(audit.description, description))
            return parts.site_info_message(description)
        except Exception as error:
            return await self._refuse(error, context, audit)

    async def Train(self, request_iterator: object, context: Context) -> None:
        """Answers an order: progress while it is worked on, then the reply."""
        try:
            await self._train(context)
        finally:
            self.notes.submit(release_memory)  # beside the answer's end, not before it

    async def _train(self, context: Context) -> None:
        audit = None
        try:
            async with self.orders:
                head = await self._head(context)
                order = parts.request_from(head, {})
                plan, audit = self._accept(order.federation, order.plan)
                layout = await _done(self.work.submit(lambda: self.resident.trainer(plan).layout))
                order = parts.request_from(head, await self._arrays(context, layout))
                job = self.work.submit(self._answer, plan, order)
                answer = await _done(job, lambda: context.write(wire.ReplyPart(progress=self.progress)))
            reply = answer.reply
            size = await _done(self.notes.submit(audit.reply, reply, order, replayed=answer.steps is None))
            _log_reply(answer, size)
            await context.write(wire.ReplyPart(head=parts.reply_head(reply)))
            for chunk in parts.chunks(reply.shared):
                await context.write(wire.ReplyPart(chunk=chunk))
        except Exception as error:
            await self._refuse(error, context, audit)

    def _accept(self, federation: str, text: str) -> tuple[Plan, AuditLog]:
        plan = self.resident.accept(federation, text)
        return plan, AuditLog(self.resident.folder(plan), plan.name)

    async def _head(self, context: Context) -> wire.OrderHead:
        async with asyncio.timeout(RECEIVING):
            part: Any = await context.read()
        if part is END or part.WhichOneof("part") != "head":
            raise RefusedError("order", "its head first", "something else", site=self.site.name)
        return part.head

    async def _arrays(self, context: Context, layout: Mapping[str, tuple[int, ...]]) -> Arrays:
        gathering = parts.ArrayAssembler(layout, self.site.name)
        async with asyncio.timeout(RECEIVING):
            while (part := await context.read()) is not END:
                if part.WhichOneof("part") != "chunk":
                    raise RefusedError("order", "its arrays after its head", "something else", site=self.site.name)
                gathering.add(part.chunk)
        return gathering.arrays()

    def _answer(self, plan: Plan, order: TrainRequest) -> TrainResult:
        """In the thread of the model."""

        def watch(done: int, total: int) -> None:
            self.progress = wire.Progress(step=done, total=total, phase=order.kind)

        watch(0, 0)
        reply, replayed = self.resident.answer(plan, order, watch)
        return TrainResult(reply, None if replayed else self.progress.step)

    async def _refuse(self, error: Exception, context: Context, audit: AuditLog | None) -> Any:
        """What went wrong: in full in the log, by its kind only for the other side."""
        _log_error(error)
        code = REFUSED if isinstance(error, ColoraError) else FAILED
        public = error.public() if isinstance(error, ColoraError) else type(error).__name__
        public = public.encode(errors="replace")[:ERROR_BYTES].decode(errors="ignore")
        if audit is not None:
            try:
                await _done(self.notes.submit(audit.error, public))
            except ColoraError as unwritten:
                _log_error(unwritten)
                public = unwritten.public()
        await context.abort(code, public)


async def _done(job: Future[T], tell: Callable[[], Awaitable[None]] | None = None) -> T:
    """The result of a job; ``tell`` is called while it lasts.

    When the caller goes away a job that has not begun is dropped; one that has begun goes on.
    """
    waiting = asyncio.wrap_future(job)
    try:
        while not waiting.done():
            await asyncio.wait({waiting}, timeout=PROGRESS)
            if tell and not waiting.done():
                await tell()
    except BaseException:
        waiting.cancel()
        job.add_done_callback(_log_abandoned)
        raise
    return waiting.result()


def release_memory() -> None:
    """Freed memory goes back to the system: glibc would keep up to 64 MiB of it for every thread."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _log_reply(answer: TrainResult, size: int) -> None:
    reply, loss = answer.reply, answer.reply.metrics.get("train.loss")
    trained = "stored reply again" if answer.steps is None else f"{answer.steps} steps, {reply.seconds:.1f} s"
    found = "" if loss is None else f"loss {loss:.4f}, "
    logger.info("%s round %d: %s%s, %d bytes out", reply.federation, reply.round, found, trained, size)


def _log_abandoned(job: Future[Any]) -> None:
    error = None if job.cancelled() else job.exception()
    if isinstance(error, Exception):
        _log_error(error)
    elif not job.cancelled():
        logger.info("finished, and nobody waits for it any more")


def _log_error(error: Exception) -> None:
    if isinstance(error, ColoraError):
        logger.error("%s", error)
    else:
        logger.error("an unexpected error", exc_info=error)


def serve(site: SiteSettings) -> None:
    """Serves a site until SIGTERM or SIGINT, which end the process at once, in the middle of a round too.

    Nothing is lost: the round is asked again. Raises ConfigError or StateError when it cannot begin.
    """
    os.umask(0o077)
    with door.exclusive_state_dir(Path(site.trainer.state)):
        asyncio.run(_serve(site))


async def _serve(site: SiteSettings) -> None:
    server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=CALLS)
    address = door.listen(server, site.trainer)
    try:
        trainer_pb2_grpc.add_TrainerServicer_to_server(_service(site), server)
        states = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(states, server)
        for name in ("", SERVICE):
            await states.set(name, health_pb2.HealthCheckResponse.SERVING)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await server.start()
        logger.info("the trainer of site %s listens at %s", site.name, address)
        await stop.wait()
        logger.info("stopped")
    finally:
        door.remove_socket(site.trainer)
    logging.shutdown()
    os._exit(0)  # without waiting for the thread of the model


def _service(site: SiteSettings) -> TrainerServicer:
    """The service with its one thread; what it imports takes seconds, a sixth more with the collector at work."""
    gc.disable()
    from .session import TrainerSession

    gc.freeze()
    gc.enable()
    resident, work = TrainerSession(site), ThreadPoolExecutor(1, "model")
    work.submit(resident.start).result()
    return TrainerServicer(resident, work)


def main(arguments: list[str]) -> int:
    """The process: one line and code 2 where the site file or the machine is not as it must be."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(message)s")
    for noisy in ("httpx", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        if len(arguments) != 1:
            raise ConfigError("arguments", "one site file", " ".join(arguments) or "none")
        serve(load_site(Path(arguments[0])))
    except ColoraError as error:
        print(f"colora: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
