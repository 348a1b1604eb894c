"""Codes in words by the plain definition: a little-endian bit stream, for any width, as arithmetic on numpy arrays.

Verification decodes with these, and readers of rare packings convert with them. The conversion's fast paths are in
`convert_loops.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

NIBBLES_PER_WORD = 8
SIGN_FLIP = np.uint32(0x88888888)
"""XOR with this turns eight unsigned nibbles (zero point 8) into two's complement ones."""
NIBBLE_ONES = np.uint32(0x11111111)
"""Times a number below 16: that number in each of the eight nibbles."""

_COMPILED_WORDS = 1 << 14
"""From so many words on, the compiled loop saves more time on 2 and 3 bits than its import takes."""


def unpack_rows(words: Array, bits: int, count: int) -> Array:
    """uint8 `[n, count]`: the first `count` values of each row of a little-endian bit stream.

    Args:
        words: uint32 `[n, ceil(count * bits / 32)]`; value i of a row takes bits `[i*bits, i*bits + bits)`
            of the row's words read as one little-endian number (low bits of word 0 first).
        bits: 1 to 8.
        count: values per row.
    """
    if bits in (2, 3) and words.size >= _COMPILED_WORDS and count % NIBBLES_PER_WORD == 0:
        from xpuquant.formats.packing.verify_loops import unpack_stream

        octets = np.empty((len(words), count // 8), np.uint64)
        unpack_stream(words, bits, octets)
        return octets.view(np.uint8)
    if 32 % bits == 0:
        values, width = np.ascontiguousarray(words).view(np.uint8), 8
        while width > bits:
            width //= 2
            values = _halves(values, width)
        return values[:, :count]
    # Eight codes are `bits` whole bytes: each such run becomes a number, whose codes are moved apart to a byte each.
    groups = -(-count // 8)
    stream = np.zeros((len(words), max(groups * bits, 4 * words.shape[1])), np.uint8)
    stream[:, : 4 * words.shape[1]] = np.ascontiguousarray(words).view(np.uint8)
    runs = np.zeros((len(words), groups, 8), np.uint8)
    runs[:, :, :bits] = stream[:, : groups * bits].reshape(len(words), groups, bits)
    numbers = runs.reshape(len(words), -1).view("<u8")
    for codes in (4, 2, 1):
        low = np.uint64(sum(((1 << codes * bits) - 1) << at for at in range(0, 64, 16 * codes)))
        upper = numbers & (low << np.uint64(codes * bits))
        numbers = (numbers & low) | (upper << np.uint64(codes * (8 - bits)))
    return numbers.view(np.uint8)[:, :count]


# GPTQModel docs/gptq_planar.md: plane widths of a planar block, low plane first.
_PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def unpack_planar(words: Array, bits: int, count: int) -> Array:
    """uint8 `[n, count]` from uint32 words of GPTQModel's planar packing.

    Every 32 values take `bits` words: one run of words for each plane of their bits. In a plane of width w, field j of
    word i belongs to value `i * 32 / w + j`. Widths that divide 32 are plain streams.
    """
    if bits not in _PLANES:
        return unpack_rows(words, bits, count)
    blocks = words.reshape(len(words), -1, bits)
    values = np.zeros((len(words), blocks.shape[1], 32), np.uint8)
    first = low = 0
    for width in _PLANES[bits]:
        plane = np.ascontiguousarray(blocks[:, :, first : first + width]).reshape(-1, width)
        values |= (unpack_rows(plane, width, 32) << low).reshape(values.shape)
        first, low = first + width, low + width
    return values.reshape(len(words), -1)[:, :count]


def pack_nibbles(values: Array) -> Array:
    """uint32 `[n, K/8]` from uint8 codes `[n, K]` below 16, K a multiple of 8: nibble j of word i is
    column 8i+j."""
    pairs = np.ascontiguousarray(values).view("<u2")
    packed: Array = (pairs | pairs >> np.uint16(4)).astype(np.uint8)
    return packed.view("<u4")


def unpack_nibbles(packed: Array) -> Array:
    """uint8 `[n, 2m]` from bytes `[n, m]`: low nibble first."""
    return _halves(packed, 4)


def _halves(packed: Array, bits: int) -> Array:
    """uint8 `[n, 2m]` from bytes `[n, m]` that hold two fields of `bits` each, the low one first."""
    # A byte spread over a little-endian pair of bytes is two fields in order; no store is strided.
    pairs = packed.astype("<u2")
    np.bitwise_or(pairs, pairs << np.uint16(8 - bits), out=pairs)
    np.bitwise_and(pairs, np.uint16(0x0101 * ((1 << bits) - 1)), out=pairs)
    return pairs.view(np.uint8)
