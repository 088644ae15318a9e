"""Request bodies: limited in size, buffered when small and streamed when large."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from starlette.requests import Request

BUFFER_SIZE = 1 << 20  # bytes; a body up to this size is buffered, so that it can be sent again
MAX_BODY = 64 << 20  # bytes; Flower sends chunks of 5 MiB
MIN_RATE = 4 << 10  # bytes per second that a caller must send on average, after the first READ_TIMEOUT seconds
READ_TIMEOUT = 25.0  # seconds for the next bytes from either side; SuperNode gives up after 30


class TooLarge(Exception):
    """A body is larger than :data:`MAX_BODY`."""


class Body:
    """A request's body: buffered if it is small, else a stream that can be read once."""

    def __init__(self, request: Request) -> None:
        declared = request.headers.get("content-length")
        self.length = int(declared) if declared is not None else None  # bytes; None: chunked
        self.head = b""  # what is buffered
        self.whole = False  # whether that is the complete body
        self.spent = False  # whether the stream has been read from
        self._chunks, self._seen = request.stream().__aiter__(), 0
        self._waited = 0.0  # seconds for the caller

    async def begin(self) -> None:
        """Fill the buffer. Raises TooLarge, TimeoutError or ClientDisconnect."""
        if self.length is not None and self.length > MAX_BODY:
            raise TooLarge
        head = bytearray()
        while len(head) <= BUFFER_SIZE and not self.whole:
            chunk = await self._next()
            self.whole = chunk is None
            head += chunk or b""
        self.head = bytes(head)

    def content(self) -> bytes | AsyncIterator[bytes]:
        """The content to send upstream: bytes or a stream."""
        return self.head if self.whole else in_batches(self._rest())

    async def _rest(self) -> AsyncIterator[bytes]:
        self.spent = True
        yield self.head
        while (chunk := await self._next()) is not None:
            yield chunk

    async def _next(self) -> bytes | None:
        began = time.monotonic()
        async with asyncio.timeout(min(READ_TIMEOUT, READ_TIMEOUT + self._seen / MIN_RATE - self._waited)):
            chunk = await anext(self._chunks, None)
        self._waited += time.monotonic() - began
        self._seen += len(chunk or b"")
        if self._seen > MAX_BODY:
            raise TooLarge
        return chunk


async def in_batches(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Join chunks to larger ones, since the SuperLink's middleware has a high cost per chunk."""
    batch = bytearray()
    async for chunk in chunks:
        batch += chunk
        if len(batch) >= BUFFER_SIZE:
            yield bytes(batch)
            batch.clear()
    if batch:
        yield bytes(batch)
