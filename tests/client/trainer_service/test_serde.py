"""The gRPC messages: generated modules, their fields, and arrays in chunks of bounded size."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from colora.client.trainer_service import serde
from colora.client.trainer_service.proto import generate
from colora.client.trainer_service.proto import trainer_pb2 as pb
from colora.common.errors import RefusedError
from colora.common.protocol.types import PROTOCOL, SiteInfo, TrainReply, TrainRequest

ARRAYS = {
    "big.lora_B.weight": np.random.default_rng(0).normal(size=(300_000, 2)).astype(np.float32),  # three chunks
    "exactly one chunk": np.arange(serde.CHUNK // 4, dtype=np.float32),
    "turned": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "number": np.float32(1.5).reshape(()),
    "nothing": np.zeros((0, 3), np.float32),
    "odd": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
}
LAYOUT = {key: value.shape for key, value in ARRAYS.items()}
HEAD = {"federation": "town", "round": 2, "kind": "train", "admitted_round": 1, "plan": "{}", "protocol": PROTOCOL}


def gathered(*chunks: pb.Chunk) -> dict[str, np.ndarray]:
    assembler = serde.ArrayAssembler(LAYOUT, "ada")
    for chunk in chunks:
        assembler.add(chunk)
    return assembler.arrays()


def chunk(name: str = "odd", size: int = 16, **changes: object) -> pb.Chunk:
    values = {"dtype": "float32", "shape": LAYOUT.get(name, ()), "data": bytes(size), **changes}
    return pb.Chunk(name=name, **values)  # type: ignore[arg-type]


def test_the_generated_modules_are_those_of_the_proto_file() -> None:
    """``python -m colora.client.trainer_service.proto.generate`` writes them."""
    folder = Path(generate.FOLDER)
    generated = generate.generate()
    assert {name: (folder / name).read_text() for name in generated} == generated
    assert {path.name for path in folder.glob("trainer_pb2*")} == set(generated)


@pytest.mark.parametrize(
    ("message", "content", "more"),
    [
        (pb.SiteInfo, SiteInfo, set()),
        (pb.TrainRequestHead, TrainRequest, {"protocol"}),
        (pb.TrainReplyHead, TrainReply, set()),
    ],
)
def test_the_fields_are_those_of_the_protocol(message: type, content: type, more: set[str]) -> None:
    """A field that only one of the two has would be lost silently."""
    fields = {f.name for f in dataclasses.fields(content)} - {"shared"}
    assert {f.name for f in message.DESCRIPTOR.fields} == fields | more  # type: ignore[attr-defined]


def test_descriptions_orders_and_replies_come_out_as_they_went_in() -> None:
    info = SiteInfo("ada", 1, "m", "t", "c", "l", "generation", 10, 4, 1, 2, 3)
    assert serde.site_info_from(serde.site_info_message(info)) == info
    request = TrainRequest("town", 2, "finalize", 1, '{"ü": 1}', {}, True)
    (part,) = serde.request_parts(request)
    assert serde.request_from(part.head, {}) == request
    reply = TrainReply("ada", "town", 2, "key", {}, 2**40, 8, {"train.loss": 0.1 + 0.2, "base.loss": 1.0}, 1.25, True)
    assert serde.reply_from(serde.reply_head(reply), {}) == reply


def test_arrays_come_out_as_they_went_in_bit_for_bit() -> None:
    sent = list(serde.chunks(ARRAYS))
    assert max(len(each.data) for each in sent) == serde.CHUNK
    assert sum(each.name.startswith("big") for each in sent) == 3
    assert sum(each.name == "exactly one chunk" for each in sent) == 1
    back = gathered(*sent)
    assert {k: (v.shape, v.tobytes()) for k, v in back.items()} == {
        k: (v.shape, v.tobytes()) for k, v in ARRAYS.items()
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (chunk("encoder.lora_core"), "arrays: expected the shared groups only, found also encoder.lora_core"),
        (chunk(dtype="float64"), "odd: expected float32, found float64"),
        (chunk(shape=(5,)), r"odd: expected shape \(4,\), found \(5,\)"),
        (chunk(size=17), "odd: expected 16 bytes, found more"),
        (chunk("big.lora_B.weight", size=serde.CHUNK + 1), "chunks of 1 to 1048576 bytes, found 1048577"),
    ],
)
def test_a_chunk_that_is_not_of_the_layout_is_refused_when_it_comes(wrong: pb.Chunk, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        serde.ArrayAssembler(LAYOUT, "ada").add(wrong)


def test_an_array_must_come_whole_and_ends_where_its_layout_ends() -> None:
    with pytest.raises(RefusedError, match="odd: expected 16 bytes, found 12"):
        gathered(chunk(size=12))
    with pytest.raises(RefusedError, match="odd: expected 16 bytes, found more"):
        gathered(chunk(size=12), chunk(size=8))
    with pytest.raises(RefusedError, match="chunks of 1 to"):
        gathered(chunk(size=16), chunk(size=0))  # endless ones would hold a call open
    assert gathered(chunk(size=8), chunk(size=8))["odd"].tolist() == [0.0] * 4


def test_what_is_kept_in_memory_is_what_came_and_not_what_a_header_claims() -> None:
    assembler = serde.ArrayAssembler({"huge": (1 << 40, 8)}, "ada")
    assembler.add(pb.Chunk(name="huge", dtype="float32", shape=(1 << 40, 8), data=bytes(4)))
    assert sys.getsizeof(assembler.buffers["huge"]) < 200
    with pytest.raises(RefusedError, match="expected 35184372088832 bytes, found 4"):
        assembler.arrays()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "steal"}, "kind: expected trial or initialize or train or validate or finalize, found 'steal'"),
        ({"protocol": 99}, f"The trainer uses protocol version {PROTOCOL}, its client version 99"),
        ({"admitted_round": 2}, "admitted_round: expected a round before round 2, found 2"),
        ({"admitted_round": -1}, "admitted_round"),
        ({"round": 0, "admitted_round": 0}, "admitted_round"),
        ({"kind": "initialize", "round": 1, "admitted_round": 1}, "admitted_round"),
    ],
)
def test_a_head_of_no_possible_order_is_refused(change: dict, message: str) -> None:
    assert serde.request_from(pb.TrainRequestHead(**HEAD), {}).round == 2
    before_round_1 = {**HEAD, "kind": "initialize", "round": 0, "admitted_round": 0}
    assert serde.request_from(pb.TrainRequestHead(**before_round_1), {}).round == 0
    with pytest.raises(RefusedError, match=message):
        serde.request_from(pb.TrainRequestHead(**{**HEAD, **change}), {})


def test_a_socket_path_is_quoted_as_part_of_a_uri() -> None:
    assert serde.target_of("unix:/tmp/a b/50%.sock") == "unix:/tmp/a%20b/50%25.sock"
    assert serde.target_of("trainer:50051") == "trainer:50051"
