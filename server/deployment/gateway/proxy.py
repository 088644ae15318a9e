"""The gate on the public port: only what SuperNodes need of Flower's SuperLink comes through.

The SuperLink answers everything on one port, and its Control and Runtime APIs ask for no credentials: whoever reaches
them ships code to every site. So it listens on loopback, and this ASGI app stands before it. It knows a closed list of
paths, compares them byte by byte and asks the SuperLink for its own spelling of them, never for the caller's.

It also keeps three things short. A SuperLink that is being restarted costs seconds instead of SuperNode's growing
delays: requests are held until it is back. And a message reaches an idle SuperNode at once instead of at its next
question three seconds later: a pull that finds nothing is repeated here. So is one for a part of a message that is
still on its way to the SuperLink.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from ....common.errors import StateError
from .body import KEPT, MOST, PATIENCE, Body, TooLarge, in_batches

RETRY = 0.2  # seconds between two tries to reach the SuperLink
BURST = 1.0  # seconds between two times that news for one wakes all

HEALTH = b"/health"
SENT = frozenset(
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
RETURNED = ("content-type", "flwr-version-incompatibility-message")


@dataclass(frozen=True)
class Call:
    """One call of the Fleet API. ``again``: sending it twice does what sending it once does, or harms nobody."""

    again: bool = True
    hold: float = 25.0  # seconds at most that it waits for the SuperLink


PULL, OBJECT = b"/v1/fleet/pull-messages", b"/v1/fleet/pull-object"
CALLS = {
    # A second activation is refused, and SuperNode exits on that; so its own retry decides.
    b"/v1/fleet/activate-node": Call(again=False),
    b"/v1/fleet/deactivate-node": Call(again=False, hold=3.0),  # a SuperNode on its way out
    b"/v1/fleet/send-node-heartbeat": Call(hold=3.0),  # SuperNode waits 5 s for it
    # A message whose answer got lost is lost, asked again or not: the coordinator orders anew.
    PULL: Call(),
    b"/v1/fleet/push-messages": Call(),  # the SuperLink knows a reply by its id
    b"/v1/fleet/get-run": Call(),
    b"/v1/fleet/get-fab": Call(),
    b"/v1/fleet/push-object": Call(),  # objects are named by their hash
    OBJECT: Call(),
    b"/v1/fleet/confirm-message-received": Call(),
}
# In the form of Flower's errors, whose SuperNode says it to its owner; Flower's own answer does not tell why.
UNKNOWN_KEY = {"code": 2004, "detail": "This key is not registered with the coordinator."}
REGISTRATION = {b"/v1/fleet/register-node": Call(again=False), b"/v1/fleet/unregister-node": Call(again=False)}


@dataclass(frozen=True)
class Upstream:
    """The SuperLink behind the gate.

    ``registration`` lets nodes register themselves, which SuperNodes without a key do; only for ``--insecure``.
    Seconds: ``hold`` while the SuperLink is away, ``linger`` over a pull that finds nothing, ``pause`` between two
    questions for one node or object. The pause grows with those that wait, so that all pulls together, and all objects
    together, ask ``rate`` questions a second (each costs the SuperLink 12 ms of CPU), but not beyond ``slowest``:
    SuperNode by itself asks every 3 s.
    """

    url: str  # https://127.0.0.1:PORT
    ca: Path | None = None  # PEM; needed for https
    registration: bool = False
    keys: frozenset[str] | None = None  # registered public keys, as SuperNodes send them; None: any
    hold: float = 25.0
    linger: float = 20.0
    pause: float = 0.1
    rate: float = 12.0
    slowest: float = 2.0


def make_gateway(upstream: Upstream) -> Starlette:
    """The gate as an ASGI app. Raises StateError when the CA certificate cannot be read."""
    passage = FleetProxy(upstream)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with passage.client:
            yield

    app = Starlette(routes=[Mount("", app=passage)], lifespan=lifespan)
    app.state.passage = passage
    return app


class FleetProxy:
    """Compares, holds and forwards. One for all requests, in one event loop."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.calls = CALLS | (REGISTRATION if upstream.registration else {})
        self.client = httpx.AsyncClient(
            verify=_trust(upstream),
            trust_env=False,  # no proxy stands between two processes of one machine
            timeout=httpx.Timeout(PATIENCE, connect=2.0),
            # The SuperLink closes idle connections after 5 s.
            limits=httpx.Limits(max_connections=256, max_keepalive_connections=32, keepalive_expiry=2.0),
            headers={"accept-encoding": "identity", "user-agent": "colora-gate"},
        )
        self.waiting: dict[tuple[str, bytes], object] = {}  # nodes whose pull found nothing yet → the pull
        self.awaited = 0  # objects that are asked for
        self.news, self.last_news = asyncio.Event(), 0.0
        self.held = False  # the SuperLink counts as away although it may answer
        self.stopping = False

    def stop(self) -> None:
        """Lets everything that is held or lingers answer now."""
        self.stopping = True
        self.news.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        async with AsyncExitStack() as stack:
            request = Request(scope, receive)
            try:
                response = await self._answer(request, stack)
            except ClientDisconnect:
                return
            except TooLarge:
                response = _refuse(413, f"a body of more than {MOST} bytes")
            except TimeoutError:
                response = _refuse(408, "no more of the body came")
            await response(scope, receive, send)

    async def _answer(self, request: Request, stack: AsyncExitStack) -> Response:
        path, plain = request.scope.get("raw_path", b""), not request.scope["query_string"]
        if path == HEALTH and plain and request.method == "GET":
            return PlainTextResponse("ok")
        call = self.calls.get(path) if plain and request.method == "POST" else None
        if call is None:
            return _refuse(404, "not found")
        if self.upstream.keys is not None and request.headers.get("flwr-public-key") not in self.upstream.keys:
            return JSONResponse(UNKNOWN_KEY, 400, {"connection": "close"})
        body = Body(request)
        await body.begin()
        asked = HeldRequest(request, body, path.decode(), call, time.monotonic() + min(call.hold, self.upstream.hold))
        ways = {PULL: self._pull, OBJECT: self._object}
        return await ways.get(path, self._reach)(asked, stack)

    async def _pull(self, asked: HeldRequest, stack: AsyncExitStack) -> Response:
        """Asks until there is a message; a later pull of the same node ends this one, whose caller must be gone."""
        name, me = (asked.request.headers.get("flwr-public-key", ""), asked.body.head), object()
        ends = time.monotonic() + self.upstream.linger
        try:
            answer = await self._reach(asked, stack)
            if is_empty(answer):  # so the SuperLink knows the node by its signature
                self.waiting[name] = me
            while is_empty(answer):
                pause = self._pause(len(self.waiting))
                if time.monotonic() + pause > ends:
                    return answer
                await self._rest(pause)
                if self.waiting.get(name) is not me or await self._pointless(asked):
                    return answer
                answer = await self._reach(asked, stack)
        finally:
            if self.waiting.get(name) is me:
                del self.waiting[name]
        if answer.status_code == 200:
            self._tell()
        return answer

    async def _object(self, asked: HeldRequest, stack: AsyncExitStack) -> Response:
        """Asks until a part of a message that is still on its way has come: SuperNode by itself waits 1 s, 2 s, 4 s."""
        ends = time.monotonic() + self.upstream.linger
        self.awaited += 1
        try:
            while is_on_its_way(answer := await self._reach(asked, stack)):
                pause = self._pause(self.awaited)
                if time.monotonic() + pause > ends or await self._pointless(asked):
                    break
                await asyncio.sleep(pause)
            return answer
        finally:
            self.awaited -= 1

    def _pause(self, waiting: int) -> float:
        return max(self.upstream.pause, min(waiting / self.upstream.rate, self.upstream.slowest))

    def _tell(self) -> None:
        """One node has a message, so others are likely to have theirs: they ask now, however long their pause."""
        if time.monotonic() - self.last_news > BURST:
            self.last_news = time.monotonic()
            self.news.set()
            self.news = asyncio.Event()

    async def _rest(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self.news.wait()
        except TimeoutError:
            pass

    async def _pointless(self, asked: HeldRequest) -> bool:
        """Whether nobody waits for the answer any more, as far as can be known without eating up the body."""
        return self.stopping or (asked.body.whole and await asked.request.is_disconnected())

    async def _reach(self, asked: HeldRequest, stack: AsyncExitStack) -> Response:
        """Forwards, and holds while the SuperLink is away and trying again is safe."""
        while True:
            try:
                if not self.held:
                    return await self._forward(asked, stack)
                safe = True
            except (httpx.ConnectError, httpx.ConnectTimeout):
                safe = not asked.body.spent  # nothing was sent yet
            except httpx.TimeoutException:
                return _refuse(504, "the SuperLink does not answer")
            except httpx.TransportError:
                safe = asked.call.again and not asked.body.spent
            if not safe or time.monotonic() + RETRY > asked.ends or await self._pointless(asked):
                return _refuse(503, "the SuperLink is away")
            await asyncio.sleep(RETRY)

    async def _forward(self, asked: HeldRequest, stack: AsyncExitStack) -> Response:
        headers = [(name, value) for name, value in asked.request.scope["headers"] if name in SENT]
        if not asked.body.whole and asked.body.length is not None:
            headers.append((b"content-length", str(asked.body.length).encode()))
        content = asked.body.content()
        request = self.client.build_request("POST", self.upstream.url + asked.path, headers=headers, content=content)
        answer = await self.client.send(request, stream=True)
        kept = {name: answer.headers[name] for name in RETURNED if name in answer.headers}
        length = answer.headers.get("content-length")
        if length is not None and int(length) <= KEPT:
            try:
                return Response(b"".join([chunk async for chunk in answer.aiter_raw()]), answer.status_code, kept)
            finally:
                await answer.aclose()
        stack.push_async_callback(answer.aclose)
        if length is not None:
            kept["content-length"] = length
        return StreamingResponse(in_batches(answer.aiter_raw()), answer.status_code, kept)


@dataclass(frozen=True)
class HeldRequest:
    """A request on its way through: ``ends`` is when it is held no longer (monotonic seconds)."""

    request: Request
    body: Body
    path: str
    call: Call
    ends: float


def is_empty(answer: Response) -> bool:
    """Whether a pull found nothing. A PullMessagesResponse without any field is no bytes at all in protobuf.

    Anything else goes to the SuperNode as it is, so a Flower that says "nothing" in another way costs time only.
    """
    return answer.status_code == 200 and not isinstance(answer, StreamingResponse) and not answer.body


def is_on_its_way(answer: Response) -> bool:
    """Whether an object was announced and has not come yet: of a PullObjectResponse, ``object_found`` alone is set."""
    return answer.status_code == 200 and not isinstance(answer, StreamingResponse) and answer.body == b"\x08\x01"


def _refuse(status: int, why: str) -> Response:
    return PlainTextResponse(why, status, {"connection": "close"})


def _trust(upstream: Upstream) -> ssl.SSLContext | bool:
    if upstream.url.startswith("http://"):
        return False
    try:
        return ssl.create_default_context(cafile=upstream.ca)
    except (OSError, ssl.SSLError) as error:
        raise StateError(str(upstream.ca), "a CA certificate (PEM)", error) from None
