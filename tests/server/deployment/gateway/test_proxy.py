"""Which requests the gateway forwards, refuses, holds and repeats, before a fake SuperLink that records requests."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from colora.server.deployment.gateway import proxy
from colora.server.deployment.gateway.proxy import CALLS, FORWARDED, HEARTBEAT, PULL, REGISTRATION, Upstream
from colora.server.deployment.gateway.server import GatewayServer, ListenAddress

from .conftest import SiteKey

GET_RUN, PULLS = "/v1/fleet/get-run", PULL.decode()
Answer = tuple[int, bytes] | None  # None: closes the connection without a response
PLAIN = ssl.create_default_context()  # once: a client that is given none reads all certificates of the system


@dataclass(frozen=True)
class Seen:
    line: str
    headers: dict[str, str]
    body: bytes


@dataclass
class SuperLink:
    """A plain HTTP server that records every request and responds with ``answer(request)``."""

    port: int = 0
    answer: Callable[[Seen], Answer] = lambda _: (200, b"done")
    seen: list[Seen] = field(default_factory=list)
    news: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        link = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def do_POST(self) -> None:
                seen = Seen(self.requestline, {k.lower(): v for k, v in self.headers.items()}, self._body())
                with link.news:
                    link.seen.append(seen)
                    link.news.notify_all()
                answer = link.answer(seen)
                if answer is None:
                    self.close_connection = True
                    return
                self.send_response(answer[0])
                self.send_header("content-type", "application/protobuf")
                self.send_header("connection", "keep-alive")
                self.send_header("x-inside", "private")
                self.send_header("content-length", str(len(answer[1])))
                self.end_headers()
                self.wfile.write(answer[1])

            def _body(self) -> bytes:
                if "content-length" in self.headers:
                    return self.rfile.read(int(self.headers["content-length"]))
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            do_GET = do_PUT = do_HEAD = do_DELETE = do_OPTIONS = do_CONNECT = do_POST

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def wait_for(self, count: int, seconds: float = 10.0) -> bool:
        with self.news:
            return self.news.wait_for(lambda: len(self.seen) >= count, seconds)

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def superlink() -> Iterator[SuperLink]:
    link = SuperLink()
    yield link
    link.stop()


@pytest.fixture
def gateway(superlink: SuperLink) -> Iterator[GatewayServer]:
    with GatewayServer(
        ListenAddress("127.0.0.1", 0), Upstream(f"http://127.0.0.1:{superlink.port}", hold=2.0, linger=1.5)
    ) as gateway:
        yield gateway


def raw(gateway: GatewayServer, request: bytes) -> list[bytes]:
    """Send a raw request, which closes its connection, and return the status lines of the responses."""
    with socket.create_connection(("127.0.0.1", gateway.port), 10) as connection:
        connection.sendall(request)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return re.findall(rb"HTTP/1.1 [^\r]*", answer) or [answer]


def line(start: str, *headers: str, body: bytes = b"") -> bytes:
    own = [] if any(h.lower().startswith(("content-length", "transfer")) for h in headers) else [len(body)]
    lengths = [f"Content-Length: {n}" for n in own]
    return "\r\n".join([start, "Host: gateway", "Connection: close", *headers, *lengths, "", ""]).encode() + body


def post(gateway: GatewayServer, path: str, body: bytes | Iterator[bytes] = b"x", **more: object) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=30, verify=PLAIN) as client:
        return client.post(f"http://{gateway.address}{path}", content=body, **more)  # type: ignore[arg-type]


def free_port() -> int:
    with socket.socket() as finder:
        finder.bind(("127.0.0.1", 0))
        return finder.getsockname()[1]


# --- forwarded ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [path.decode() for path in CALLS])
def test_fleet_calls_come_through_unchanged(gateway: GatewayServer, superlink: SuperLink, path: str) -> None:
    answer = post(gateway, path, b"\x00\x01payload")
    assert (answer.status_code, answer.content) == (200, b"done")
    assert [(seen.line, seen.body) for seen in superlink.seen] == [(f"POST {path} HTTP/1.1", b"\x00\x01payload")]


def test_only_needed_headers_go_in_and_out(gateway: GatewayServer, superlink: SuperLink) -> None:
    allowed = {name.decode(): f"value of {name.decode()}" for name in FORWARDED}
    extra = {"x-forwarded-for": "1.2.3.4", "flwr-task-token": "t", "cookie": "c", "te": "trailers", "upgrade": "h2c"}
    answer = post(gateway, GET_RUN, headers=allowed | extra | {"connection": "keep-alive, flwr-x", "flwr-x": "1"})
    given = superlink.seen[0].headers
    assert {name: given[name] for name in allowed} == allowed
    framing = {"host", "connection", "accept-encoding", "user-agent", "content-length"}
    assert set(given) == set(allowed) | framing
    assert given["connection"] == "keep-alive"
    assert given["host"] == f"127.0.0.1:{superlink.port}"
    assert "x-inside" not in answer.headers
    assert answer.headers["content-type"] == "application/protobuf"


def test_the_lists_are_what_flowers_client_sends() -> None:
    """Oracle: Flower's own client with its own interceptors, on a transport that records the request."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from flwr.proto import fleet_pb2
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    seen: list[httpx.Request] = []

    def note(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200)

    key = ec.generate_private_key(ec.SECP384R1())
    interceptors = [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())]
    with FleetHttpClient("http://gateway", interceptors=interceptors) as client:
        client._client = httpx.Client(transport=httpx.MockTransport(note))
        calls = [name for name in vars(FleetHttpClient) if name[0].isupper()]
        for name in calls:
            getattr(client, name)(fleet_pb2.PullMessagesRequest())
    assert {request.url.raw_path for request in seen} == set(CALLS) | set(REGISTRATION)
    transport = {"host", "accept-encoding", "connection", "user-agent", "content-length"}
    assert {name for request in seen for name in request.headers} - transport == {name.decode() for name in FORWARDED}


def test_registration_comes_through_only_when_it_is_open(gateway: GatewayServer, superlink: SuperLink) -> None:
    assert post(gateway, "/v1/fleet/register-node").status_code == 404
    assert superlink.seen == []
    url = f"http://127.0.0.1:{superlink.port}"
    with GatewayServer(ListenAddress("127.0.0.1", 0), Upstream(url, registration=True)) as open_gate:
        assert post(open_gate, "/v1/fleet/register-node").status_code == 200


def test_large_bodies_stream_both_ways(gateway: GatewayServer, superlink: SuperLink) -> None:
    body = bytes(range(256)) * (5 << 12)  # 5 MiB, Flower's chunk
    superlink.answer = lambda seen: (200, seen.body[::-1])
    answer = post(gateway, "/v1/fleet/push-object", body)
    assert answer.content == body[::-1]
    assert superlink.seen[0].headers["content-length"] == str(len(body))
    chunked = post(gateway, "/v1/fleet/push-object", (body[i : i + 65536] for i in range(0, len(body), 65536)))
    assert chunked.content == body[::-1]


def test_errors_of_the_superlink_come_through(gateway: GatewayServer, superlink: SuperLink) -> None:
    superlink.answer = lambda _: (401, b'{"detail":"no"}')
    assert (post(gateway, PULLS).status_code, post(gateway, GET_RUN).status_code) == (401, 401)
    assert len(superlink.seen) == 2


def test_health_is_answered_by_the_gateway(gateway: GatewayServer, superlink: SuperLink) -> None:
    assert raw(gateway, line("GET /health HTTP/1.1")) == [b"HTTP/1.1 200 OK"]
    for start in ("POST /health HTTP/1.1", "GET /health/ HTTP/1.1", "GET /health?x HTTP/1.1", "HEAD /health HTTP/1.1"):
        assert raw(gateway, line(start)) == [b"HTTP/1.1 404 Not Found"], start
    assert superlink.seen == []


# --- refused --------------------------------------------------------------------------------------------------------

SECRET = [
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/control/list-runs",
    "/v1/control/list-nodes",
    "/v1/control/stop-run",
    "/v1/runtime/acquire-task",
    "/v1/runtime/push-messages",
    "/v1/runtime/pull-messages",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/responses",
    "/docs",
    "/openapi.json",
    "/",
]
SPELLINGS = {
    "plain": "{0}",
    "double slash": "/{0}",
    "double slash inside": "/v1//{1}",
    "dots": "/v1/fleet/..{0}",
    "dots below": "/v1/fleet/../{1}",
    "dots after a known path": "/v1/fleet/get-run/../../..{0}",
    "encoded dots": "/v1/fleet/%2e%2e/{1}",
    "encoded slash": "/v1%2f{1}",
    "doubly encoded": "/v1/fleet/%252e%252e%252f{1}",
    "encoded letter": "/%76%31/{1}",
    "null": "/v1/fleet/get-run%00{0}",
    "parameter": "/v1/fleet/get-run;{0}",
    "parameter after": "{0};x=1",
    "query": "/v1/fleet/get-run?{0}",
    "query after": "{0}?x=1",
    "fragment": "/v1/fleet/get-run#{0}",
    "absolute": "http://127.0.0.1{0}",
    "absolute with user": "http://gateway@127.0.0.1{0}",
    "no slash": "v1/{1}",
    "backslash": "/v1\\{1}",
    "trailing slash": "{0}/",
    "upper case": "{2}",
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_nothing_but_the_fleet_comes_through_in_any_spelling(
    gateway: GatewayServer, superlink: SuperLink, spelling: str
) -> None:
    for path in SECRET:
        target = spelling.format(path, path.removeprefix("/v1/").lstrip("/"), path.upper())
        statuses = raw(gateway, line(f"POST {target} HTTP/1.1", "Content-Type: application/protobuf", body=b"\x0a"))
        assert statuses == [b"HTTP/1.1 404 Not Found"], target
    assert superlink.seen == []


@pytest.mark.parametrize(
    "target", [f"{GET_RUN}/", f"/{GET_RUN}", GET_RUN.upper(), f"{GET_RUN}?a=1", "/v1/fleet/get%2Drun"]
)
def test_known_paths_in_other_spellings_are_unknown(gateway: GatewayServer, superlink: SuperLink, target: str) -> None:
    assert raw(gateway, line(f"POST {target} HTTP/1.1")) == [b"HTTP/1.1 404 Not Found"]
    assert superlink.seen == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "post"])
def test_other_methods_are_unknown(gateway: GatewayServer, superlink: SuperLink, method: str) -> None:
    for target in (GET_RUN, "/v1/control/start-run", "*", "127.0.0.1:443"):
        assert raw(gateway, line(f"{method} {target} HTTP/1.1")) == [b"HTTP/1.1 404 Not Found"], target
    override = line(f"GET {GET_RUN} HTTP/1.1", "X-HTTP-Method-Override: POST")
    assert raw(gateway, override) == [b"HTTP/1.1 404 Not Found"]
    assert superlink.seen == []


def test_no_upgrade_comes_through(gateway: GatewayServer, superlink: SuperLink) -> None:
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA==")
    for target in ("/v1/control/stream-logs", GET_RUN, "/"):
        start = f"GET {target} HTTP/1.1\r\nHost: gateway\r\n"
        assert raw(gateway, (start + "\r\n".join(upgrade) + "\r\n\r\n").encode()) == [b"HTTP/1.1 404 Not Found"]
    assert superlink.seen == []


INNER = b"POST /v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
KEEP = f"POST {GET_RUN} HTTP/1.1\r\nHost: gateway\r\n".encode()


@pytest.mark.parametrize(
    ("request_", "statuses"),
    [
        (KEEP + b"Content-Length: 0\r\n\r\n" + INNER, [200, 404]),
        (KEEP + b"Content-Length: %d\r\n\r\n" % len(INNER) + INNER + INNER, [200, 404]),
        (KEEP + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + INNER, [200, 404]),
        (KEEP + b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(INNER) + INNER, [400]),
        (KEEP + b"Content-Length: +5\r\n\r\nabcde" + INNER, [400]),
        (KEEP + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + INNER, [400]),
        (KEEP + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + INNER, [400]),
        (KEEP + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + INNER, [400]),
        (b"POST " + GET_RUN.encode() + b" HTTP/1.1\nPOST /v1/control/start-run HTTP/1.1\r\n\r\n", [400]),
        (b"POST \xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    ],
)
def test_no_request_hides_in_another(
    gateway: GatewayServer, superlink: SuperLink, request_: bytes, statuses: list[int]
) -> None:
    """The gateway frames bodies itself. Smuggling needs a body that two parsers end at different places."""
    found = [int(status.split()[1]) for status in raw(gateway, request_)]
    assert found == statuses or (400 in statuses and found in ([400], [501])), found
    assert {seen.line for seen in superlink.seen} <= {f"POST {GET_RUN} HTTP/1.1"}
    assert len(superlink.seen) == statuses.count(200)
    for seen in superlink.seen:
        assert "transfer-encoding" not in seen.headers
        assert len(seen.body) == int(seen.headers["content-length"])


def test_large_requests_are_refused(
    gateway: GatewayServer, superlink: SuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("colora.server.deployment.gateway.body.MAX_BODY", 3 << 20)
    declared = line(f"POST {GET_RUN} HTTP/1.1", f"Content-Length: {(3 << 20) + 1}")
    assert raw(gateway, declared)[0].startswith(b"HTTP/1.1 413 ")
    assert superlink.seen == []
    chunks = (b"\0" * (1 << 18) for _ in range(40))
    with contextlib.suppress(httpx.TransportError):  # the connection is closed while it sends
        assert post(gateway, GET_RUN, chunks).status_code == 413
    assert superlink.seen == []  # the streamed request was never completed
    assert post(gateway, GET_RUN, b"small").status_code == 200


# --- held -----------------------------------------------------------------------------------------------------------


def test_a_request_is_held_until_the_superlink_is_back() -> None:
    port = free_port()
    with GatewayServer(ListenAddress("127.0.0.1", 0), Upstream(f"http://127.0.0.1:{port}", hold=15.0)) as gateway:
        answers: list[httpx.Response] = []
        bodies = {GET_RUN: b"small", "/v1/fleet/push-object": b"l" * (3 << 20), "/v1/fleet/activate-node": b"a"}
        callers = [
            threading.Thread(target=lambda p=p, b=b: answers.append(post(gateway, p, b))) for p, b in bodies.items()
        ]
        for caller in callers:
            caller.start()
        callers[0].join(0.5)
        assert answers == []
        link = SuperLink(port)
        for caller in callers:
            caller.join(10)
        link.stop()
    assert [answer.status_code for answer in answers] == [200] * 3
    assert sorted(len(seen.body) for seen in link.seen) == [1, 5, 3 << 20]


def test_requests_can_be_held_although_the_superlink_answers(gateway: GatewayServer, superlink: SuperLink) -> None:
    """Before its keys are registered, the SuperLink refuses SuperNodes, which then exit."""
    gateway.hold()
    answers: list[int] = []
    caller = threading.Thread(target=lambda: answers.append(post(gateway, "/v1/fleet/activate-node").status_code))
    caller.start()
    caller.join(0.5)
    assert (answers, superlink.seen) == ([], [])
    gateway.release()
    caller.join(5)
    assert (answers, len(superlink.seen)) == ([200], 1)


@pytest.mark.slow
@pytest.mark.parametrize("path", [GET_RUN, PULLS])
def test_it_is_held_no_longer_than_said(path: str) -> None:
    with GatewayServer(ListenAddress("127.0.0.1", 0), Upstream(f"http://127.0.0.1:{free_port()}", hold=0.5)) as gateway:
        began = time.monotonic()
        assert post(gateway, path).status_code == 503
        assert time.monotonic() - began < 3


def test_heartbeats_are_held_for_less_than_supernode_waits() -> None:
    from flwr.common.constant import HEARTBEAT_CALL_TIMEOUT
    from flwr.supernode.fleet_http_client import FleetHttpClient

    assert CALLS[b"/v1/fleet/send-node-heartbeat"].hold + 1 < HEARTBEAT_CALL_TIMEOUT
    with FleetHttpClient("http://gateway") as client:
        waits = client._client.timeout.read
    assert waits is not None
    assert max(call.hold for call in CALLS.values()) + proxy.RETRY_INTERVAL < waits
    assert Upstream("").linger < Upstream("").hold < waits


def test_what_may_not_happen_twice_is_sent_once(gateway: GatewayServer, superlink: SuperLink) -> None:
    """The fake closes the connection after reading the request, so its outcome is unknown."""
    superlink.answer = lambda _: None
    assert post(gateway, "/v1/fleet/activate-node").status_code == 503
    assert len(superlink.seen) == 1
    assert post(gateway, "/v1/fleet/push-object", b"s" * (2 << 20)).status_code == 503  # a stream cannot be read again
    assert len(superlink.seen) == 2


def test_what_may_happen_twice_is_sent_again(gateway: GatewayServer, superlink: SuperLink) -> None:
    superlink.answer = lambda _: None if len(superlink.seen) < 3 else (200, b"third")
    assert post(gateway, "/v1/fleet/push-messages", b"same").content == b"third"
    assert [seen.body for seen in superlink.seen] == [b"same"] * 3


# --- repeated -------------------------------------------------------------------------------------------------------


def test_an_empty_pull_is_no_bytes_in_flowers_own_words() -> None:
    from flwr.proto.fleet_pb2 import PullMessagesResponse, Reconnect
    from flwr.proto.message_pb2 import Message
    from starlette.responses import Response

    assert proxy.is_empty(Response(PullMessagesResponse(messages_list=[], message_object_trees=[]).SerializeToString()))
    assert not proxy.is_empty(Response(PullMessagesResponse(messages_list=[Message()]).SerializeToString()))
    assert not proxy.is_empty(Response(PullMessagesResponse(reconnect=Reconnect()).SerializeToString()))
    assert not proxy.is_empty(Response(b"", 401))


def test_a_pull_lingers_until_there_is_a_message(gateway: GatewayServer, superlink: SuperLink) -> None:
    superlink.answer = lambda _: (200, b"message" if len(superlink.seen) == 5 else b"")
    assert post(gateway, PULLS, b"node", headers={"flwr-signature": "s"}).content == b"message"
    assert {(seen.body, seen.headers["flwr-signature"]) for seen in superlink.seen} == {(b"node", "s")}
    assert len(superlink.seen) == 5
    assert not gateway.server.proxy.waiting


def test_a_message_whose_connection_broke_comes_again(superlink: SuperLink, keys: tuple[SiteKey, SiteKey]) -> None:
    """A node calls something else as soon as it has a message, so a second pull means that none arrived."""
    superlink.answer = lambda _: (200, b"message %d" % len(superlink.seen))
    url = f"http://127.0.0.1:{superlink.port}"
    known = frozenset(key.public for key in keys)
    with GatewayServer(ListenAddress("127.0.0.1", 0), Upstream(url, keys=known)) as gateway:

        def call(path: str, key: SiteKey) -> bytes:
            return post(gateway, path, headers=key.headers()).content

        assert [call(PULLS, keys[0]), call(PULLS, keys[0])] == [b"message 1"] * 2
        assert call(PULLS, keys[1]) == b"message 2"
        assert call(HEARTBEAT.decode(), keys[0]) == b"message 3"
        assert call(PULLS, keys[0]) == b"message 1"
        assert call(GET_RUN, keys[0]) == b"message 4"
        assert call(PULLS, keys[0]) == b"message 5"
        assert len(superlink.seen) == 5


def test_without_registered_keys_no_message_comes_again(gateway: GatewayServer, superlink: SuperLink) -> None:
    superlink.answer = lambda _: (200, b"message %d" % len(superlink.seen))
    pulls = [post(gateway, PULLS, headers={"flwr-public-key": "k"}).content for _ in range(2)]
    assert pulls == [b"message 1", b"message 2"]


def test_an_object_on_its_way_is_told_from_others_in_flowers_own_words() -> None:
    from flwr.proto.message_pb2 import PullObjectResponse
    from starlette.responses import Response

    def incomplete(**fields: object) -> bool:
        return proxy.is_incomplete(Response(PullObjectResponse(**fields).SerializeToString()))

    assert incomplete(object_found=True, object_available=False)
    assert not incomplete(object_found=True, object_available=True, object_content=b"x")
    assert not incomplete(object_found=False, object_available=False)


@pytest.mark.slow
def test_a_pull_of_an_object_lingers_until_it_has_come(gateway: GatewayServer, superlink: SuperLink) -> None:
    superlink.answer = lambda _: (200, b"\x08\x01\x10\x01" if len(superlink.seen) == 4 else b"\x08\x01")
    began = time.monotonic()
    assert post(gateway, "/v1/fleet/pull-object", b"id").content == b"\x08\x01\x10\x01"
    assert time.monotonic() - began < 1.0  # SuperNode by itself: 1 + 2 + 4 s
    assert [seen.body for seen in superlink.seen] == [b"id"] * 4
    superlink.answer = lambda _: (200, b"\x08\x01")
    assert post(gateway, "/v1/fleet/pull-object", b"id").content == b"\x08\x01"  # SuperNode then repeats the pull
    assert gateway.server.proxy.waiting_objects == 0


@pytest.mark.slow
def test_a_pull_ends_empty_when_there_is_none(gateway: GatewayServer, superlink: SuperLink) -> None:
    superlink.answer = lambda _: (200, b"")
    began = time.monotonic()
    answer = post(gateway, PULLS)
    assert (answer.status_code, answer.content) == (200, b"")
    assert 1.0 < time.monotonic() - began < 5.0
    assert len(superlink.seen) <= 16  # every 0.1 s for 1.5 s, and the first


@pytest.mark.slow
def test_nothing_is_asked_for_a_caller_that_is_gone(gateway: GatewayServer, superlink: SuperLink) -> None:
    """A message that is pulled for a caller that is gone is lost."""
    superlink.answer = lambda _: (200, b"" if len(superlink.seen) < 8 else b"message")
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        connection.sendall(line(f"POST {PULLS} HTTP/1.1", body=b"node"))
        assert superlink.wait_for(2)
    assert not superlink.wait_for(5, seconds=1.0)
    assert not gateway.server.proxy.waiting


@pytest.mark.slow
def test_a_later_pull_of_the_same_node_ends_the_earlier(gateway: GatewayServer, superlink: SuperLink) -> None:
    superlink.answer = lambda _: (200, b"")
    answers: list[float] = []
    began = time.monotonic()
    first = threading.Thread(target=lambda: (post(gateway, PULLS, b"n"), answers.append(time.monotonic() - began)))
    first.start()
    assert superlink.wait_for(2)
    threading.Thread(target=post, args=(gateway, PULLS, b"other"), daemon=True).start()
    assert superlink.wait_for(6)
    assert answers == []  # a pull of another node does not end this one
    post(gateway, PULLS, b"n")
    first.join(5)
    assert answers[0] < 1.4


@pytest.mark.slow
def test_a_pull_that_the_superlink_refuses_ends_nobody_elses(gateway: GatewayServer, superlink: SuperLink) -> None:
    """Otherwise anyone with a site's public key could delay its messages."""
    superlink.answer = lambda seen: (200, b"") if seen.headers.get("flwr-signature") == "good" else (401, b"no")
    answers: list[float] = []
    began, key = time.monotonic(), {"flwr-public-key": "k"}
    mine = lambda: post(gateway, PULLS, b"n", headers=key | {"flwr-signature": "good"})  # noqa: E731
    first = threading.Thread(target=lambda: (mine(), answers.append(time.monotonic() - began)))
    first.start()
    assert superlink.wait_for(2)
    assert post(gateway, PULLS, b"n", headers=key | {"flwr-signature": "forged"}).status_code == 401
    first.join(5)
    assert answers[0] > 1.0


@pytest.mark.slow
def test_a_pull_goes_on_when_the_superlink_comes_back(superlink: SuperLink) -> None:
    with GatewayServer(ListenAddress("127.0.0.1", 0), Upstream(f"http://127.0.0.1:{superlink.port}")) as gateway:
        superlink.answer = lambda _: (200, b"")
        answers: list[bytes] = []
        caller = threading.Thread(target=lambda: answers.append(post(gateway, PULLS).content))
        caller.start()
        assert superlink.wait_for(2)
        superlink.answer = lambda _: None  # open connections are closed too
        superlink.stop()
        caller.join(0.6)
        assert answers == []
        again = SuperLink(superlink.port, answer=lambda _: (200, b"message"))
        caller.join(5)
        again.stop()
        superlink.server = again.server
    assert answers == [b"message"]


@pytest.mark.slow
def test_many_idle_nodes_ask_no_more_than_the_rate(superlink: SuperLink) -> None:
    """50 nodes with one request per 0.1 s each would cause 500 requests per second."""
    superlink.answer = lambda _: (200, b"")
    url, began = f"http://127.0.0.1:{superlink.port}", time.monotonic()
    with GatewayServer(ListenAddress("127.0.0.1", 0), Upstream(url, linger=3.0, rate=20.0)) as gateway:
        callers = [threading.Thread(target=post, args=(gateway, PULLS, b"%d" % n)) for n in range(50)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(30)
    first, last_ones = 50, 50
    assert len(superlink.seen) < first + 2 * 20 * (time.monotonic() - began) + last_ones


@pytest.mark.slow
def test_news_for_one_node_wakes_all(superlink: SuperLink) -> None:
    """A round's messages go to all sites at once, so no pull should wait for its pause to end."""
    there = threading.Event()
    superlink.answer = lambda _: (200, b"message" if there.is_set() else b"")
    url = f"http://127.0.0.1:{superlink.port}"
    with GatewayServer(ListenAddress("127.0.0.1", 0), Upstream(url, rate=2.0, slowest=6.0)) as gateway:
        answers: list[bytes] = []
        callers = [
            threading.Thread(target=lambda n=n: answers.append(post(gateway, PULLS, b"%d" % n).content))
            for n in range(12)
        ]
        for caller in callers:  # 12 nodes at 2 requests per second: a pause of 6 s
            caller.start()
        assert superlink.wait_for(12)
        there.set()
        began = time.monotonic()
        answers.append(post(gateway, PULLS, b"new").content)
        for caller in callers:
            caller.join(5)
        assert answers == [b"message"] * 13
        assert time.monotonic() - began < 3
