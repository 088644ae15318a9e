"""Orders, replies and descriptions as messages of ``trainer.proto`` and back, arrays in bounded chunks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, get_args
from urllib.parse import quote

import numpy as np

from ...common.errors import RefusedError
from ...common.protocol.types import PROTOCOL, Arrays, RequestKind, SiteInfo, TrainReply, TrainRequest
from .proto import trainer_pb2 as wire

CHUNK = 1 << 20  # bytes of array data in one message
ROOM = 1 << 16  # for the rest of a message
DTYPE = "float32"
UNIX = "unix:"
OPTIONS = [
    ("grpc.max_receive_message_length", CHUNK + ROOM),
    ("grpc.max_send_message_length", CHUNK + ROOM),
]


def target_of(address: str) -> str:
    """``unix:PATH`` or ``HOST:PORT`` as gRPC reads it: a path there is part of a URI."""
    return UNIX + quote(address.removeprefix(UNIX)) if address.startswith(UNIX) else address


def site_info_message(description: SiteInfo) -> wire.Description:
    """A description as it travels."""
    return wire.Description(**dataclasses.asdict(description))


def site_info_from(message: wire.Description) -> SiteInfo:
    """The description in a message."""
    return SiteInfo(**_values(message, SiteInfo))


def request_parts(order: TrainRequest) -> Iterator[wire.OrderPart]:
    """An order's head and the chunks of its arrays."""
    yield wire.OrderPart(head=wire.OrderHead(**_plain(order), protocol=PROTOCOL))
    yield from (wire.OrderPart(chunk=chunk) for chunk in chunks(order.shared))


def request_from(head: wire.OrderHead, shared: Arrays) -> TrainRequest:
    """The order of a head and its arrays. Raises RefusedError when the head is of no order that could be."""
    check_protocol(head.protocol)
    if head.phase not in get_args(RequestKind):
        raise RefusedError("phase", " or ".join(get_args(RequestKind)), repr(head.phase[:40]))
    if not 0 <= head.admitted < head.round:
        raise RefusedError("admitted", f"a round before round {head.round}", head.admitted)
    return TrainRequest(**_values(head, TrainRequest), shared=shared)


def check_protocol(protocol: int) -> None:
    """Both processes of a site must speak one version. Raises RefusedError."""
    if protocol != PROTOCOL:
        raise RefusedError("protocol", str(PROTOCOL), protocol)


def reply_head(reply: TrainReply) -> wire.ReplyHead:
    """Everything in a reply but its arrays."""
    return wire.ReplyHead(**_plain(reply))


def reply_from(head: wire.ReplyHead, shared: Arrays) -> TrainReply:
    """The reply of a head and its arrays; metrics by name."""
    values = _values(head, TrainReply)
    return TrainReply(**{**values, "metrics": dict(sorted(head.metrics.items()))}, shared=shared)


def chunks(arrays: Arrays) -> Iterator[wire.Chunk]:
    """The bytes of the arrays in name order, at least one chunk for each."""
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        data = array.reshape(-1).view(np.uint8)
        for start in range(0, max(array.nbytes, 1), CHUNK):
            piece = data[start : start + CHUNK].tobytes()
            yield wire.Chunk(name=name, dtype=str(array.dtype), shape=arrays[name].shape, data=piece)


class ArrayAssembler:
    """Arrays that come in chunks. What is kept is what came, and never more than the layout says."""

    def __init__(self, layout: Mapping[str, tuple[int, ...]], site: str) -> None:
        self.layout, self.site = layout, site
        self.buffers: dict[str, bytearray] = {}

    def add(self, chunk: wire.Chunk) -> None:
        """Takes a chunk. Raises RefusedError for unknown arrays, other types or shapes, and bytes beyond the array."""
        name, shape = chunk.name, self.layout.get(chunk.name)
        if shape is None:
            raise RefusedError("arrays", "the shared groups only", f"also {name[:80]}", site=self.site)
        if chunk.dtype != DTYPE:
            raise RefusedError(name, DTYPE, chunk.dtype[:40], site=self.site)
        if tuple(chunk.shape) != tuple(shape):
            raise RefusedError(name, f"shape {tuple(shape)}", tuple(chunk.shape[:8]), site=self.site)
        size, known = _size(shape), name in self.buffers
        buffer = self.buffers.setdefault(name, bytearray())
        if len(chunk.data) > CHUNK or (known and not chunk.data):
            raise RefusedError(name, f"chunks of 1 to {CHUNK} bytes", len(chunk.data), site=self.site)
        if len(buffer) + len(chunk.data) > size:
            raise RefusedError(name, f"{size} bytes", "more", site=self.site)
        buffer += chunk.data

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that came. Raises RefusedError when one is not whole."""
        for name, buffer in self.buffers.items():
            if len(buffer) != _size(self.layout[name]):
                raise RefusedError(name, f"{_size(self.layout[name])} bytes", len(buffer), site=self.site)
        return {n: np.frombuffer(b, np.float32).reshape(self.layout[n]) for n, b in self.buffers.items()}


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * np.dtype(DTYPE).itemsize


def _plain(content: TrainRequest | TrainReply) -> dict[str, Any]:
    return {f.name: getattr(content, f.name) for f in dataclasses.fields(content) if f.name != "shared"}


def _values(message: Any, kind: type[TrainRequest] | type[TrainReply] | type[SiteInfo]) -> dict[str, Any]:
    return {f.name: getattr(message, f.name) for f in dataclasses.fields(kind) if f.name != "shared"}
