"""The wire: orders, replies and descriptions as Flower messages. The only place with record keys."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.app import Error as FlowerError

from ..errors import RefusedError
from .codec import DEFAULT, decode, encode
from .types import Arrays, SiteInfo, TrainReply, TrainRequest

ARRAYS, METRICS, CONFIG = "shared", "metrics", "colora"
ALL = "adapter"  # key of the one entry in the array record: all arrays of a message
ORDER, JOIN = MessageType.TRAIN, MessageType.QUERY
T = TypeVar("T", TrainRequest, TrainReply, SiteInfo)
SITE_FAILED = 1001  # Flower error code of an answer that is an error of ours


def pack_arrays(arrays: Arrays) -> ArrayRecord:
    """Arrays in bytes, to be packed once and put into the orders of all sites."""
    data = encode(arrays)
    return ArrayRecord({ALL: Array(dtype="uint8", shape=(len(data),), stype=DEFAULT, data=data)})


def train_message(order: TrainRequest, packed: ArrayRecord, node_id: int) -> Message:
    """An order as the message that Flower takes to a node; ``packed`` is ``pack_arrays(order.shared)``."""
    return Message(_pack(order, packed), node_id, ORDER, group_id=str(order.round))


def join_message(federation: str, plan: str, node_id: int) -> Message:
    """The question who a node is; the plan lets the site build its model before the first round."""
    record = RecordDict({CONFIG: ConfigRecord({"federation": federation, "plan": plan})})
    return Message(record, node_id, JOIN, group_id="join")


def join_from(message: Message) -> tuple[str, str]:
    """(federation, plan) of a join message."""
    config = message.content.config_records[CONFIG]
    return str(config["federation"]), str(config["plan"])


def request_from(message: Message) -> TrainRequest:
    """The order in a message. Raises RefusedError when a field is missing, unknown or of another type."""
    return _unpack(TrainRequest, message)


def reply_message(content: TrainReply | SiteInfo, message: Message) -> Message:
    """A site's answer to a message."""
    return Message(_pack(content), reply_to=message)


def error_message(reason: str, message: Message) -> Message:
    """An answer that says what kind of thing went wrong; ``reason`` must be fit for the coordinator's eyes."""
    return Message(FlowerError(code=SITE_FAILED, reason=reason), reply_to=message)


def reply_from(message: Message) -> TrainReply:
    """The reply in a message. Raises RefusedError when a field is missing, unknown or of another type."""
    return _unpack(TrainReply, message)


def site_info_from(message: Message) -> SiteInfo:
    """The description in a message."""
    return _unpack(SiteInfo, message)


def payload_bytes(message: Message) -> int:
    """Payload bytes of a message: arrays, metrics and text, without Flower's envelope."""
    if not message.has_content():
        return 0
    arrays = sum(len(array.data) for record in message.content.array_records.values() for array in record.values())
    numbers = sum(len(key) + 8 for record in message.content.metric_records.values() for key in record)
    texts = sum(len(k) + len(str(v)) for record in message.content.config_records.values() for k, v in record.items())
    return arrays + numbers + texts


def _pack(content: TrainRequest | TrainReply | SiteInfo, packed: ArrayRecord | None = None) -> RecordDict:
    """Arrays go to the array record, floats by name to the metric record, the rest to the config record."""
    fields = {f.name: getattr(content, f.name) for f in dataclasses.fields(content)}
    arrays, metrics = fields.pop("shared", None), fields.pop("metrics", None)
    record = RecordDict({CONFIG: ConfigRecord(fields)})
    if arrays is not None:
        record[ARRAYS] = packed or pack_arrays(arrays)
    if metrics is not None:
        record[METRICS] = MetricRecord({key: float(value) for key, value in metrics.items()})
    return record


def _unpack(kind: type[T], message: Message) -> T:
    """The content of a message that may come from anyone: whatever is amiss is a RefusedError."""
    content, hints = message.content, get_type_hints(kind)
    wanted = {CONFIG: ConfigRecord}
    wanted |= {name: record for name, record in ((ARRAYS, ArrayRecord), (METRICS, MetricRecord)) if name in hints}
    if {name: type(record) for name, record in content.items()} != wanted:
        raise RefusedError("records", ", ".join(sorted(wanted)), ", ".join(sorted(content)) or "none")
    values: dict[str, Any] = dict(content.config_records[CONFIG])
    if ARRAYS in wanted:
        values[ARRAYS] = _arrays(content.array_records[ARRAYS])
    if METRICS in wanted:
        values[METRICS] = {key: _number(key, value) for key, value in content.metric_records[METRICS].items()}
    if set(values) != set(hints):
        found = sorted(set(values) ^ set(hints))
        raise RefusedError("fields", f"those of {kind.__name__}", f"a difference in {found[0]}")
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
