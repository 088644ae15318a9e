"""Requests, replies and site descriptions as Flower messages. Only this module knows the record keys."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.app import Error as FlowerError

from ..errors import RefusedError
from .codec import DEFAULT, decode, encode
from .types import Arrays, SiteInfo, TrainReply, TrainRequest

ARRAYS, METRICS, CONFIG = "shared", "metrics", "colora"
ALL = "adapter"  # key of the only entry in the array record: all arrays of a message
TRAIN, JOIN = MessageType.TRAIN, MessageType.QUERY
T = TypeVar("T", TrainRequest, TrainReply, SiteInfo)
SITE_FAILED = 1001  # Flower error code of a reply that reports an error at the site


def pack_arrays(arrays: Arrays) -> ArrayRecord:
    """Encode arrays once, for the requests to all sites."""
    data = encode(arrays)
    return ArrayRecord({ALL: Array(dtype="uint8", shape=(len(data),), stype=DEFAULT, data=data)})


def train_message(request: TrainRequest, packed: ArrayRecord, node_id: int) -> Message:
    """Return a request as a Flower message to a node. ``packed`` is ``pack_arrays(request.shared)``."""
    return Message(_pack(request, packed), node_id, TRAIN, group_id=str(request.round))


def join_message(federation: str, plan: str, node_id: int) -> Message:
    """Return a message that asks a node to describe its site. With the plan, the site can load its model at once."""
    record = RecordDict({CONFIG: ConfigRecord({"federation": federation, "plan": plan})})
    return Message(record, node_id, JOIN, group_id="join")


def join_from(message: Message) -> tuple[str, str]:
    """Return (federation, plan) of a join message."""
    config = message.content.config_records[CONFIG]
    return str(config["federation"]), str(config["plan"])


def request_from(message: Message) -> TrainRequest:
    """Return the request in a message. Raises RefusedError if a field is missing, unknown or of another type."""
    return _unpack(TrainRequest, message)


def reply_message(content: TrainReply | SiteInfo, message: Message) -> Message:
    """Return the message that answers another one with a reply or description."""
    return Message(_pack(content), reply_to=message)


def error_message(reason: str, message: Message) -> Message:
    """Return the message that answers another one with an error. ``reason`` is sent: it must not contain data."""
    return Message(FlowerError(code=SITE_FAILED, reason=reason), reply_to=message)


def reply_from(message: Message) -> TrainReply:
    """Return the reply in a message. Raises RefusedError if a field is missing, unknown or of another type."""
    return _unpack(TrainReply, message)


def site_info_from(message: Message) -> SiteInfo:
    """Return the site description in a message. Raises RefusedError as :func:`reply_from` does."""
    return _unpack(SiteInfo, message)


def payload_bytes(message: Message) -> int:
    """Return the payload of a message in bytes: arrays, metrics and text, without Flower's envelope."""
    if not message.has_content():
        return 0
    arrays = sum(len(array.data) for record in message.content.array_records.values() for array in record.values())
    numbers = sum(len(key) + 8 for record in message.content.metric_records.values() for key in record)
    texts = sum(len(k) + len(str(v)) for record in message.content.config_records.values() for k, v in record.items())
    return arrays + numbers + texts


def _pack(content: TrainRequest | TrainReply | SiteInfo, packed: ArrayRecord | None = None) -> RecordDict:
    """Put arrays into the array record, metrics into the metric record, and all else into the config record."""
    fields = {f.name: getattr(content, f.name) for f in dataclasses.fields(content)}
    arrays, metrics = fields.pop("shared", None), fields.pop("metrics", None)
    record = RecordDict({CONFIG: ConfigRecord(fields)})
    if arrays is not None:
        record[ARRAYS] = packed or pack_arrays(arrays)
    if metrics is not None:
        record[METRICS] = MetricRecord({key: float(value) for key, value in metrics.items()})
    return record


def _unpack(kind: type[T], message: Message) -> T:
    """Return the content of an untrusted message as a ``kind``. Raises RefusedError for any deviation."""
    content, hints = message.content, get_type_hints(kind)
    records = {CONFIG: ConfigRecord}
    records |= {name: record for name, record in ((ARRAYS, ArrayRecord), (METRICS, MetricRecord)) if name in hints}
    if {name: type(record) for name, record in content.items()} != records:
        raise RefusedError("records", ", ".join(sorted(records)), ", ".join(sorted(content)) or "none")
    values: dict[str, Any] = dict(content.config_records[CONFIG])
    if ARRAYS in records:
        values[ARRAYS] = _arrays(content.array_records[ARRAYS])
    if METRICS in records:
        values[METRICS] = {key: _number(key, value) for key, value in content.metric_records[METRICS].items()}
    if set(values) != set(hints):
        name = min(set(values) ^ set(hints))
        message_text = f"A {kind.__name__} message {'lacks the' if name in hints else 'has an unknown'} field {name}."
        raise RefusedError("fields", f"the fields of {kind.__name__}", name, message=message_text)
    for name, hint in hints.items():
        if hint in (str, int, float, bool) and type(values[name]) is not hint:
            raise RefusedError(name, hint.__name__, type(values[name]).__name__)
        if get_origin(hint) is Literal and values[name] not in get_args(hint):
            raise RefusedError(name, " or ".join(get_args(hint)), repr(values[name]))
    return kind(**values)


def _number(key: str, value: object) -> float:
    if not isinstance(value, int | float):
        raise RefusedError(f"metric {key}", "a number", type(value).__name__)
    return float(value)


def _arrays(record: ArrayRecord) -> Arrays:
    if list(record) != [ALL]:
        raise RefusedError("arrays", f"one entry {ALL!r}", ", ".join(sorted(record))[:80] or "none")
    return decode(record[ALL].stype, record[ALL].data)
