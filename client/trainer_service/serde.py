"""Conversion between the protocol's dataclasses and the messages of ``trainer.proto``. Arrays travel in chunks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args
from urllib.parse import quote

import numpy as np

from ...common.errors import RefusedError
from ...common.protocol.limits import check_values
from ...common.protocol.types import (
    PRELIMINARY,
    PROTOCOL,
    Arrays,
    RequestKind,
    SiteInfo,
    SumReply,
    SumRequest,
    SumStep,
    TrainReply,
    TrainRequest,
)
from .proto import trainer_pb2 as pb

CHUNK = 1 << 20  # bytes of array data in one message
OVERHEAD = 1 << 16  # bytes allowed for the rest of a message
DTYPE = "float32"  # of every array in a request or reply
UNIX = "unix:"  # prefix of an address that is a Unix socket's path
OPTIONS = [  # gRPC options of both sides
    ("grpc.max_receive_message_length", CHUNK + OVERHEAD),
    ("grpc.max_send_message_length", CHUNK + OVERHEAD),
]


def target_of(address: str) -> str:
    """Return ``unix:PATH`` or ``HOST:PORT`` as a gRPC target, in which a path is quoted as part of a URI."""
    return UNIX + quote(address.removeprefix(UNIX)) if address.startswith(UNIX) else address


def site_info_message(info: SiteInfo) -> pb.SiteInfo:
    """Convert a site's description to its message."""
    return pb.SiteInfo(**dataclasses.asdict(info))


def site_info_from(message: pb.SiteInfo) -> SiteInfo:
    """Convert a message to a site's description."""
    return SiteInfo(**_field_values(message, SiteInfo))


def request_parts(request: TrainRequest) -> Iterator[pb.TrainRequestPart]:
    """Yield the head of a request, then the chunks of its arrays."""
    yield pb.TrainRequestPart(head=pb.TrainRequestHead(**_without_arrays(request), protocol=PROTOCOL))
    yield from (pb.TrainRequestPart(chunk=chunk) for chunk in chunks(request.shared))


def request_from(head: pb.TrainRequestHead, shared: Arrays) -> TrainRequest:
    """Build the request from its head and its arrays. Raises RefusedError for an impossible head."""
    check_protocol(head.protocol)
    if head.kind not in get_args(RequestKind):
        raise RefusedError("kind", " or ".join(get_args(RequestKind)), repr(head.kind[:40]))
    before_round_1 = head.kind in PRELIMINARY and head.round == head.admitted_round == 0
    if not before_round_1 and not 0 <= head.admitted_round < head.round:
        raise RefusedError("admitted_round", f"a round before round {head.round}", head.admitted_round)
    values = _field_values(head, TrainRequest)
    check_values(values)
    return TrainRequest(**values, shared=shared)


def check_protocol(protocol: int) -> None:
    """Raise RefusedError unless the caller uses the same protocol version."""
    if protocol != PROTOCOL:
        raise RefusedError(
            "protocol",
            str(PROTOCOL),
            protocol,
            message=f"The trainer uses protocol version {PROTOCOL}, its client version {protocol}.",
            hint="Install the same version of colora for the trainer and the SuperNode.",
        )


def reply_head(reply: TrainReply) -> pb.TrainReplyHead:
    """Convert everything in a reply except its arrays."""
    return pb.TrainReplyHead(**_without_arrays(reply))


def reply_from(head: pb.TrainReplyHead, shared: Arrays) -> TrainReply:
    """Build the reply from its head and its arrays, with the metrics sorted by name."""
    values = _field_values(head, TrainReply)
    return TrainReply(**{**values, "metrics": dict(sorted(head.metrics.items()))}, shared=shared)


def sum_message(request: SumRequest) -> pb.SumRequest:
    """Convert a request for a step of a secure sum to its message."""
    return pb.SumRequest(**vars(request), protocol=PROTOCOL)


def sum_request_from(message: pb.SumRequest) -> SumRequest:
    """Convert it back. Raises RefusedError for an impossible one."""
    check_protocol(message.protocol)
    if message.step not in get_args(SumStep):
        raise RefusedError("step", " or ".join(get_args(SumStep)), repr(message.step[:40]))
    values = {f.name: getattr(message, f.name) for f in dataclasses.fields(SumRequest)}
    check_values({name: value for name, value in values.items() if name != "body"})
    return SumRequest(**values)


def body_parts(reply: SumReply) -> Iterator[pb.BodyPart]:
    """Yield the body of a reply in parts."""
    for start in range(0, len(reply.body), CHUNK):
        yield pb.BodyPart(data=reply.body[start : start + CHUNK])


def chunks(arrays: Arrays) -> Iterator[pb.Chunk]:
    """Yield the bytes of the arrays in name order, at least one chunk per array."""
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        data = array.reshape(-1).view(np.uint8)
        for start in range(0, max(array.nbytes, 1), CHUNK):
            piece = data[start : start + CHUNK].tobytes()
            yield pb.Chunk(name=name, dtype=str(array.dtype), shape=arrays[name].shape, data=piece)


class ArrayAssembler:
    """Assembles arrays from chunks.

    Memory grows with the bytes that arrive, never with the sizes that a chunk claims, and never beyond the layout.
    """

    def __init__(self, layout: Mapping[str, tuple[int, ...]], site: str) -> None:
        self.layout, self.site = layout, site
        self.buffers: dict[str, bytearray] = {}

    def add(self, chunk: pb.Chunk) -> None:
        """Append a chunk. Raises RefusedError for an unknown array, another type or shape, and excess bytes."""
        name, shape = chunk.name, self.layout.get(chunk.name)
        if shape is None:
            raise RefusedError("arrays", "the shared groups only", f"also {name[:80]}", site=self.site)
        if chunk.dtype != DTYPE:
            raise RefusedError(name, DTYPE, chunk.dtype[:40], site=self.site)
        if tuple(chunk.shape) != tuple(shape):
            raise RefusedError(name, f"shape {tuple(shape)}", tuple(chunk.shape[:8]), site=self.site)
        size, is_known = _size(shape), name in self.buffers
        buffer = self.buffers.setdefault(name, bytearray())
        if len(chunk.data) > CHUNK or (is_known and not chunk.data):
            raise RefusedError(name, f"chunks of 1 to {CHUNK} bytes", len(chunk.data), site=self.site)
        if len(buffer) + len(chunk.data) > size:
            raise RefusedError(name, f"{size} bytes", "more", site=self.site)
        buffer += chunk.data

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays received. Raises RefusedError when one is incomplete."""
        for name, buffer in self.buffers.items():
            if len(buffer) != _size(self.layout[name]):
                raise RefusedError(name, f"{_size(self.layout[name])} bytes", len(buffer), site=self.site)
        return {n: np.frombuffer(b, np.float32).reshape(self.layout[n]) for n, b in self.buffers.items()}


def arrays_from(parts: Iterable[pb.Chunk], site: str) -> dict[str, np.ndarray]:
    """Assemble the arrays of a trainer, whose names and shapes only the trainer knows. Raises RefusedError."""
    layout: dict[str, tuple[int, ...]] = {}
    assembler = ArrayAssembler(layout, site)
    for chunk in parts:
        layout.setdefault(chunk.name, tuple(chunk.shape))
        assembler.add(chunk)
    return assembler.arrays()


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * np.dtype(DTYPE).itemsize


def _without_arrays(content: TrainRequest | TrainReply) -> dict[str, Any]:
    return {f.name: getattr(content, f.name) for f in dataclasses.fields(content) if f.name != "shared"}


def _field_values(message: Any, kind: type[TrainRequest] | type[TrainReply] | type[SiteInfo]) -> dict[str, Any]:
    return {f.name: getattr(message, f.name) for f in dataclasses.fields(kind) if f.name != "shared"}
