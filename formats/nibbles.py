"""Bit packing, as arithmetic on numpy arrays.

Two families. `pack_rows`/`unpack_rows` are the plain definition of a little-endian bit stream, for any width: the
readers of rare packings and the verification use them. `transpose_words` and friends are the fast paths of the
conversion: whole 32-bit words of eight nibbles, moved tile by tile so that a tile stays in the first-level cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

NIBBLES_PER_WORD = 8
SIGN_FLIP = np.uint32(0x88888888)
"""XOR with this turns eight unsigned nibbles (zero point 8) into two's complement ones."""
NIBBLE_ONES = np.uint32(0x11111111)
"""Times a number below 16: that number in each of the eight nibbles."""

# Measured, uint32 [512, 14336] on one core with 48 KiB of first-level cache: 16 x 1024 moves 5.3 GB/s,
# 64 x 256 half of that, one plain `dst[...] = src.T` a third.
_TILE_ROWS = 16
_TILE_COLUMNS = 1024
# Measured, uint32 [4096, 512] on one core: 2.5 GB/s; 16 x 64 a fifth of that.
_BLOCK_ROWS = 16
_BLOCK_COLUMNS = 512


def transpose_words(source: Array, out: Array) -> None:
    """`out[j, i] = source[i, j]` for 2-D arrays of one dtype; `out` is written in place."""
    height, width = source.shape
    for left in range(0, width, _TILE_COLUMNS):
        right = min(left + _TILE_COLUMNS, width)
        for top in range(0, height, _TILE_ROWS):
            bottom = min(top + _TILE_ROWS, height)
            out[left:right, top:bottom] = source[top:bottom, left:right].T


def transpose_nibbles(source: Array, out: Array, rows: Sequence[int]) -> None:
    """Turn words packed along columns into words packed along rows.

    Args:
        source: uint32 `[8m, w]`; nibble i of word `[k, j]` is column `8j + rows[i]` of source row k.
        out: uint32 `[8w, m]`, written in place; nibble t of word `[n, i]` is source row 8i+t, column n.
    """
    height, width = source.shape[0] // NIBBLES_PER_WORD, source.shape[1]
    blocks = source[: height * NIBBLES_PER_WORD].reshape(height, NIBBLES_PER_WORD, width)
    target = out.reshape(width, NIBBLES_PER_WORD, height)
    for left in range(0, width, _BLOCK_COLUMNS):
        right = min(left + _BLOCK_COLUMNS, width)
        for top in range(0, height, _BLOCK_ROWS):
            bottom = min(top + _BLOCK_ROWS, height)
            # Eight rows at a time are an 8 x 8 matrix of nibbles; three rounds of swapping halves transpose
            # it (Warren, Hacker's Delight, section 7-3), all of a tile's matrices at once.
            words = blocks[top:bottom, :, left:right].swapaxes(0, 1).copy()
            words = words.reshape(2, 2, 2, bottom - top, right - left)
            spare = np.empty_like(words[0])
            _swap_halves(words[0], words[1], 16, 0x0000FFFF, spare)
            _swap_halves(words[:, 0], words[:, 1], 8, 0x00FF00FF, spare)
            _swap_halves(words[:, :, 0], words[:, :, 1], 4, 0x0F0F0F0F, spare)
            for row, matrix in zip(rows, words.reshape(NIBBLES_PER_WORD, bottom - top, -1), strict=True):
                target[left:right, row, top:bottom] = matrix.T


def _swap_halves(first: Array, second: Array, shift: int, mask: int, spare: Array) -> None:
    """Exchange the high parts of `first` with the low parts (`mask`) of `second`."""
    np.right_shift(first, np.uint32(shift), out=spare)
    np.bitwise_xor(spare, second, out=spare)
    np.bitwise_and(spare, np.uint32(mask), out=spare)
    np.bitwise_xor(second, spare, out=second)
    np.left_shift(spare, np.uint32(shift), out=spare)
    np.bitwise_xor(first, spare, out=first)


def spread_words(source: Array, bits: int, out: Array) -> None:
    """Widen a dense 2- or 3-bit stream to nibbles; the stream runs along axis 0.

    Args:
        source: uint32 `[m * bits / 4, n]`, 8 * bits bits for each word of `out`.
        out: uint32 `[m, n]`, written in place; nibble j of word i is code 8i+j.
    """
    if bits == 2:
        np.bitwise_and(source, np.uint32(0xFFFF), out=out[0::2])
        np.right_shift(source, np.uint32(16), out=out[1::2])
    else:
        # Four runs of 24 bits in three words.
        first, second, third = source[0::3], source[1::3], source[2::3]
        np.bitwise_and(first, np.uint32(0xFFFFFF), out=out[0::4])
        np.bitwise_and(
            (first >> np.uint32(24)) | (second << np.uint32(8)), np.uint32(0xFFFFFF), out=out[1::4]
        )
        np.bitwise_and(
            (second >> np.uint32(16)) | (third << np.uint32(16)), np.uint32(0xFFFFFF), out=out[2::4]
        )
        np.right_shift(third, np.uint32(8), out=out[3::4])
    for codes, slot in ((4, 16), (2, 8), (1, 4)):
        # Fields of twice as many codes lie in slots of twice the width: move the upper half of each up.
        field = (1 << codes * bits) - 1
        low = np.uint32(sum(field << at for at in range(0, 32, 2 * slot)))
        upper = out & (low << np.uint32(codes * bits))
        np.bitwise_and(out, low, out=out)
        np.left_shift(upper, np.uint32(slot - codes * bits), out=upper)
        np.bitwise_or(out, upper, out=out)


def permute_nibbles(words: Array, order: Array) -> None:
    """Nibble j of each row becomes its nibble `order[j]`, in place; uint32 `[n, K/8]`, order `[K]`."""
    codes = unpack_nibbles(words.view(np.uint8))
    words[...] = pack_nibbles(np.take(codes, order, axis=1))


def unpack_rows(words: Array, bits: int, count: int) -> Array:
    """uint8 `[n, count]`: the first `count` values of each row of a little-endian bit stream.

    Args:
        words: uint32 `[n, ceil(count * bits / 32)]`; value i of a row takes bits `[i*bits, i*bits + bits)`
            of the row's words read as one little-endian number (low bits of word 0 first).
        bits: 1 to 8.
        count: values per row.
    """
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
    """uint8 `[n, count]` of the planar packing: every 32 values take `bits` words, one run of words per bit
    plane; in a plane of width w, value i*(32/w)+j is field j of word i. Other widths are plain streams."""
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


def pack_rows(values: Array, bits: int) -> Array:
    """uint32 `[n, ceil(count * bits / 32)]`: the inverse of `unpack_rows`; unused high bits are 0."""
    n, count = values.shape
    stream = np.unpackbits(values.astype(np.uint8)[:, :, None], axis=2, count=bits, bitorder="little")
    total = -(-count * bits // 32) * 32
    padded = np.zeros((n, total), np.uint8)
    padded[:, : count * bits] = stream.reshape(n, count * bits)
    packed = np.packbits(padded, axis=1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u4").astype(np.uint32)


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
