from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SiteInfoRequest(_message.Message):
    __slots__ = ("federation", "plan", "protocol")
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    federation: str
    plan: str
    protocol: int
    def __init__(self, federation: _Optional[str] = ..., plan: _Optional[str] = ..., protocol: _Optional[int] = ...) -> None: ...

class ReceivedRequest(_message.Message):
    __slots__ = ("federation", "plan", "round", "protocol")
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    federation: str
    plan: str
    round: int
    protocol: int
    def __init__(self, federation: _Optional[str] = ..., plan: _Optional[str] = ..., round: _Optional[int] = ..., protocol: _Optional[int] = ...) -> None: ...

class SiteInfo(_message.Message):
    __slots__ = ("site", "protocol", "model", "tokenizer", "chat_template", "layout", "task", "train", "test", "truncated", "dropped", "classes", "labels", "rank")
    SITE_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    TEST_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    site: str
    protocol: int
    model: str
    tokenizer: str
    chat_template: str
    layout: str
    task: str
    train: int
    test: int
    truncated: int
    dropped: int
    classes: int
    labels: str
    rank: int
    def __init__(self, site: _Optional[str] = ..., protocol: _Optional[int] = ..., model: _Optional[str] = ..., tokenizer: _Optional[str] = ..., chat_template: _Optional[str] = ..., layout: _Optional[str] = ..., task: _Optional[str] = ..., train: _Optional[int] = ..., test: _Optional[int] = ..., truncated: _Optional[int] = ..., dropped: _Optional[int] = ..., classes: _Optional[int] = ..., labels: _Optional[str] = ..., rank: _Optional[int] = ...) -> None: ...

class TrainRequestPart(_message.Message):
    __slots__ = ("head", "chunk")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    head: TrainRequestHead
    chunk: Chunk
    def __init__(self, head: _Optional[_Union[TrainRequestHead, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class TrainRequestHead(_message.Message):
    __slots__ = ("federation", "round", "kind", "admitted_round", "plan", "evaluate", "protocol")
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_ROUND_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    federation: str
    round: int
    kind: str
    admitted_round: int
    plan: str
    evaluate: bool
    protocol: int
    def __init__(self, federation: _Optional[str] = ..., round: _Optional[int] = ..., kind: _Optional[str] = ..., admitted_round: _Optional[int] = ..., plan: _Optional[str] = ..., evaluate: bool = ..., protocol: _Optional[int] = ...) -> None: ...

class TrainReplyPart(_message.Message):
    __slots__ = ("progress", "head", "chunk")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    progress: Progress
    head: TrainReplyHead
    chunk: Chunk
    def __init__(self, progress: _Optional[_Union[Progress, _Mapping]] = ..., head: _Optional[_Union[TrainReplyHead, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("step", "total", "kind")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    step: int
    total: int
    kind: str
    def __init__(self, step: _Optional[int] = ..., total: _Optional[int] = ..., kind: _Optional[str] = ...) -> None: ...

class TrainReplyHead(_message.Message):
    __slots__ = ("site", "federation", "round", "key", "terms", "examples", "metrics", "seconds", "fresh", "measuring")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SITE_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    FRESH_FIELD_NUMBER: _ClassVar[int]
    MEASURING_FIELD_NUMBER: _ClassVar[int]
    site: str
    federation: str
    round: int
    key: str
    terms: int
    examples: int
    metrics: _containers.ScalarMap[str, float]
    seconds: float
    fresh: bool
    measuring: float
    def __init__(self, site: _Optional[str] = ..., federation: _Optional[str] = ..., round: _Optional[int] = ..., key: _Optional[str] = ..., terms: _Optional[int] = ..., examples: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., seconds: _Optional[float] = ..., fresh: bool = ..., measuring: _Optional[float] = ...) -> None: ...

class SumRequest(_message.Message):
    __slots__ = ("federation", "round", "step", "admitted_round", "plan", "evaluate", "reference", "body", "protocol")
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_ROUND_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    federation: str
    round: int
    step: str
    admitted_round: int
    plan: str
    evaluate: bool
    reference: str
    body: bytes
    protocol: int
    def __init__(self, federation: _Optional[str] = ..., round: _Optional[int] = ..., step: _Optional[str] = ..., admitted_round: _Optional[int] = ..., plan: _Optional[str] = ..., evaluate: bool = ..., reference: _Optional[str] = ..., body: _Optional[bytes] = ..., protocol: _Optional[int] = ...) -> None: ...

class BodyPart(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("name", "dtype", "shape", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...
