"""The trainer process: ``python -m colora.client.trainer_service.server SITE.toml``.

The process keeps the base model in memory and serves GetSiteInfo and Train over gRPC. One thread runs all jobs on the
model, one at a time. A running job continues when its caller disconnects; a repeated request returns the stored reply.
Only site descriptions, replies, error types and the coordinator's own adapters leave the process. The audit log has
all of them.
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
import traceback
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
from ...common.foreign_text import clean
from ...common.protocol.types import Arrays, TrainReply, TrainRequest
from . import listener, serde, site_report
from .audit_log import AuditLog
from .lower_bounds import out_of_the_ordinary
from .plan_bounds import check_disk
from .proto import trainer_pb2 as pb
from .proto import trainer_pb2_grpc
from .site_events import SiteEvents

if TYPE_CHECKING:
    from .release import ReleasedReply
    from .session import TrainerSession


logger = logging.getLogger("colora.trainer")
SERVICE = "colora.trainer.v1.Trainer"
BAD_INPUT = 2  # exit code
MAX_REQUESTS = 4  # training requests at a time: one runs, the others wait
MAX_CALLS = 64  # calls at a time, including health checks
RECEIVE_TIMEOUT = 600.0  # seconds to receive a request's head, and then its arrays
PROGRESS = 1.0  # seconds between two progress messages
MAX_LINE, MAX_TRACEBACK = 1000, 200  # characters of a line and lines of an unexpected error in the log
MAX_ERROR_BYTES = 200  # of an error's public text, which gRPC sends in a header
# gRPC itself never ends a call with one of these two, so the client can tell our errors from those of gRPC
REFUSED, FAILED = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ABORTED
OPTIONS = [
    *serde.OPTIONS,
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # from a client that waits for a long training
]
Context = grpc.aio.ServicerContext
T = TypeVar("T")
END: Any = grpc.aio.EOF  # type: ignore[attr-defined]


@dataclass(frozen=True)
class TrainResult:
    """The stored reply, what of it is sent, and the number of training steps; None if it had been stored before."""

    reply: TrainReply
    released: ReleasedReply
    steps: int | None


@dataclass(frozen=True)
class Logs:
    """The logs of one federation. The thread ``audit`` writes both."""

    audit: AuditLog
    events: SiteEvents


class TrainerServicer(trainer_pb2_grpc.TrainerServicer):
    """The gRPC service. ``model_thread`` runs every job on the model, ``audit_thread`` writes the audit log."""

    def __init__(self, session: TrainerSession, model_thread: ThreadPoolExecutor) -> None:
        self.session, self.site, self.model_thread = session, session.site, model_thread
        self.audit_thread = ThreadPoolExecutor(1, "audit")
        self.progress = pb.Progress()
        self.described: Plan | None = None  # the plan of the last description
        self.slots = asyncio.Semaphore(MAX_REQUESTS)

    async def GetSiteInfo(self, request: pb.SiteInfoRequest, context: Context) -> pb.SiteInfo:
        """Return the description of the site for a plan."""
        logs = None
        try:
            serde.check_protocol(request.protocol)
            plan, logs = await self._accept(request.federation, request.plan)
            info = await _result(self.model_thread.submit(lambda: self.session.site_info(plan)))
            await _result(self.audit_thread.submit(logs.audit.site_info, info))
            is_new, self.described = plan != self.described, plan
            await _result(self.audit_thread.submit(logs.events.joined, info, is_new))
            return serde.site_info_message(info)
        except Exception as error:
            return await self._abort(error, context, logs)

    async def GetReceived(self, request: pb.ReceivedRequest, context: Context) -> None:
        """Return the shared adapter that the site received in a round. The coordinator has it, too."""
        logs = None
        try:
            async with self.slots:
                serde.check_protocol(request.protocol)
                plan, logs = await self._accept(request.federation, request.plan)
                arrays = await _result(self.model_thread.submit(self.session.received, plan, request.round))
                await _result(self.audit_thread.submit(logs.audit.received, request.round, arrays))
                for chunk in serde.chunks(arrays):
                    await context.write(chunk)
        except Exception as error:
            await self._abort(error, context, logs)

    async def Train(self, request_iterator: object, context: Context) -> None:
        """Run a training request: send progress while it runs, then the reply."""
        try:
            await self._train(context)
        finally:
            self.audit_thread.submit(release_memory)  # in another thread, so that the call ends without delay

    async def Sum(self, request: pb.SumRequest, context: Context) -> None:
        """Take a step of a secure sum."""
        logs, round_number = None, 0
        try:
            wanted = serde.sum_request_from(request)
            round_number = wanted.round
            plan, logs = await self._accept(wanted.federation, wanted.plan)
            reply = await _result(self.model_thread.submit(lambda: self.session.sum(plan, wanted)))
            await _result(self.audit_thread.submit(logs.audit.sum, reply))
            for part in serde.body_parts(reply):
                await context.write(part)
        except Exception as error:
            await self._abort(error, context, logs, round_number)

    async def _train(self, context: Context) -> None:
        logs, request = None, None
        try:
            async with self.slots:
                head = await self._receive_head(context)
                request = serde.request_from(head, {})
                plan, logs = await self._accept(request.federation, request.plan)
                layout = await _result(self.model_thread.submit(lambda: self.session.trainer(plan).layout))
                request = serde.request_from(head, await self._receive_arrays(context, layout))
                job = self.model_thread.submit(self._run, plan, request, logs.events)
                result = await _result(job, lambda: context.write(pb.TrainReplyPart(progress=self.progress)))
            reply = result.released.reply
            size = await _result(self.audit_thread.submit(_record, logs.audit, request, result))
            await _result(self.audit_thread.submit(logs.events.replied, request, result.reply, size))
            site_report.report_reply(request, reply, task=self.site.data.task, steps=result.steps, sent=size)
            await context.write(pb.TrainReplyPart(head=serde.reply_head(reply)))
            for chunk in serde.chunks(reply.shared):
                await context.write(pb.TrainReplyPart(chunk=chunk))
            if request.kind == "finalize":
                site_report.report_end(plan.name, reply.round - 1, self.session.folder(plan))
        except Exception as error:
            await self._abort(error, context, logs, request.round if request else 0)

    async def _accept(self, federation: str, text: str) -> tuple[Plan, Logs]:
        """Accept a plan whose federation may write more to the disk. Every failure is in the log of the whole site."""
        try:
            plan = self.session.accept(federation, text)
            folder = self.session.folder(plan)
            await _result(self.audit_thread.submit(check_disk, folder, self.site))
            unusual = out_of_the_ordinary(plan, self.site, self.session.examples(plan))
        except Exception as error:
            log = AuditLog(Path(self.site.trainer.state), clean(federation))
            await _result(self.audit_thread.submit(log.refusal, _public(error), str(error)))
            raise
        return plan, Logs(AuditLog(folder, plan.name, unusual), SiteEvents(folder, self.site.name, plan))

    async def _receive_head(self, context: Context) -> pb.TrainRequestHead:
        async with asyncio.timeout(RECEIVE_TIMEOUT):
            part: Any = await context.read()
        if part is END or part.WhichOneof("part") != "head":
            raise RefusedError("request", "the head first", "something else", site=self.site.name)
        return part.head

    async def _receive_arrays(self, context: Context, layout: Mapping[str, tuple[int, ...]]) -> Arrays:
        assembler = serde.ArrayAssembler(layout, self.site.name)
        async with asyncio.timeout(RECEIVE_TIMEOUT):
            while (part := await context.read()) is not END:
                if part.WhichOneof("part") != "chunk":
                    raise RefusedError("request", "arrays after the head", "something else", site=self.site.name)
                assembler.add(part.chunk)
        return assembler.arrays()

    def _run(self, plan: Plan, request: TrainRequest, events: SiteEvents) -> TrainResult:
        """Run a request in the thread of the model."""

        def on_step(done: int, total: int) -> None:
            self.progress = pb.Progress(step=done, total=total, kind=request.kind)

        on_step(0, 0)
        begin = self.audit_thread.submit
        reply, replayed = self.session.answer(plan, request, on_step, lambda: begin(events.began, request).result())
        released = self.session.released(plan, request, reply)
        return TrainResult(reply, released, None if replayed else self.progress.step)

    async def _abort(self, error: Exception, context: Context, logs: Logs | None, number: int = 0) -> Any:
        """Log an error in full, and end the call with its public text. ``number`` is the round of the request."""
        _log_error(error)
        code = REFUSED if isinstance(error, ColoraError) else FAILED
        public = _public(error)
        if logs is not None:
            try:
                reason = str(error) if isinstance(error, RefusedError) else ""  # other errors may quote data
                await _result(self.audit_thread.submit(logs.audit.error, public, reason))
                await _result(self.audit_thread.submit(logs.events.failed, number, str(error)))
            except ColoraError as audit_error:
                _log_error(audit_error)
                public = _public(audit_error)
        await context.abort(code, public)


async def _result(job: Future[T], send_progress: Callable[[], Awaitable[None]] | None = None) -> T:
    """Wait for the result of a job; ``send_progress`` is called every ``PROGRESS`` seconds.

    When the caller disconnects, a job that has not begun is cancelled and a running job continues.
    """
    waiting = asyncio.wrap_future(job)
    try:
        while not waiting.done():
            await asyncio.wait({waiting}, timeout=PROGRESS)
            if send_progress and not waiting.done():
                await send_progress()
    except BaseException:
        waiting.cancel()
        job.add_done_callback(_log_abandoned)
        raise
    return waiting.result()


def release_memory() -> None:
    """Return freed memory to the system. glibc would keep up to 64 MiB of it per thread."""
    with contextlib.suppress(OSError, AttributeError):  # with another C library
        ctypes.CDLL(None).malloc_trim(0)


def _record(audit: AuditLog, request: TrainRequest, result: TrainResult) -> int:
    released, replayed = result.released, result.steps is None
    kept = {"withheld": released.withheld, "rounded": released.rounded}
    return audit.reply(released.reply, request, replayed=replayed, **kept)


def _public(error: Exception) -> str:
    """What the coordinator receives of an error."""
    text = error.public() if isinstance(error, ColoraError) else type(error).__name__
    return text.encode(errors="replace")[:MAX_ERROR_BYTES].decode(errors="ignore")


def _log_abandoned(job: Future[Any]) -> None:
    error = None if job.cancelled() else job.exception()
    if isinstance(error, Exception):
        _log_error(error)
    elif not job.cancelled():
        logger.info("a job finished after its caller had disconnected")


def _log_error(error: Exception) -> None:
    """Write an error to the log. ``colora client`` shows its first line on the site's terminal.

    The text of an unexpected error may quote a whole plan, so its lines and those of its traceback are cut.
    """
    if isinstance(error, RefusedError):
        logger.error("refused: %s", error)
    elif isinstance(error, ColoraError):
        logger.error("%s", error)
    else:
        lines = "".join(traceback.format_exception(error)).splitlines()[-MAX_TRACEBACK:]
        where = "\n".join(clean(line, MAX_LINE) for line in lines)
        logger.error("unexpected error, %s\n%s", clean(f"{type(error).__name__}: {error}", MAX_LINE), where)


def serve(site: SiteSettings) -> None:
    """Serve a site until SIGTERM or SIGINT, which end the process at once, even during a round.

    The coordinator repeats an interrupted round. Raises ConfigError or StateError when the service cannot start.
    """
    os.umask(0o077)
    with listener.exclusive_state_dir(Path(site.trainer.state)):
        asyncio.run(_serve(site))


async def _serve(site: SiteSettings) -> None:
    server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
    address = listener.listen(server, site.trainer)
    try:
        trainer_pb2_grpc.add_TrainerServicer_to_server(_create_servicer(site), server)
        health_servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        for name in ("", SERVICE):
            await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await server.start()
        logger.info("the trainer of site %s listens on %s", site.name, address)
        await stop.wait()
        logger.info("stopped")
    finally:
        listener.remove_socket(site.trainer)
    logging.shutdown()
    os._exit(0)  # does not wait for the model thread


def _create_servicer(site: SiteSettings) -> TrainerServicer:
    """Create the servicer and its model thread.

    The imports take seconds, and a sixth longer with the garbage collector enabled.
    """
    gc.disable()
    from .session import TrainerSession

    gc.freeze()
    gc.enable()
    session, model_thread = TrainerSession(site), ThreadPoolExecutor(1, "model")
    model_thread.submit(session.start).result()
    return TrainerServicer(session, model_thread)


def main(arguments: list[str]) -> int:
    """Run the process. A bad site file or an unusable machine gives one line on stderr and exit code 2."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format=site_report.LOG_FORMAT)
    for name in ("httpx", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        if len(arguments) != 1:
            raise ConfigError(
                "arguments",
                "one site file",
                " ".join(arguments) or "none",
                message=f"Expected one argument, a site file, and got {len(arguments)}.",
            )
        serve(load_site(Path(arguments[0])))
    except ColoraError as error:
        print(f"colora: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
