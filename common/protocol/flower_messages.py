"""Requests, replies and site infos as Flower messages. The only place with record keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.app import Error as FlowerError

from ..errors import RefusedError
from .broadcast import apply_difference, broadcast_bits_of, difference_codec
from .codec import DEFAULT, codec_of, decode, encode, reply_codec_of
from .limits import check_values
from .types import Arrays, SiteInfo, SumReply, SumRequest, TrainReply, TrainRequest

ARRAYS, METRICS, CONFIG = "shared", "metrics", "colora"
ALL = "adapter"  # key of the only entry in the array record, which holds all arrays of a message
TRAIN, JOIN = MessageType.TRAIN, MessageType.QUERY
SUM = "sum"  # Flower's action of a secure sum, and the type of its bodies
T = TypeVar("T", TrainRequest, TrainReply, SiteInfo)
S = TypeVar("S", SumRequest, SumReply)
SITE_FAILED = 1001  # Flower error code of a reply that reports an error of the site
REFERENCE_MISSING = 1002  # of a reply that asks for the whole adapter in place of a difference
Received = Callable[[str, str, int], Arrays]  # (federation, plan, round) → the adapter that a site received; or nothing


class Packed(NamedTuple):
    """The arrays of a message, encoded."""

    codec: str
    data: bytes


Decoded = Callable[[Mapping[str, Any], Packed], Arrays]  # (the other fields of the message, its arrays)


def pack_arrays(arrays: Arrays, codec: str = DEFAULT, reference: Arrays | None = None) -> ArrayRecord:
    """Encode arrays. The record of a round's requests is made once and put into the messages to all sites."""
    data = encode(codec, arrays, reference)
    return ArrayRecord({ALL: Array(dtype="uint8", shape=(len(data),), stype=codec, data=data)})


def pack_difference(data: bytes, bits: int) -> ArrayRecord:
    """Put a difference (``broadcast.py``) where ``pack_arrays`` puts arrays."""
    return ArrayRecord({ALL: Array(dtype="uint8", shape=(len(data),), stype=difference_codec(bits), data=data)})


def train_message(request: TrainRequest, packed: ArrayRecord, node_id: int) -> Message:
    """A request as a Flower message to a node.

    ``packed`` holds ``request.shared`` in the codec of the plan, or as a difference.
    """
    return Message(_pack(request, packed), node_id, TRAIN, group_id=str(request.round))


def join_message(federation: str, plan: str, node_id: int) -> Message:
    """The question which site a node is. The plan lets the site build its model before the first round."""
    record = RecordDict({CONFIG: ConfigRecord({"federation": federation, "plan": plan})})
    return Message(record, node_id, JOIN, group_id="join")


def join_from(message: Message) -> tuple[str, str]:
    """Return (federation, plan) of a join message. Raises RefusedError for another message."""
    try:
        config = message.content.config_records[CONFIG]
        federation, plan = str(config["federation"]), str(config["plan"])
    except Exception as error:  # as in _unpack
        raise RefusedError("message", "a join request", type(error).__name__) from None
    check_values({"federation": federation, "plan": plan})
    return federation, plan


def request_from(message: Message, received: Received | None = None) -> TrainRequest:
    """The request in a message, with its arrays decoded by the codec that its plan names.

    ``received`` returns the adapter that a difference is applied to. Raises RefusedError for a field that is missing,
    unknown or of another type, and for arrays in another codec, and ReferenceMissingError for a difference to an
    adapter that the site does not have.
    """
    return _unpack(TrainRequest, message, lambda values, packed: _request_arrays(values, packed, received))


def sum_message(request: SumRequest, node_id: int) -> Message:
    """A request for a step of a secure sum as a Flower message to a node."""
    return Message(_pack_body(request), node_id, f"{JOIN}.{SUM}", group_id=str(request.round))


def sum_request_from(message: Message) -> SumRequest:
    """The request in a message. Raises RefusedError as ``request_from`` does."""
    return _unpack_body(SumRequest, message)


def sum_reply_from(message: Message) -> SumReply:
    """The reply in a message. Raises RefusedError as ``reply_from`` does."""
    return _unpack_body(SumReply, message)


def reply_message(
    content: TrainReply | SumReply | SiteInfo, message: Message, request: TrainRequest | None = None
) -> Message:
    """A site's reply to a message. Arrays are encoded by the codec of the request, with its arrays as the reference.

    ``request`` is what the message holds; without it, the message must hold the whole adapter.
    """
    packed = None
    if isinstance(content, SumReply):
        return Message(_pack_body(content), reply_to=message)
    if isinstance(content, TrainReply) and content.shared:
        request = request or request_from(message)
        packed = pack_arrays(content.shared, reply_codec_of(request.plan, request.kind), request.shared)
    elif isinstance(content, TrainReply):
        packed = pack_arrays({}, codec_of(str(message.content.config_records[CONFIG]["plan"])))
    return Message(_pack(content, packed), reply_to=message)


def error_message(reason: str, message: Message, code: int = SITE_FAILED) -> Message:
    """A reply that reports an error. The coordinator reads ``reason``, so it must not quote a site's data."""
    return Message(FlowerError(code=code, reason=reason), reply_to=message)


def reply_from(message: Message, request: TrainRequest) -> TrainReply:
    """The reply in a message, with its arrays decoded by the codec of the request that it answers.

    Raises RefusedError for a field that is missing, unknown or of another type, and for arrays in another codec.
    """
    codec = reply_codec_of(request.plan, request.kind)
    return _unpack(TrainReply, message, lambda values, packed: _decode(packed, codec, request.shared))


def site_info_from(message: Message) -> SiteInfo:
    """The site info in a message. Raises RefusedError for a field that is missing, unknown or of another type."""
    return _unpack(SiteInfo, message)


def site_info_of(values: object) -> SiteInfo:
    """The site info in the parsed JSON of a file, checked as that in a message. Raises RefusedError."""
    if not isinstance(values, dict):
        raise RefusedError("fields", "those of SiteInfo", type(values).__name__)
    hints = get_type_hints(SiteInfo)
    _check_names(SiteInfo, values, set(hints))
    _check_fields(hints, values)
    return SiteInfo(**values)


def payload_bytes(message: Message) -> int:
    """The payload of a message in bytes: arrays, metrics and texts, without Flower's envelope."""
    if not message.has_content():
        return 0
    arrays = sum(len(array.data) for record in message.content.array_records.values() for array in record.values())
    numbers = sum(len(key) + 8 for record in message.content.metric_records.values() for key in record)
    texts = sum(len(k) + len(str(v)) for record in message.content.config_records.values() for k, v in record.items())
    return arrays + numbers + texts


def _pack(content: TrainRequest | TrainReply | SiteInfo, packed: ArrayRecord | None = None) -> RecordDict:
    """Put arrays into the array record, metrics into the metric record, and other fields into the config record."""
    fields = {f.name: getattr(content, f.name) for f in dataclasses.fields(content)}
    metrics = fields.pop("metrics", None)
    fields.pop("shared", None)
    record = RecordDict({CONFIG: ConfigRecord(fields)})
    if packed is not None:
        record[ARRAYS] = packed
    if metrics is not None:
        record[METRICS] = MetricRecord({key: float(value) for key, value in metrics.items()})
    return record


def _unpack(kind: type[T], message: Message, decoded: Decoded | None = None) -> T:
    """The content of a message from an untrusted sender. ``decoded`` makes arrays of its bytes, if it has any.

    Raises RefusedError for anything that is not as expected, and the errors of ``decoded``.
    """
    try:
        values = _unpack_fields(kind, message)
        packed = _packed(message.content.array_records[ARRAYS]) if decoded else None
    except RefusedError:
        raise
    except Exception as error:  # the records come from another machine and may be of any type at any depth
        raise RefusedError("message", f"a {kind.__name__}", type(error).__name__) from None
    if decoded and packed:
        values[ARRAYS] = decoded(values, packed)
    return kind(**values)


def _unpack_fields(kind: type[T], message: Message) -> dict[str, Any]:
    """The fields of a message except its arrays."""
    content, hints = message.content, get_type_hints(kind)
    expected = {CONFIG: ConfigRecord}
    expected |= {name: record for name, record in ((ARRAYS, ArrayRecord), (METRICS, MetricRecord)) if name in hints}
    if {name: type(record) for name, record in content.items()} != expected:
        raise RefusedError("records", ", ".join(sorted(expected)), ", ".join(sorted(content)) or "none")
    values: dict[str, Any] = dict(content.config_records[CONFIG])
    if METRICS in expected:
        values[METRICS] = {key: _number(key, value) for key, value in content.metric_records[METRICS].items()}
    _check_names(kind, values, set(hints) - {ARRAYS})
    _check_fields(hints, values)
    return values


def _pack_body(content: SumRequest | SumReply) -> RecordDict:
    """Put the body into the array record, since Flower sends large arrays in parts, and the rest as ``_pack`` does."""
    fields = {f.name: getattr(content, f.name) for f in dataclasses.fields(content) if f.name != "body"}
    body = Array(dtype="uint8", shape=(len(content.body),), stype=SUM, data=content.body)
    return RecordDict({CONFIG: ConfigRecord(fields), ARRAYS: ArrayRecord({ALL: body})})


def _unpack_body(kind: type[S], message: Message) -> S:
    """The content of a message of a secure sum from an untrusted sender. Raises RefusedError."""
    try:
        content, hints = message.content, get_type_hints(kind)
        if {name: type(record) for name, record in content.items()} != {CONFIG: ConfigRecord, ARRAYS: ArrayRecord}:
            raise RefusedError("records", f"{CONFIG}, {ARRAYS}", ", ".join(sorted(content)) or "none")
        values: dict[str, Any] = dict(content.config_records[CONFIG])
        _check_names(kind, values, set(hints) - {"body"})
        record = content.array_records[ARRAYS]
        if list(record) != [ALL] or record[ALL].stype != SUM:
            raise RefusedError("body", f"one entry {ALL!r} of type {SUM}", "another one")
        _check_fields({name: hint for name, hint in hints.items() if name != "body"}, values)
        return kind(**values, body=record[ALL].data)
    except RefusedError:
        raise
    except Exception as error:  # as in _unpack
        raise RefusedError("message", f"a {kind.__name__}", type(error).__name__) from None


def _check_names(kind: type, values: Mapping[str, Any], expected: set[str]) -> None:
    different = set(values).symmetric_difference(expected)
    if different:
        raise RefusedError("fields", f"those of {kind.__name__}", f"a difference in {min(different)}")


def _check_fields(hints: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Check the types and ranges of all fields but arrays and metrics. Raises RefusedError."""
    for name, hint in hints.items():
        if hint in (str, int, float, bool) and type(values[name]) is not hint:
            raise RefusedError(name, hint.__name__, type(values[name]).__name__)
        if get_origin(hint) is Literal and values[name] not in get_args(hint):
            raise RefusedError(name, " or ".join(get_args(hint)), repr(values[name]))
    check_values({name: value for name, value in values.items() if name in hints and name not in (ARRAYS, METRICS)})


def _number(key: str, value: object) -> float:
    if not isinstance(value, int | float):
        raise RefusedError(f"metric {key}", "a number", type(value).__name__)
    return float(value)


def _packed(record: ArrayRecord) -> Packed:
    if list(record) != [ALL]:
        raise RefusedError("arrays", f"one entry {ALL!r}", ", ".join(sorted(record))[:80] or "none")
    return Packed(record[ALL].stype, record[ALL].data)


def _request_arrays(values: Mapping[str, Any], packed: Packed, received: Received | None) -> Arrays:
    """The adapter of a request, whole or from a difference to what the site received before."""
    plan = values["plan"]
    bits = broadcast_bits_of(plan)
    if bits is None or packed.codec != difference_codec(bits):
        return _decode(packed, codec_of(plan), {})
    reference = received(values["federation"], plan, values["admitted_round"]) if received else {}
    return apply_difference(packed.data, reference, bits)


def _decode(packed: Packed, codec: str, reference: Arrays) -> Arrays:
    if packed.codec != codec:
        raise RefusedError("arrays", f"the codec {codec}", packed.codec[:40])
    return decode(codec, packed.data, reference)
