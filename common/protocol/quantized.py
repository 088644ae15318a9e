"""Updates in few bits: the difference to arrays that the other side has, in blocks with one scale each.

The scales of all blocks come first, and then the numbers, array by array in name order. A block is 256 numbers of one
array. Its scale is a bfloat16, and a number is a multiple of it: one of 255 with 8 bits, one of 15 with 4 bits, and ±1
or ±3 with 2 bits. Names and shapes are those of the reference and are not sent.

The scale of a block is the one of ``FRACTIONS`` with the least square error: with 2 bits, about half of the one that
reaches the block's largest number. Numbers beyond the largest multiple are cut. No error is larger than 0.6 times the
block's largest number, so error feedback stays within 1.5 times the largest update.

Small multiples are more frequent than large ones, so the bytes are Huffman-coded (as DEFLATE, RFC 1951). A search for
repeated strings, as gzip and zstd make it, finds nothing more in them.
"""

from __future__ import annotations

import zlib

import numpy as np

from .types import Arrays

BLOCK = 256
STEPS = {8: 127, 4: 7, 2: 3}  # bits → the largest multiple of the scale
SCALE_BYTES = 2
FRACTIONS = {  # bits → scales that are tried, as fractions of the scale that reaches the block's largest number
    8: (1.0,),
    4: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5),
    2: (1.0, 0.85, 0.7, 0.6, 0.5, 0.4),
}
RAW = -15  # zlib's name for DEFLATE without a header and a checksum


def encode_update(arrays: Arrays, reference: Arrays, bits: int) -> bytes:
    """Encode ``arrays - reference``. Arrays that were decoded once are encoded to the same bytes again."""
    scales, codes = [], []
    for key in sorted(reference):
        blocks = _blocks(arrays[key].astype(np.float64) - reference[key])
        scale, numbers = _quantize(blocks, reference[key].size, bits)
        scales.append(scale.astype("<u2").tobytes())
        codes.append(_pack(numbers.ravel()[: reference[key].size], bits))
    coder = zlib.compressobj(9, zlib.DEFLATED, RAW, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(b"".join(scales + codes)) + coder.flush()


def decode_update(data: bytes, reference: Arrays, bits: int) -> Arrays:
    """Decode to fp32 arrays. Raises ValueError for another number of bytes than the reference needs.

    No more than that number is unpacked. The bytes of another machine may be scales that are not finite. So are the
    arrays then, which admission refuses.
    """
    sizes = {key: (-(-reference[key].size // BLOCK), -(-reference[key].size * bits // 8)) for key in sorted(reference)}
    blocks = sum(count for count, _ in sizes.values())
    data = _inflate(data, SCALE_BYTES * blocks + sum(length for _, length in sizes.values()))
    scales = _from_bf16(np.frombuffer(data, "<u2", blocks))
    arrays, block, at = {}, 0, SCALE_BYTES * blocks
    for key, (count, length) in sizes.items():
        before = reference[key]
        codes = _unpack(np.frombuffer(data, np.uint8, length, at), bits)[: before.size]
        update = codes * np.repeat(scales[block : block + count], BLOCK)[: before.size]
        arrays[key] = (before + update.reshape(before.shape)).astype(np.float32)
        block, at = block + count, at + length
    return arrays


def _inflate(data: bytes, size: int) -> bytes:
    decoder = zlib.decompressobj(RAW)
    try:
        raw = decoder.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(raw) != size or not decoder.eof or decoder.unused_data:
        raise ValueError("another number of bytes")
    return raw


def _blocks(values: np.ndarray) -> np.ndarray:
    """The numbers in rows of a block, with zeros at the end of the last."""
    flat = values.ravel()
    return np.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)


def _quantize(blocks: np.ndarray, size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The scales (blocks,) as bf16 and the codes (blocks, BLOCK) with the least square error of the ``size`` numbers.

    The scale that reaches the largest number is tried first. It is exact for blocks that were decoded once.
    """
    largest = np.abs(blocks).max(axis=1) / STEPS[bits]
    scale = _to_bf16(largest)
    codes = _codes(blocks, _from_bf16(scale), bits)
    least = _square_errors(blocks, size, scale, codes, bits)
    for fraction in FRACTIONS[bits][1:]:
        other = _to_bf16(fraction * largest)
        tried = _codes(blocks, _from_bf16(other), bits)
        errors = _square_errors(blocks, size, other, tried, bits)
        better = errors < least
        scale, least = np.where(better, other, scale), np.where(better, errors, least)
        codes[better] = tried[better]
    return scale, codes


def _square_errors(blocks: np.ndarray, size: int, scale: np.ndarray, codes: np.ndarray, bits: int) -> np.ndarray:
    errors = blocks - _from_bf16(scale)[:, None] * _multiples(codes, bits)
    errors.reshape(-1)[size:] = 0.0
    return np.square(errors).sum(axis=1)


def _codes(blocks: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """The nearest multiples of the scale as numbers from 0 on."""
    multiples = np.divide(blocks, scale[:, None], out=np.zeros_like(blocks), where=scale[:, None] > 0)
    if bits == 2:  # -3, -1, 1, 3
        return np.clip(np.floor(multiples / 2) + 2, 0, 3).astype(np.uint8)
    return (np.clip(np.rint(multiples), -STEPS[bits], STEPS[bits]) + STEPS[bits]).astype(np.uint8)


def _pack(codes: np.ndarray, bits: int) -> bytes:
    """Several codes in one byte, the first in its lowest bits."""
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    padded = np.pad(codes, (0, -len(codes) % per_byte)).reshape(-1, per_byte)
    return np.bitwise_or.reduce(padded << shifts, axis=1).astype(np.uint8).tobytes()


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The multiples of the scale."""
    shifts = np.arange(8 // bits, dtype=np.uint8) * bits
    return _multiples(((packed[:, None] >> shifts) & (2**bits - 1)).ravel(), bits)


def _multiples(codes: np.ndarray, bits: int) -> np.ndarray:
    values = codes.astype(np.float64)
    return 2 * values - 3 if bits == 2 else values - STEPS[bits]


def _to_bf16(values: np.ndarray) -> np.ndarray:
    """fp64 → the upper half of the bits of fp32, rounded to nearest."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x8000) >> np.uint64(16)).astype(np.uint16)


def _from_bf16(upper: np.ndarray) -> np.ndarray:
    return (upper.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
