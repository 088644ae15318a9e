"""The gateway's ASGI app: it forwards the calls that SuperNodes need to Flower's SuperLink, and nothing else.

The SuperLink serves all its APIs on one port. Its Control and Runtime APIs need no credentials, and whoever reaches
them can ship code to every site. The SuperLink therefore listens on loopback only, behind this app, which knows a
closed list of paths. It compares paths byte by byte, and requests its own constant from the SuperLink, never the
caller's spelling.

The gateway also shortens delays:

- While the SuperLink restarts, requests are held, which takes seconds instead of SuperNode's growing retry delays.
- A pull that finds no message is repeated here, so an idle SuperNode receives a message at once and not up to three
  seconds later.
- A pull of a message part that is still being uploaded is repeated here in the same way.

The SuperLink delivers a message once. A node that pulls again without any other call in between gets its last message
again, since the connection must have broken before the message arrived.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import httpx
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from .body import BUFFER_SIZE, MAX_BODY, READ_TIMEOUT, Body, TooLarge, in_batches
from .connections import CALLER, MAX_UPSTREAM
from .signatures import REFUSALS, SignatureCheck
from .upstream import Upstream, trust

RETRY_INTERVAL = 0.2  # seconds between two attempts to reach the SuperLink
WAKE_INTERVAL = 1.0  # minimum seconds between two times at which a message for one node wakes all pulls

HEALTH = b"/health"
FORWARDED = frozenset(  # request headers; all others are dropped
    name.encode()
    for name in (
        "content-type",
        "accept",
        "flwr-public-key",
        "flwr-timestamp",
        "flwr-signature",
        "flwr-package-name",
        "flwr-package-version",
        "flwr-component-name",
    )
)
RETURNED = (  # response headers; all others are dropped
    "content-type",
    "flwr-version-incompatibility-message",
)


@dataclass(frozen=True)
class Call:
    """One call of the Fleet API. ``idempotent`` calls can be sent again when the connection breaks."""

    idempotent: bool = True
    hold: float = 25.0  # maximum seconds for which it is held while the SuperLink is down


PULL, OBJECT, HEARTBEAT = b"/v1/fleet/pull-messages", b"/v1/fleet/pull-object", b"/v1/fleet/send-node-heartbeat"
CALLS = {
    # A second activation is refused and SuperNode exits on that, so the retry is left to SuperNode.
    b"/v1/fleet/activate-node": Call(idempotent=False),
    b"/v1/fleet/deactivate-node": Call(idempotent=False, hold=3.0),  # sent when a SuperNode exits
    HEARTBEAT: Call(hold=3.0),  # SuperNode's timeout is 5 s
    # If the response is lost here, so is its message; the coordinator then sends another one.
    PULL: Call(),
    b"/v1/fleet/push-messages": Call(),  # replies have ids
    b"/v1/fleet/get-run": Call(),
    b"/v1/fleet/get-fab": Call(),
    b"/v1/fleet/push-object": Call(),  # objects are named by their hashes
    OBJECT: Call(),
    b"/v1/fleet/confirm-message-received": Call(),
}
REGISTRATION = {
    b"/v1/fleet/register-node": Call(idempotent=False),
    b"/v1/fleet/unregister-node": Call(idempotent=False),
}


def make_gateway(upstream: Upstream, max_connections: int = MAX_UPSTREAM) -> Starlette:
    """Build the gateway's ASGI app. Raises StateError if the CA certificate cannot be read."""
    proxy = FleetProxy(upstream, max_connections)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with proxy.client:
            yield

    app = Starlette(routes=[Mount("", app=proxy)], lifespan=lifespan)
    app.state.proxy = proxy
    return app


class FleetProxy:
    """Filters, holds and forwards requests. One instance serves all requests in one event loop."""

    def __init__(self, upstream: Upstream, max_connections: int) -> None:
        self.upstream = upstream
        self.signatures = None if upstream.keys is None else SignatureCheck(upstream.keys)
        self.calls = CALLS | (REGISTRATION if upstream.registration else {})
        self.client = httpx.AsyncClient(
            verify=trust(upstream),
            trust_env=False,  # no proxy between two processes of one machine
            timeout=httpx.Timeout(READ_TIMEOUT, connect=2.0),
            # The SuperLink closes idle connections after 5 s.
            limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=32, keepalive_expiry=2.0),
            headers={"accept-encoding": "identity", "user-agent": "colora-gateway"},
        )
        self.waiting: dict[tuple[str, bytes], object] = {}  # node → its latest empty pull
        self.delivered: dict[str, Response] = {}  # registered node → its last message, until its next call but a pull
        self.waiting_objects = 0  # pulls of objects that are still being uploaded
        self.wake, self.last_wake = asyncio.Event(), 0.0
        self.held = False  # hold requests even if the SuperLink answers
        self.stopping = False

    def stop(self) -> None:
        """End all held and repeated requests now."""
        self.stopping = True
        self.wake.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        async with AsyncExitStack() as stack:
            request = Request(scope, receive)
            try:
                response = await self._answer(request, stack)
            except ClientDisconnect:
                return
            except TooLarge:
                response = _refuse(413, f"the body has more than {MAX_BODY} bytes")
            except TimeoutError:
                response = _refuse(408, "timeout while reading the body")
            await response(scope, receive, send)

    async def _answer(self, request: Request, stack: AsyncExitStack) -> Response:
        path, plain = request.scope.get("raw_path", b""), not request.scope["query_string"]
        if path == HEALTH and plain and request.method == "GET":
            return PlainTextResponse("ok")
        call = self.calls.get(path) if plain and request.method == "POST" else None
        if call is None:
            return _refuse(404, "not found")
        refusal = self._identify(request)
        if refusal:
            return refusal
        if path not in (PULL, HEARTBEAT):
            self.delivered.pop(request.headers.get("flwr-public-key", ""), None)
        body = Body(request)
        await body.begin()
        held = HeldRequest(request, body, path.decode(), call, time.monotonic() + min(call.hold, self.upstream.hold))
        handlers = {PULL: self._pull, OBJECT: self._pull_object}
        return await handlers.get(path, self._send)(held, stack)

    def _identify(self, request: Request) -> Response | None:
        """Check the signature, if there are keys, and make the connection a known one; else return the refusal."""
        caller, key = request.scope["state"][CALLER], None
        if self.signatures:
            verdict = self.signatures.check(request.headers, caller.connection)
            if verdict != "valid":
                status, content = REFUSALS[verdict]
                return JSONResponse(content, status, {"connection": "close"})
            key = request.headers["flwr-public-key"]
        caller.accept_key(key)
        return None

    async def _pull(self, held: HeldRequest, stack: AsyncExitStack) -> Response:
        """Repeat a pull until there is a message. A later pull of the same node ends it: its caller must be gone."""
        key, me = held.request.headers.get("flwr-public-key", ""), object()
        if key in self.delivered:
            return self.delivered[key]
        node, deadline = (key, held.body.head), time.monotonic() + self.upstream.linger
        try:
            answer = await self._send(held, stack)
            if is_empty(answer):  # the SuperLink has verified the node's signature
                self.waiting[node] = me
            while is_empty(answer):
                pause = self._pause(len(self.waiting))
                if time.monotonic() + pause > deadline:
                    return answer
                await self._sleep(pause)
                if self.waiting.get(node) is not me or await self._is_abandoned(held):
                    return answer
                answer = await self._send(held, stack)
        finally:
            if self.waiting.get(node) is me:
                del self.waiting[node]
        if answer.status_code == 200:
            self._wake_all()
            if self.signatures and not isinstance(answer, StreamingResponse):
                self.delivered[key] = answer
        return answer

    async def _pull_object(self, held: HeldRequest, stack: AsyncExitStack) -> Response:
        """Repeat a pull until the object has been uploaded. SuperNode alone would retry after 1 s, 2 s, 4 s."""
        deadline = time.monotonic() + self.upstream.linger
        self.waiting_objects += 1
        try:
            while is_incomplete(answer := await self._send(held, stack)):
                pause = self._pause(self.waiting_objects)
                if time.monotonic() + pause > deadline or await self._is_abandoned(held):
                    break
                await asyncio.sleep(pause)
            return answer
        finally:
            self.waiting_objects -= 1

    def _is_holding(self) -> bool:
        return self.held or (self.upstream.held_by is not None and self.upstream.held_by.exists())

    def _pause(self, waiting: int) -> float:
        return max(self.upstream.pause, min(waiting / self.upstream.rate, self.upstream.slowest))

    def _wake_all(self) -> None:
        """Repeat all waiting pulls now: when one node has a message, the others are likely to have one too."""
        if time.monotonic() - self.last_wake > WAKE_INTERVAL:
            self.last_wake = time.monotonic()
            self.wake.set()
            self.wake = asyncio.Event()

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self.wake.wait()
        except TimeoutError:
            pass

    async def _is_abandoned(self, held: HeldRequest) -> bool:
        """Whether the caller is gone, as far as can be known without consuming the body, or the gateway stops."""
        return self.stopping or (held.body.whole and await held.request.is_disconnected())

    async def _send(self, held: HeldRequest, stack: AsyncExitStack) -> Response:
        """Forward a request; hold and repeat it while the SuperLink is down and sending it again is safe."""
        while True:
            try:
                if not self._is_holding():
                    return await self._forward(held, stack)
                safe = True
            except (httpx.ConnectError, httpx.ConnectTimeout):
                safe = not held.body.spent  # nothing has been sent
            except httpx.TimeoutException:
                return _refuse(504, "the SuperLink did not respond in time")
            except httpx.TransportError:
                safe = held.call.idempotent and not held.body.spent
            if not safe or time.monotonic() + RETRY_INTERVAL > held.deadline or await self._is_abandoned(held):
                return _refuse(503, "the SuperLink is down")
            await asyncio.sleep(RETRY_INTERVAL)

    async def _forward(self, held: HeldRequest, stack: AsyncExitStack) -> Response:
        headers = [(name, value) for name, value in held.request.scope["headers"] if name in FORWARDED]
        if not held.body.whole and held.body.length is not None:
            headers.append((b"content-length", str(held.body.length).encode()))
        content = held.body.content()
        request = self.client.build_request("POST", self.upstream.url + held.path, headers=headers, content=content)
        answer = await self.client.send(request, stream=True)
        returned = {name: answer.headers[name] for name in RETURNED if name in answer.headers}
        length = answer.headers.get("content-length")
        if length is not None and int(length) <= BUFFER_SIZE:
            try:
                return Response(b"".join([chunk async for chunk in answer.aiter_raw()]), answer.status_code, returned)
            finally:
                await answer.aclose()
        stack.push_async_callback(answer.aclose)
        if length is not None:
            returned["content-length"] = length
        return StreamingResponse(in_batches(answer.aiter_raw()), answer.status_code, returned)


@dataclass(frozen=True)
class HeldRequest:
    """A request that is being forwarded. It is held until ``deadline`` (monotonic seconds)."""

    request: Request
    body: Body
    path: str
    call: Call
    deadline: float


def is_empty(answer: Response) -> bool:
    """Whether a pull found no message: a PullMessagesResponse without fields has no bytes in protobuf.

    Any other response is returned to the SuperNode unchanged. If Flower encoded "no message" in another way, only time
    would be lost.
    """
    return answer.status_code == 200 and not isinstance(answer, StreamingResponse) and not answer.body


def is_incomplete(answer: Response) -> bool:
    """Whether an object is still being uploaded: only ``object_found`` is set in the PullObjectResponse."""
    return answer.status_code == 200 and not isinstance(answer, StreamingResponse) and answer.body == b"\x08\x01"


def _refuse(status: int, reason: str) -> Response:
    return PlainTextResponse(reason, status, {"connection": "close"})
