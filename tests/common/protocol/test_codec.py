"""Codecs: what arrives, in how many bytes, and what both sides refuse."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from flwr.app import Message

from colora.common.config.schema import CommunicationSettings, ModelSettings, Plan, to_json
from colora.common.errors import RefusedError
from colora.common.protocol import flower_messages as messages
from colora.common.protocol.codec import CODECS, DEFAULT, FOR_REQUESTS, as_received, codec_of, decode, encode
from colora.common.protocol.types import Arrays, TrainReply, TrainRequest
from colora.server.flower_compat import identify_process, set_message_id

BITS = {"safetensors": 32, "fp16": 16, "bf16": 16}  # of one number


def arrays(seed: int = 0, size: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"v.lora_B.weight": (60, 4), "q.lora_A.weight": (4, 70), "q.lora_scale": (3,), "none": (0, 5)}
    return {key: np.asarray(rng.normal(0, size, shape), np.float32) for key, shape in shapes.items()}


def same(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(one[key].tobytes() == other[key].tobytes() for key in one)


def request(codec: str, shared: Arrays) -> TrainRequest:
    plan = Plan("fed", 2, ModelSettings("m"), communication=CommunicationSettings(codec))  # type: ignore[arg-type]
    return TrainRequest("fed", 1, "train", 0, to_json(plan), as_received(codec, shared), True)


def sent(asked: TrainRequest) -> Message:
    """The request as a message to node 1, as the coordinator makes it."""
    message = messages.train_message(asked, messages.pack_arrays(asked.shared, codec_of(asked.plan)), 1)
    set_message_id(message, "1")  # as Flower does on the way
    return message


@pytest.fixture(autouse=True)
def _process() -> None:
    """Messages can be made only in a process that has a Flower run."""
    identify_process(1)


@pytest.mark.parametrize("codec", FOR_REQUESTS)
def test_names_shapes_and_fp32_arrive_in_the_codecs_bytes(codec: str) -> None:
    data = encode(codec, arrays())
    received = decode(codec, data)
    assert list(received) == sorted(arrays())
    assert {key: value.shape for key, value in received.items()} == {k: v.shape for k, v in arrays().items()}
    assert {value.dtype for value in received.values()} == {np.dtype(np.float32)}
    count = sum(value.size for value in arrays().values())
    assert 0 < len(data) - count * BITS[codec] / 8 < 600  # the rest is names and shapes


@pytest.mark.parametrize("codec", FOR_REQUESTS)
def test_what_was_received_once_passes_again_unchanged(codec: str) -> None:
    """The coordinator keeps what sites receive, so a request after a restart is the same to the bit."""
    once = as_received(codec, arrays(size=1e-3))
    assert same(as_received(codec, once), once)
    assert encode(codec, once) == encode(codec, arrays(size=1e-3))
    assert same(once, arrays(size=1e-3)) is CODECS[codec].lossless


@pytest.mark.parametrize("codec", FOR_REQUESTS)
def test_both_sides_of_a_round_have_the_same_key(codec: str) -> None:
    asked = request(codec, arrays())
    arrived = messages.request_from(sent(asked))
    assert same(arrived.shared, asked.shared)
    assert arrived.key == asked.key


@pytest.mark.parametrize("codec", FOR_REQUESTS)
def test_a_reply_comes_back_in_the_codec_of_the_request(codec: str) -> None:
    asked = request(codec, arrays())
    question = sent(asked)
    for shared in (arrays(1), {}):
        reply = TrainReply("ada", "fed", 1, asked.key, shared, 4, 2, {"train.loss": 0.5})
        answer = messages.reply_message(reply, question)
        assert [entry.stype for entry in answer.content.array_records[messages.ARRAYS].values()] == [codec]
        received = messages.reply_from(answer, asked)
        assert same(received.shared, as_received(codec, shared))
        assert dataclasses.replace(received, shared=reply.shared) == reply


@pytest.mark.parametrize("codec", FOR_REQUESTS)
def test_both_sides_refuse_arrays_in_another_codec(codec: str) -> None:
    other = next((name for name in CODECS if name != codec), "pickle")
    asked = request(codec, arrays())
    question = sent(asked)
    answer = messages.reply_message(TrainReply("ada", "fed", 1, asked.key, arrays(1), 4, 2), question)
    for message in (question, answer):
        entry = message.content.array_records[messages.ARRAYS][messages.ALL]
        entry.stype = other
    with pytest.raises(RefusedError, match=f"arrays: expected the codec {codec}, found {other}"):
        messages.request_from(question)
    with pytest.raises(RefusedError, match=f"arrays: expected the codec {codec}, found {other}"):
        messages.reply_from(answer, asked)


def test_the_reference_of_a_reply_is_what_the_request_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    """A delta codec is one row: it sends full arrays in a request and differences in a reply."""
    plain = CODECS[DEFAULT]

    def minus(one: Arrays, other: Arrays, sign: int) -> Arrays:
        return {key: value + sign * other[key] if other else value for key, value in one.items()}

    delta = dataclasses.replace(
        plain,
        encode=lambda given, reference: plain.encode(minus(given, reference, -1), {}),
        decode=lambda data, reference: minus(plain.decode(data, {}), reference, 1),
    )
    monkeypatch.setitem(CODECS, DEFAULT, delta)
    start = {"x": np.array([1.0, 2.0], np.float32)}
    asked = request(DEFAULT, start)
    question = sent(asked)
    answer = messages.reply_message(TrainReply("ada", "fed", 1, asked.key, {"x": start["x"] * 2}, 4, 2), question)
    on_the_wire = plain.decode(answer.content.array_records[messages.ARRAYS][messages.ALL].data, {})
    assert on_the_wire["x"].tolist() == [1.0, 2.0]
    assert messages.reply_from(answer, asked).shared["x"].tolist() == [2.0, 4.0]
    assert messages.request_from(question).shared["x"].tolist() == [1.0, 2.0]


# --- fp16 and bf16 --------------------------------------------------------------------------------------------------

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("codec", HALF)
def test_half_precision_is_torchs_to_the_bit(codec: str) -> None:
    """Rounding to nearest even, subnormals, ties, signed zeros and infinities."""
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [
            (rng.normal(size=20_000) * 10.0 ** rng.uniform(-30, 4, 20_000)).astype(np.float32),
            np.float32([0.0, -0.0, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65504, 6e-8]),
        ]
    )
    expected = torch.from_numpy(values).to(HALF[codec]).float().numpy()
    assert as_received(codec, {"x": values})["x"].tobytes() == expected.tobytes()


@pytest.mark.parametrize(("codec", "bound"), [("fp16", 2.0**-11), ("bf16", 2.0**-8)])
def test_a_round_trip_changes_a_normal_value_by_at_most_half_a_unit(codec: str, bound: float) -> None:
    sent_values = np.random.default_rng(1).uniform(0.01, 100, 50_000).astype(np.float32)
    error = np.abs(as_received(codec, {"x": sent_values})["x"] / sent_values.astype(np.float64) - 1)
    assert bound / 2 < error.max() <= bound


@pytest.mark.parametrize("codec", HALF)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0xFFFFFFFF])
def test_nan_arrives_as_nan_for_the_receiver_to_refuse(codec: str, bits: int) -> None:
    received = as_received(codec, {"x": np.array([bits, 0], np.uint32).view(np.float32)})["x"]
    assert np.isnan(received).tolist() == [True, False]


@pytest.mark.parametrize(("codec", "value"), [("fp16", 65505.0), ("bf16", 3.4e38)])
def test_a_value_beyond_the_codecs_range_is_not_sent_as_infinity(codec: str, value: float) -> None:
    with pytest.raises(RefusedError, match=r"q\.lora_A has a value beyond .*Use the codec safetensors"):
        encode(codec, {"q.lora_A": np.array([1.0, -value], np.float32)})


@pytest.mark.parametrize("codec", HALF)
def test_bytes_of_another_type_are_refused(codec: str) -> None:
    with pytest.raises(RefusedError, match="complete bytes of arrays"):
        decode(codec, encode(DEFAULT, arrays()))


@pytest.mark.parametrize("plan", ["", "nothing", "[]", '"x"', "[" * 100_000, '{"communication": 1}'])
def test_a_plan_that_is_no_plan_is_refused(plan: str) -> None:
    with pytest.raises(RefusedError, match="plan: expected settings as one JSON object"):
        codec_of(plan)


def test_a_plan_names_a_known_codec_or_none() -> None:
    assert codec_of("{}") == DEFAULT
    with pytest.raises(RefusedError, match=r"communication\.codec: expected one of .*, found 'pickle'"):
        codec_of(json.dumps({"communication": {"codec": "pickle"}}))
    with pytest.raises(RefusedError, match=r"communication\.codec"):
        codec_of(json.dumps({"communication": {"codec": ["safetensors"]}}))


@pytest.mark.parametrize("codec", FOR_REQUESTS)
def test_damaged_bytes_are_refused(codec: str) -> None:
    data = encode(codec, arrays())
    for damaged in (b"", data[:-1], data[:40], b"\x80\x04N.", (1 << 60).to_bytes(8, "little") + b"{}"):
        with pytest.raises(RefusedError, match="complete bytes of arrays"):
            decode(codec, damaged)
