"""The gate as a service: a socket, TLS, and uvicorn in a thread of its own."""

from __future__ import annotations

import socket
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from ....common.errors import StateError
from .proxy import FleetProxy, Upstream, make_gateway

SILENT = 60  # above logging.CRITICAL: what callers send must not reach the coordinator's terminal
STARTUP = 10.0  # seconds
CROWD = 1024  # connections; more are answered 503, which a SuperNode retries


@dataclass(frozen=True)
class ListenAddress:
    """Where the gate stands. Port 0 takes a free one; without a certificate it speaks plain HTTP."""

    host: str
    port: int
    certificate: Path | None = None  # PEM
    key: Path | None = None


class GatewayServer:
    """A context manager: inside it the gate is open at ``host`` and ``port``.

    It installs no signal handlers and prints nothing. Leaving it answers what is held and closes the port.
    """

    def __init__(self, door: ListenAddress, upstream: Upstream) -> None:
        app = make_gateway(upstream)
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",  # strict, and the same wherever it runs
            ws="none",
            lifespan="on",
            log_config=None,
            log_level=SILENT,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=CROWD,
            timeout_keep_alive=30,  # longer than SuperNode keeps an idle connection
            timeout_graceful_shutdown=3,
            ssl_certfile=door.certificate,
            ssl_keyfile=door.key,
        )
        try:
            config.load()
        except (OSError, ssl.SSLError) as error:
            raise StateError(str(door.certificate), f"a certificate that fits {door.key}", error) from None
        self.door = door
        self.server = _Server(config, app.state.passage)
        self.thread = threading.Thread(target=self._run, name="colora-gate", daemon=True)

    def __enter__(self) -> GatewayServer:
        self.socket = _listen(self.door)
        self.host, self.port = self.socket.getsockname()[:2]
        self.thread.start()
        if not self.server.open.wait(STARTUP) or not self.server.started:
            self.__exit__()
            raise StateError(f"gate on {self.address}", "an open port", "that it did not start")
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.should_exit = True
        self.thread.join(STARTUP)
        self.socket.close()

    def hold(self) -> None:
        """From now on requests wait as if the SuperLink were away: it may answer before it knows its sites' keys."""
        self.server.passage.held = True

    def release(self) -> None:
        """Lets them through again."""
        self.server.passage.held = False

    @property
    def address(self) -> str:
        """``host:port`` as it listens."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def alive(self) -> bool:
        """Whether it still serves."""
        return self.thread.is_alive()

    def _run(self) -> None:
        self.server.run(sockets=[self.socket])


class _Server(uvicorn.Server):
    """Uvicorn's server, which says when it is open and lets held requests answer before it waits for them."""

    def __init__(self, config: uvicorn.Config, passage: FleetProxy) -> None:
        super().__init__(config)
        self.passage, self.open = passage, threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        finally:
            self.open.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.passage.stop()
        await super().shutdown(sockets)


def _listen(door: ListenAddress) -> socket.socket:
    """A bound socket. Raises StateError when the port is taken, or the address is not this machine's."""
    listener = None
    try:
        family, kind, _, _, place = socket.getaddrinfo(door.host, door.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen()
    except OSError as error:
        if listener:
            listener.close()
        raise StateError(f"{door.host}:{door.port}", "a free port of this machine", error.strerror or error) from None
    return listener
