"""Bodies of requests on their way through the gate: bounded, and never whole in memory when they are large."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import Request

KEPT = 1 << 20  # bytes of a body that are kept in memory, so that it can be sent again
MOST = 64 << 20  # bytes of a body; Flower sends chunks of 5 MiB
PATIENCE = 25.0  # seconds for the next bytes from either side; SuperNode gives up after 30


class TooLarge(Exception):
    """A body beyond the bound."""


class Body:
    """A request's body: whole in memory when it is small, else a stream that can go through once."""

    def __init__(self, request: Request) -> None:
        declared = request.headers.get("content-length")
        self.length = int(declared) if declared is not None else None  # None: chunked
        self.head, self.whole, self.spent = b"", False, False
        self._chunks, self._seen = request.stream().__aiter__(), 0

    async def begin(self) -> None:
        """Reads as much as is kept in memory. Raises TooLarge, TimeoutError or ClientDisconnect."""
        if self.length is not None and self.length > MOST:
            raise TooLarge
        head = bytearray()
        while len(head) <= KEPT and not self.whole:
            chunk = await self._next()
            self.whole = chunk is None
            head += chunk or b""
        self.head = bytes(head)

    def content(self) -> bytes | AsyncIterator[bytes]:
        """What to send upstream."""
        return self.head if self.whole else in_batches(self._rest())

    async def _rest(self) -> AsyncIterator[bytes]:
        self.spent = True
        yield self.head
        while (chunk := await self._next()) is not None:
            yield chunk

    async def _next(self) -> bytes | None:
        async with asyncio.timeout(PATIENCE):
            chunk = await anext(self._chunks, None)
        self._seen += len(chunk or b"")
        if self._seen > MOST:
            raise TooLarge
        return chunk


async def in_batches(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in fewer chunks: each costs the SuperLink's layers of middleware more than its bytes do."""
    batch = bytearray()
    async for chunk in chunks:
        batch += chunk
        if len(batch) >= KEPT:
            yield bytes(batch)
            batch.clear()
    if batch:
        yield bytes(batch)
