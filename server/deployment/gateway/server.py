"""The gateway as a service: a socket, TLS, and uvicorn in a thread."""

from __future__ import annotations

import socket
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from ....common.errors import StateError
from .connections import Limits
from .listener import Listener
from .proxy import FleetProxy, Upstream, make_gateway

LOG_LEVEL = 60  # above logging.CRITICAL: nothing that callers send may reach the coordinator's terminal
STARTUP_TIMEOUT = 10.0  # seconds, also for the shutdown
MAX_HEADER = 16 << 10  # bytes of a request's header; SuperNode's has about 1 KiB
BACKLOG = 1024  # connections that wait for the gateway to accept them, or to be started again


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

    def __init__(
        self,
        listen: ListenAddress,
        upstream: Upstream,
        limits: Limits = Limits(),  # noqa: B008 (immutable)
        listener: socket.socket | None = None,
    ) -> None:
        """``listener`` is an open socket to use instead of a new one."""
        app = make_gateway(upstream, limits.upstream)
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
            h11_max_incomplete_event_size=MAX_HEADER,
            timeout_keep_alive=round(limits.idle),
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
        self.listen, self.listener = listen, listener
        self.server = _Server(config, app.state.proxy, limits)
        self.thread = threading.Thread(target=self._run, name="colora-gateway", daemon=True)

    def __enter__(self) -> GatewayServer:
        self.socket = self.listener or bind(self.listen)
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
        return address_of(self.socket)

    @property
    def alive(self) -> bool:
        """Whether the server thread is running and accepts connections."""
        accepting = self.server.listener.accepting
        return self.thread.is_alive() and accepting is not None and not accepting.done()

    def _run(self) -> None:
        self.server.run(sockets=[self.socket])


class _Server(uvicorn.Server):
    """Uvicorn's server with a listener of its own; at shutdown it first releases held requests."""

    def __init__(self, config: uvicorn.Config, proxy: FleetProxy, limits: Limits) -> None:
        super().__init__(config)
        self.proxy, self.open = proxy, threading.Event()  # set at the end of the startup
        self.listener = Listener(config, self.server_state, limits)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup([])
            for listening in sockets or ():
                self.listener.start(listening)
        finally:
            self.open.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.listener.stop()
        self.proxy.stop()
        await super().shutdown(sockets)


def address_of(listener: socket.socket) -> str:
    """Return ``host:port`` of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind(listen: ListenAddress) -> socket.socket:
    """Open a listening socket. Raises StateError if the port is in use or the address is not this machine's."""
    listener = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        if listener:
            listener.close()
        where, reason = f"{listen.host}:{listen.port}", error.strerror or error
        message, hint = f"Cannot listen on {where}: {reason}.", "Choose another --host or --port."
        raise StateError(where, "a free port of this machine", reason, message=message, hint=hint) from None
    return listener
