"""The gateway as a service: a socket, TLS, and uvicorn in a thread."""

from __future__ import annotations

import socket
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from ....common.errors import StateError
from .proxy import FleetProxy, Upstream, make_gateway

LOG_LEVEL = 60  # above logging.CRITICAL: nothing that callers send may reach the coordinator's terminal
STARTUP_TIMEOUT = 10.0  # seconds, also for the shutdown
MAX_CONNECTIONS = 1024  # further ones receive status 503, after which a SuperNode retries


@dataclass(frozen=True)
class ListenAddress:
    """The address to listen on. Port 0 picks a free port. Without a certificate the gateway speaks plain HTTP."""

    host: str
    port: int
    certificate: Path | None = None  # PEM
    key: Path | None = None


class GatewayServer:
    """Runs the gateway as a context manager; ``host`` and ``port`` are set while it is open.

    It installs no signal handlers and prints nothing. On exit it answers held requests and closes the port.
    """

    def __init__(self, listen: ListenAddress, upstream: Upstream) -> None:
        app = make_gateway(upstream)
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",  # strict, and the same on every platform
            ws="none",
            lifespan="on",
            log_config=None,
            log_level=LOG_LEVEL,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=30,  # seconds; longer than SuperNode keeps an idle connection
            timeout_graceful_shutdown=3,
            ssl_certfile=listen.certificate,
            ssl_keyfile=listen.key,
        )
        try:
            config.load()
        except (OSError, ssl.SSLError) as error:
            raise StateError(
                str(listen.certificate),
                f"a certificate that fits {listen.key}",
                error,
                message=f"The certificate {listen.certificate} cannot be used with the key {listen.key}: {error}.",
            ) from None
        self.listen = listen
        self.server = _Server(config, app.state.proxy)
        self.thread = threading.Thread(target=self._run, name="colora-gateway", daemon=True)

    def __enter__(self) -> GatewayServer:
        self.socket = _bind(self.listen)
        self.host, self.port = self.socket.getsockname()[:2]
        self.thread.start()
        if not self.server.open.wait(STARTUP_TIMEOUT) or not self.server.started:
            self.__exit__()
            message = f"The gateway did not start on {self.address}."
            raise StateError(f"gateway on {self.address}", "a running gateway", "none", message=message)
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.should_exit = True
        self.thread.join(STARTUP_TIMEOUT)
        self.socket.close()

    def hold(self) -> None:
        """Hold all requests, even if the SuperLink answers: it may not have its sites' keys yet."""
        self.server.proxy.held = True

    def release(self) -> None:
        """Forward requests again."""
        self.server.proxy.held = False

    @property
    def address(self) -> str:
        """``host:port`` of the open socket."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def alive(self) -> bool:
        """Whether the server thread is running."""
        return self.thread.is_alive()

    def _run(self) -> None:
        self.server.run(sockets=[self.socket])


class _Server(uvicorn.Server):
    """Uvicorn's server, with an event for the end of its startup; at shutdown it first releases held requests."""

    def __init__(self, config: uvicorn.Config, proxy: FleetProxy) -> None:
        super().__init__(config)
        self.proxy, self.open = proxy, threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        finally:
            self.open.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.proxy.stop()
        await super().shutdown(sockets)


def _bind(listen: ListenAddress) -> socket.socket:
    """Open a listening socket. Raises StateError if the port is in use or the address is not this machine's."""
    listener = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        if listener:
            listener.close()
        where, reason = f"{listen.host}:{listen.port}", error.strerror or error
        message, hint = f"Cannot listen on {where}: {reason}.", "Choose another --host or --port."
        raise StateError(where, "a free port of this machine", reason, message=message, hint=hint) from None
    return listener
