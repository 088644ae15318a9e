"""``colora watch``: the report of a run, served while the run goes on.

The server is a process of its own and only reads the run folder, so the run may stop and start again. Browsers hold a
stream of server-sent events and load the page anew when it has changed. Every address begins with a random token.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from .page.build import build_page
from .page.fold import read_history

INTERVAL = 0.5  # seconds between two looks at the logs
SHARE = 10  # a page is made at most every SHARE times the processor seconds that the last one took
HEARTBEAT = 15.0  # seconds after which a silent stream is written to, so that closed ones are found
MAX_VIEWERS = 200  # streams at a time
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
Version = tuple[tuple[int, int], ...]  # sizes and times of the logs


class LivePage:
    """The page of a run. It is made anew while someone looks at it and a log has changed."""

    def __init__(self, run: Path) -> None:
        self.logs = (run / "events.jsonl", run / "baseline" / "events.jsonl")
        self.run, self.viewers, self.number, self.content = run, 0, 0, b""
        self.changed, self._making = asyncio.Condition(), asyncio.Lock()
        self._made_from: Version | None = None
        self._due = 0.0

    async def follow(self) -> None:
        """Make the page anew whenever that is due, for ever."""
        while True:
            if self.viewers:
                await self.refresh()
            await asyncio.sleep(INTERVAL)

    async def refresh(self) -> None:
        """Make the page anew if a log has changed and the last page is old enough."""
        async with self._making:
            version = tuple(_version(log) for log in self.logs)
            if version == self._made_from or time.monotonic() < self._due:
                return
            (self.content, seconds), self._made_from = await asyncio.to_thread(self._make), version
            self._due = time.monotonic() + SHARE * seconds
        async with self.changed:
            self.number += 1
            self.changed.notify_all()

    async def numbers(self) -> AsyncIterator[int | None]:
        """Yield the number of every new page, and None after a silence of ``HEARTBEAT`` seconds."""
        seen = self.number
        while True:
            try:
                seen = await asyncio.wait_for(self._number_after(seen), HEARTBEAT)
            except TimeoutError:
                yield None
            else:
                yield seen

    async def _number_after(self, seen: int) -> int:
        async with self.changed:
            await self.changed.wait_for(lambda: self.number > seen)
            return self.number

    def _make(self) -> tuple[bytes, float]:
        """Return the page, and the processor seconds of this thread that it took."""
        began = time.thread_time()
        page = build_page([read_history(self.run, self.run.name)], live=True).encode()
        return page, time.thread_time() - began


def new_token() -> str:
    """Return a token that cannot be guessed."""
    return secrets.token_urlsafe(16)


def make_app(run: Path, token: str) -> Starlette:
    """Return the application: ``/TOKEN/`` is the page, ``/TOKEN/events`` tells of new ones. Anything else is 403."""
    live = LivePage(run)

    async def page(request: Request) -> Response:
        await live.refresh()
        return Response(live.content, media_type="text/html", headers=HEADERS)

    async def events(request: Request) -> Response:
        if live.viewers >= MAX_VIEWERS:
            return PlainTextResponse("Too many viewers.", 503)
        return StreamingResponse(_stream(live), media_type="text/event-stream", headers=HEADERS)

    def guarded(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def checked(request: Request) -> Response:
            if not hmac.compare_digest(request.path_params.get("token", "").encode(), token.encode()):
                return await forbidden(request)
            return await endpoint(request)

        return checked

    async def forbidden(request: Request, error: Exception | None = None) -> Response:
        return PlainTextResponse("This address is not valid.", 403, HEADERS)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(live.follow())
        yield
        task.cancel()

    routes = [Route("/{token}/", guarded(page)), Route("/{token}/events", guarded(events))]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: forbidden})


async def _stream(live: LivePage) -> AsyncIterator[str]:
    live.viewers += 1
    try:
        yield "retry: 1000\n\n"
        async for number in live.numbers():
            yield ": still here\n\n" if number is None else f"data: {number}\n\n"
    finally:
        live.viewers -= 1


def _version(log: Path) -> tuple[int, int]:
    try:
        status = log.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
