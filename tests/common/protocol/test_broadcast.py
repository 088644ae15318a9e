"""Differences that a coordinator sends: exact for the site that has the reference, and harmless for any other."""

from __future__ import annotations

import json
import random
import warnings
import zlib

import numpy as np
import pytest

from colora.common.config.loader import recipe_from
from colora.common.config.schema import CommunicationSettings, ModelSettings, Plan, to_json
from colora.common.errors import ConfigError, ReferenceMissingError, RefusedError
from colora.common.protocol import flower_messages as messages
from colora.common.protocol.broadcast import (
    DIGEST_BYTES,
    apply_difference,
    broadcast_bits_of,
    difference_codec,
    encode_difference,
    unchanged,
)
from colora.common.protocol.quantized import RAW
from colora.common.protocol.types import TrainRequest, hash_arrays
from colora.server.flower_compat import identify_process, set_message_id

BITS = (8, 4, 2)
Adapter = dict[str, np.ndarray]


def adapter(seed: int, size: float = 1.0) -> Adapter:
    rng = np.random.default_rng(seed)
    shapes = {"q.lora_A.weight": (4, 257), "q.lora_B.weight": (60, 4)}
    return {key: rng.normal(0, size, shape).astype(np.float32) for key, shape in shapes.items()}


def with_scales(bits: int, scale: int) -> bytes:
    """A difference of all zeros whose scales have these bits of a bfloat16."""
    raw = bytearray(zlib.decompress(encode_difference(adapter(0), adapter(0), bits)[0][DIGEST_BYTES:], RAW))
    blocks = 5 + 1
    raw[: 2 * blocks] = scale.to_bytes(2, "little") * blocks
    coder = zlib.compressobj(9, zlib.DEFLATED, RAW)
    return coder.compress(bytes(raw)) + coder.flush()


@pytest.mark.parametrize("bits", BITS)
def test_a_site_gets_the_bits_that_the_coordinator_keeps(bits: int) -> None:
    reference, target = adapter(0), {key: value.astype(np.float64) for key, value in adapter(1).items()}
    data, kept = encode_difference(target, reference, bits)
    received = apply_difference(data, reference, bits)
    assert hash_arrays(received) == hash_arrays(kept) == data[:DIGEST_BYTES].hex()
    assert all(value.dtype == np.float32 for value in received.values())


def test_no_codes_stand_for_the_reference_itself() -> None:
    reference = adapter(0)
    assert len(unchanged(reference)) == DIGEST_BYTES
    assert apply_difference(unchanged(reference), reference, 4) is reference


@pytest.mark.parametrize("bits", BITS)
def test_a_site_with_another_reference_or_none_asks_for_the_whole(bits: int) -> None:
    data, _ = encode_difference(adapter(1), adapter(0), bits)
    other = adapter(0)
    other["q.lora_B.weight"][3, 1] += 1e-4
    for reference, found in (({}, "no adapter of that round"), (other, "another adapter of that round")):
        with pytest.raises(ReferenceMissingError, match=found) as caught:
            apply_difference(data, reference, bits)
        assert caught.value.public() == "ReferenceMissingError: arrays"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [0x7F80, 0xFF80, 0x7FC0, 0x7F7F], ids=["inf", "-inf", "nan", "3.4e38"])
def test_values_that_are_not_finite_are_refused_whatever_their_digest(bits: int, scale: int) -> None:
    """The first multiple of a zero difference is 0 with 8 and 4 bits, and 1 with 2 bits."""
    codes = with_scales(bits, scale)
    large = {key: np.full_like(value, 3.3e38) for key, value in adapter(0).items()}
    if scale != 0x7F7F:
        with pytest.raises(RefusedError, match="finite values"):
            apply_difference(bytes(DIGEST_BYTES) + codes, adapter(0), bits)
    elif bits == 2:
        with pytest.raises(RefusedError, match="finite values"):
            apply_difference(bytes(DIGEST_BYTES) + codes, large, bits)


@pytest.mark.parametrize("bits", BITS)
def test_damaged_and_random_bytes_are_refused_without_a_warning(bits: int) -> None:
    reference, rng = adapter(0), random.Random(7)
    data, _ = encode_difference(adapter(1), reference, bits)
    damaged = [data[:n] for n in (0, 1, DIGEST_BYTES - 1, DIGEST_BYTES + 1, len(data) - 1)] + [data + b"x"]
    flipped = [bytes(b ^ (1 << rng.randrange(8)) if i == at else b for i, b in enumerate(data)) for at in range(0, 99)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bad in (*damaged, *flipped, *(rng.randbytes(rng.randrange(3000)) for _ in range(100))):
            with pytest.raises((RefusedError, ReferenceMissingError)):
                apply_difference(bad, reference, bits)


@pytest.mark.parametrize("bits", BITS)
def test_a_target_beyond_fp32_makes_no_finite_adapter_and_no_warning(bits: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (np.nan, np.inf, 1e300):
            target = {key: array.astype(np.float64) for key, array in adapter(1).items()}
            target["q.lora_B.weight"][0, 0] = value
            _, received = encode_difference(target, adapter(0), bits)
            assert not np.isfinite(received["q.lora_B.weight"]).all()


def plan(**communication: object) -> str:
    settings = CommunicationSettings(**communication)  # type: ignore[arg-type]
    return to_json(Plan("fed", 3, ModelSettings("m"), communication=settings))


def test_a_request_is_the_same_with_a_difference_and_with_the_whole_adapter() -> None:
    identify_process(1)
    data, shared = encode_difference(adapter(1), adapter(0), 4)
    request = TrainRequest("fed", 3, "train", 2, plan(update_bits=4, broadcast_bits=4), shared, evaluate=False)
    asked: list[tuple[str, str, int]] = []

    def received(*which: object) -> Adapter:
        asked.append(which)  # type: ignore[arg-type]
        return adapter(0)

    keys = set()
    for packed in (messages.pack_arrays(shared), messages.pack_difference(data, 4)):
        message = messages.train_message(request, packed, 1)
        set_message_id(message, "1")
        arrived = messages.request_from(message, received)
        assert hash_arrays(arrived.shared) == hash_arrays(shared)
        keys.add(arrived.key)
    assert keys == {request.key}
    assert asked == [("fed", request.plan, 2)]


@pytest.mark.parametrize(
    ("communication", "bits"), [({}, 4), ({"update_bits": 4}, 4), ({"broadcast_bits": 8}, 4)], ids=str
)
def test_a_difference_that_the_plan_does_not_know_is_refused(communication: dict, bits: int) -> None:
    identify_process(1)
    data, shared = encode_difference(adapter(1), adapter(0), bits)
    request = TrainRequest("fed", 3, "train", 2, plan(**communication), shared, evaluate=False)
    message = messages.train_message(request, messages.pack_difference(data, bits), 1)
    with pytest.raises(RefusedError, match=f"expected the codec safetensors, found {difference_codec(bits)}"):
        messages.request_from(message, lambda *which: adapter(0))


@pytest.mark.parametrize("bits", [True, 3, "8", [8], 2.0])
def test_other_bits_of_a_plan_are_refused(bits: object) -> None:
    with pytest.raises(RefusedError, match=r"communication\.broadcast_bits"):
        broadcast_bits_of(json.dumps({"communication": {"broadcast_bits": bits}}))
    for text in ("[1]", "{", '{"communication": 3}'):
        with pytest.raises(RefusedError, match="one JSON object"):
            broadcast_bits_of(text)


def test_a_codec_of_16_bits_is_refused_beside_differences(tiny_recipe: dict) -> None:
    with pytest.raises(ConfigError, match=r"communication\.codec = \"bf16\" is not possible with"):
        recipe_from({**tiny_recipe, "communication": {"codec": "bf16", "broadcast_bits": 8}})
