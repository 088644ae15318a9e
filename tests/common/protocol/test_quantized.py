"""Updates in 8, 4 and 2 bits: what arrives, in how many bytes, and how error feedback makes up for the rounding."""

from __future__ import annotations

import dataclasses
import json
import random
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from colora.client.training.error_feedback import quantized_update
from colora.client.training.update_pipeline import update_norm
from colora.common.config.loader import recipe_from
from colora.common.config.schema import CommunicationSettings, ModelSettings, Plan, to_json
from colora.common.errors import RefusedError
from colora.common.protocol import flower_messages as messages
from colora.common.protocol import quantized
from colora.common.protocol.codec import codec_of, decode, encode, reply_codec_of, update_codec
from colora.common.protocol.quantized import RAW
from colora.common.protocol.types import Arrays, TrainReply, TrainRequest
from colora.server.flower_compat import identify_process, set_message_id
from colora.simulation.run import simulate

BITS = (8, 4, 2)
SHAPES = {"v.lora_B.weight": (60, 40), "q.lora_A.weight": (4, 257), "q.lora_scale": (3,), "none": (0, 5)}


def arrays(seed: int, size: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {key: np.asarray(rng.normal(0, size, shape), np.float32) for key, shape in SHAPES.items()}


def plus(one: Arrays, other: Arrays) -> dict[str, np.ndarray]:
    return {key: value + other[key] for key, value in one.items()}


@pytest.mark.parametrize("bits", BITS)
def test_a_number_takes_so_many_bits_and_a_block_a_scale(bits: int) -> None:
    data = encode(update_codec(bits), plus(arrays(0), arrays(1)), arrays(0))
    numbers = sum(-(-value.size * bits // 8) for value in arrays(0).values())
    assert len(zlib.decompress(data, RAW)) == numbers + 2 * (10 + 5 + 1)  # blocks of the three arrays with numbers


@pytest.mark.parametrize(("bits", "fewer"), [(8, 0.94), (4, 0.90), (2, 0.98)])
def test_frequent_numbers_take_fewer_bits(bits: int, fewer: float) -> None:
    """The entropy of a normal distribution in blocks of 256: 7.5 of 8 bits, 3.5 of 4 and 1.9 of 2."""
    start = {"x": np.zeros((256, 256), np.float32)}
    update = {"x": np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)}
    assert len(encode(update_codec(bits), update, start)) < fewer * (256 * 256 * bits // 8 + 512)


@pytest.mark.parametrize("bits", BITS)
def test_bytes_that_unpack_to_more_than_the_reference_needs_are_refused_early(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand bytes of DEFLATE may hold a million; no more is unpacked than one byte too many."""
    coder, unpacked = zlib.compressobj(9, zlib.DEFLATED, RAW), []

    class Watched:
        def __init__(self) -> None:
            self.decoder = decompressobj(RAW)
            self.eof, self.unused_data = True, b""

        def decompress(self, data: bytes, most: int) -> bytes:
            unpacked.append(len(raw := self.decoder.decompress(data, most)))
            return raw

    bomb, decompressobj = coder.compress(bytes(10**7)) + coder.flush(), zlib.decompressobj
    monkeypatch.setattr(quantized.zlib, "decompressobj", lambda wbits: Watched())
    with pytest.raises(RefusedError, match="complete bytes of arrays"):
        decode(update_codec(bits), bomb, arrays(0))
    assert unpacked[0] <= 3432 + 32 + 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_no_error_is_larger_than_a_part_of_the_largest_number(bits: int, size: float) -> None:
    """Half a step with 8 bits; with fewer, what the smallest scale leaves of the largest number."""
    start, update = arrays(0, 0.0), arrays(1, size)
    received = decode(update_codec(bits), encode(update_codec(bits), plus(start, update), start), start)
    part = {8: 0.5 / 127, 4: 0.5, 2: 0.6}[bits]
    for key, value in update.items():
        if value.size:
            assert np.abs(received[key] - start[key] - value).max() <= 1.01 * part * np.abs(value).max()


@pytest.mark.parametrize(("bits", "best"), [(8, 4.4e-5), (4, 0.01154), (2, 0.1188)])
def test_the_square_error_is_close_to_the_least_of_equal_steps(bits: int, best: float) -> None:
    """Of a normal distribution: Max 1960, table 2 (4 and 16 levels); with 8 bits the step that reaches 3.0 σ."""
    start = {"x": np.zeros((256, 256), np.float32)}
    update = {"x": np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)}
    received = decode(update_codec(bits), encode(update_codec(bits), update, start), start)
    assert np.mean((received["x"] - update["x"]) ** 2) < 1.15 * best


@pytest.mark.parametrize("bits", BITS)
def test_feedback_stays_within_a_multiple_of_the_largest_update(bits: int) -> None:
    """One number of a block is a hundred times the others, in 50 rounds: none of it waits longer and longer."""
    start, feedback = {"x": np.zeros(256, np.float32)}, {}
    update = {"x": np.random.default_rng(0).normal(0, 0.01, 256).astype(np.float32)}
    update["x"][7] = 1.0
    for _ in range(50):
        _, feedback = quantized_update(plus(start, update), start, feedback, bits)
        assert np.abs(feedback["x"].numpy()).max() <= 1.51


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
def test_what_was_decoded_once_has_the_same_bytes_again(bits: int, size: float) -> None:
    """The site stores what the coordinator decodes, and encodes it when a request is repeated."""
    start, codec = arrays(0), update_codec(bits)
    data = encode(codec, plus(start, arrays(1, size)), start)
    received = decode(codec, data, start)
    assert encode(codec, received, start) == data


@pytest.mark.parametrize("bits", BITS)
def test_an_update_of_zero_is_exact(bits: int) -> None:
    start, codec = arrays(0), update_codec(bits)
    received = decode(codec, encode(codec, start, start), start)
    assert all(np.array_equal(received[key], start[key]) for key in start)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("damage", [b"", b"x"], ids=["short", "long"])
def test_another_number_of_bytes_is_refused(bits: int, damage: bytes) -> None:
    data = encode(update_codec(bits), arrays(1), arrays(0))
    with pytest.raises(RefusedError, match="complete bytes of arrays"):
        decode(update_codec(bits), data + damage if damage else data[:-1], arrays(0))


def test_nan_arrives_as_nan_for_the_coordinator_to_refuse() -> None:
    trained = arrays(1)
    trained["v.lora_B.weight"][3, 2] = np.nan
    received = decode("int8", encode("int8", trained, arrays(0)), arrays(0))
    assert np.isnan(received["v.lora_B.weight"]).any()


@pytest.mark.parametrize("bits", BITS)
def test_with_feedback_no_part_of_an_update_is_lost(bits: int) -> None:
    """After ten rounds, what was sent and the last feedback are what was trained: the errors do not add up."""
    start, feedback = arrays(0, 0.0), {}
    trained, received = ({key: np.zeros(value.shape) for key, value in start.items()} for _ in range(2))
    for t in range(10):
        update = arrays(t + 1, 1e-2)
        sent, feedback = quantized_update(plus(start, update), start, feedback, bits)
        for key in start:
            trained[key] += update[key]
            received[key] += sent[key] - start[key]
    for key in start:
        assert np.allclose(trained[key], received[key] + feedback[key].numpy(), atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_the_norm_of_what_is_sent_stays_within_the_bound(bits: int) -> None:
    start = arrays(0)
    feedback = quantized_update(plus(start, arrays(1)), start, {}, 2)[1]
    sent, _ = quantized_update(plus(start, arrays(2)), start, feedback, bits, bound=0.5)
    assert 0.3 < update_norm(sent, start) <= 0.5


@pytest.mark.parametrize("bits", BITS)
def test_only_replies_of_training_are_in_few_bits(bits: int) -> None:
    plan = Plan("fed", 2, ModelSettings("m"), communication=CommunicationSettings("fp16", bits))  # type: ignore[arg-type]
    text = to_json(plan)
    assert (codec_of(text), reply_codec_of(text, "train")) == ("fp16", f"int{bits}")
    assert {reply_codec_of(text, kind) for kind in ("trial", "initialize", "validate", "finalize")} == {"fp16"}


@pytest.mark.parametrize("bits", [True, 3, "8", [8]])
def test_other_bits_are_refused(bits: object) -> None:
    with pytest.raises(RefusedError, match=r"communication\.update_bits"):
        reply_codec_of(json.dumps({"communication": {"update_bits": bits}}), "train")
    for name in ("int8", "int4", "int2"):  # not for requests, which have no reference
        with pytest.raises(RefusedError, match=r"communication\.codec"):
            codec_of(json.dumps({"communication": {"codec": name}}))


def test_a_reply_passes_through_a_message() -> None:
    identify_process(1)
    plan = Plan("fed", 2, ModelSettings("m"), communication=CommunicationSettings(update_bits=4))
    asked = TrainRequest("fed", 1, "train", 0, to_json(plan), arrays(0), evaluate=True)
    question = messages.train_message(asked, messages.pack_arrays(asked.shared, codec_of(asked.plan)), 1)
    set_message_id(question, "1")
    shared, _ = quantized_update(plus(arrays(0), arrays(1)), arrays(0), {}, 4)
    reply = TrainReply("ada", "fed", 1, asked.key, shared, 4, 2)
    received = messages.reply_from(messages.reply_message(reply, question), asked)
    assert all(np.array_equal(received.shared[key], shared[key]) for key in shared)
    assert dataclasses.replace(received, shared={}) == dataclasses.replace(reply, shared={})


def packed(data: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, RAW)
    return coder.compress(data) + coder.flush()


@pytest.mark.parametrize("codec", [*map(update_codec, BITS), "fp16", "bf16"])
def test_any_numbers_of_a_site_are_decoded_without_a_warning(codec: str) -> None:
    """As scales, 0xFF80 is infinity, 0xFFFF and 0x7F81 are NaN, and 0x7F7F overflows fp32; fp16 has such NaN, too."""
    start, rng = arrays(0), random.Random(5)
    few_bits = codec.startswith("int")
    whole = encode(codec, start, start)
    whole = zlib.decompress(whole, RAW) if few_bits else whole
    head = whole.rfind(b"}") + 1 if codec in ("fp16", "bf16") else 0  # of a safetensors file
    size = len(whole) - head
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fill in (
            b"\xff",
            b"\x80\xff",
            b"\x81\x7f",
            b"\x7f",
            b"\x01\x7d",
            *(rng.randbytes(size) for _ in range(200)),
        ):
            data = whole[:head] + (fill * size)[:size]
            decode(codec, packed(data) if few_bits else data, start)


@pytest.mark.parametrize("bits", BITS)
def test_a_run_sends_fewer_bytes(tiny_recipe: dict, tmp_path: Path, wire: list[Message], bits: int) -> None:
    sizes = []
    for communication in ({}, {"update_bits": bits}):
        wire.clear()
        simulate(
            recipe_from({**tiny_recipe, "communication": communication}), tmp_path / str(communication), resume=False
        )
        replies = [
            m for m in wire if m.has_content() and messages.METRICS in m.content and m.metadata.reply_to_message_id
        ]
        packed = [m.content.array_records[messages.ARRAYS][messages.ALL] for m in replies]
        sizes.append(max(len(entry.data) for entry in packed))
    assert sizes[1] < sizes[0] * bits / 32
