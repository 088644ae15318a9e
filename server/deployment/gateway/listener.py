"""The gateway's open port: accepts connections within limits, and ends those that keep it waiting."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Coroutine

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from .connections import CALLER, Caller, Connection, ConnectionTable, Limits

ACCEPT_PAUSE = 0.5  # seconds after accept failed for want of files or memory
SHUTDOWN_TIMEOUT = 5.0  # seconds for the end of a TLS session
CALLERS_FAULT = {errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ENETDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH}
logger = logging.getLogger("colora.gateway")


class Listener:
    """Accepts connections of one listening socket in the running event loop, until ``stop``."""

    def __init__(self, config: uvicorn.Config, state: ServerState, limits: Limits) -> None:
        self.config, self.state, self.limits = config, state, limits
        self.table = ConnectionTable(limits)
        self.accepting: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._failing = False

    def start(self, listener: socket.socket) -> None:
        """Begin to accept."""
        listener.setblocking(False)
        self.accepting = self._spawn(self._accept_all(listener))

    def stop(self) -> None:
        """Stop accepting, and end the handshakes in progress."""
        for task in self._tasks:
            task.cancel()

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("unexpected: %r", error)

    async def _accept_all(self, listener: socket.socket) -> None:
        while True:
            try:
                accepted, address = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as error:
                await self._pause_after(error)
                continue
            self._failing = False
            self._spawn(self._open(accepted, str(address[0])))
            await asyncio.sleep(0)  # sock_accept does not yield while connections wait

    async def _pause_after(self, error: OSError) -> None:
        """Survive a failed accept: at once if the caller was the reason, else after a pause, logged once."""
        if error.errno in CALLERS_FAULT:
            await asyncio.sleep(0)
            return
        if not self._failing:
            logger.warning("cannot accept connections, trying again every %s s: %s", ACCEPT_PAUSE, error)
        self._failing = True
        await asyncio.sleep(ACCEPT_PAUSE)

    async def _open(self, accepted: socket.socket, host: str) -> None:
        """Admit a connection and complete its TLS handshake."""
        loop, tls = asyncio.get_running_loop(), self.config.ssl
        connection = Connection(host, lambda: _shut(accepted))
        self.table.admit(connection)
        timing = {"ssl_handshake_timeout": self.limits.handshake, "ssl_shutdown_timeout": SHUTDOWN_TIMEOUT}
        try:
            await loop.connect_accepted_socket(
                lambda: TimedProtocol(self, connection), accepted, ssl=tls, **(timing if tls else {})
            )
        except BaseException as error:
            self.table.remove(connection)
            accepted.close()
            if not isinstance(error, OSError):  # a failed or late handshake is one
                raise


class TimedProtocol(H11Protocol):
    """Uvicorn's protocol with a time limit for each request's header. The app finds the caller in its state."""

    def __init__(self, listener: Listener, connection: Connection) -> None:
        super().__init__(listener.config, listener.state, {CALLER: Caller(listener.table, connection)})
        self.listener, self.connection = listener, connection
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for the first header."""
        super().connection_made(transport)  # pyright: ignore[reportArgumentType]
        self.connection.disconnect = self.transport.abort
        self._wait_for_header(self.listener.limits.header)

    def handle_events(self) -> None:
        """Stop waiting once a header is complete."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and not self.cycle.response_complete:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Begin to wait for the next header, which may have come already."""
        self._wait_for_header(self.listener.limits.idle)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        self.listener.table.remove(self.connection)
        super().connection_lost(exc)

    def _wait_for_header(self, seconds: float) -> None:
        self._stop_waiting()
        self._late = self.loop.call_later(seconds, self.connection.disconnect)

    def _stop_waiting(self) -> None:
        if self._late:
            self._late.cancel()
            self._late = None


def _shut(accepted: socket.socket) -> None:
    """End a connection in any state: its transport reads the end of the stream."""
    with contextlib.suppress(OSError):
        accepted.shutdown(socket.SHUT_RDWR)
