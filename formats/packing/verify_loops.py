"""The verification's inner loops: codes out of words, one to a byte, by the definition of each packing.

Nothing here is shared with the conversion, whose loops are in `convert_loops.py`: the two check each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from xpuquant.formats.packing.jit import compiled

Array = np.ndarray[Any, Any]


_LINES = 16
"""Words of a line of the first-level cache."""


def flat(matrix: Array) -> tuple[Array, int]:
    """All from the first element of a matrix to its last, 1-D, and the elements from one row to the next: so the
    compiler knows that the elements of a row lie side by side, although rows lie apart."""
    pitch = matrix.strides[0] // matrix.itemsize
    size = (matrix.shape[0] - 1) * pitch + matrix.shape[1] if matrix.size else 0
    return as_strided(matrix, (size,), (matrix.itemsize,), writeable=False), pitch


def upright_words(columns: Array, out: Array) -> None:
    """`out[n, k] = columns[k, n]`, a tile of whole lines of the cache at a time."""
    _upright_words(columns, np.empty((_LINES, _LINES), columns.dtype), out)


@compiled
def _upright_words(columns: Array, made: Array, out: Array) -> None:
    N, K = out.shape
    for left in range(0, N, _LINES):
        wide = min(_LINES, N - left)
        for top in range(0, K, _LINES):
            high = min(_LINES, K - top)
            for k in range(high):
                # A row by itself: the compiler sees that its elements lie side by side.
                found, row = columns[top + k, left : left + wide], made[k]
                for n in range(wide):
                    row[n] = found[n]
            for n in range(wide):
                line = out[left + n, top : top + high]
                if high == _LINES:
                    for k in range(_LINES):
                        line[k] = made[k, n]
                else:
                    for k in range(high):
                        line[k] = made[k, n]


def upright_bytes(columns: Array, out: Array) -> None:
    """Byte i of word `[8m + t, w]` becomes byte t of word `[8w + i, m]`; uint64 `[8M, W]`, `[8W, M]`, both contiguous:
    a matrix of bytes that lies by columns, by rows."""
    _upright_bytes(columns, np.empty((8, 8, _LINES), np.uint64), out)


@compiled
def _upright_bytes(columns: Array, made: Array, out: Array) -> None:
    byte = np.uint64(0xFF)
    M, W = out.shape[1], columns.shape[1]
    for left in range(0, W, _LINES):
        wide = min(_LINES, W - left)
        for top in range(0, M, 8):
            high = min(8, M - top)
            for m in range(high):
                k = 8 * (top + m)
                a, b, c, d = (
                    columns[k, left : left + wide],
                    columns[k + 1, left : left + wide],
                    columns[k + 2, left : left + wide],
                    columns[k + 3, left : left + wide],
                )
                e, f, g, h = (
                    columns[k + 4, left : left + wide],
                    columns[k + 5, left : left + wide],
                    columns[k + 6, left : left + wide],
                    columns[k + 7, left : left + wide],
                )
                for i in range(8):
                    shift, row = np.uint64(8 * i), made[i, m]
                    for w in range(wide):
                        word = a[w] >> shift & byte
                        word |= (b[w] >> shift & byte) << np.uint64(8)
                        word |= (c[w] >> shift & byte) << np.uint64(16)
                        word |= (d[w] >> shift & byte) << np.uint64(24)
                        word |= (e[w] >> shift & byte) << np.uint64(32)
                        word |= (f[w] >> shift & byte) << np.uint64(40)
                        word |= (g[w] >> shift & byte) << np.uint64(48)
                        row[w] = word | (h[w] >> shift & byte) << np.uint64(56)
            for i in range(8):
                for w in range(wide):
                    n = 8 * (left + w) + i
                    for m in range(high):
                        out[n, top + m] = made[i, m, w]


@compiled
def unpack_stream(words: Array, bits: int, out: Array) -> None:
    """Values of a little-endian bit stream of at most 4 bits a value.

    Args:
        words: uint32 `[n, w]`; value i of a row takes bits `[i * bits, i * bits + bits)` of the row.
        out: uint64 `[n, m]`, written in place: eight values to a word, one to a byte. 8 * bits * m <= 32 * w.
    """
    one = np.uint64(0x0101010101010101) * np.uint64((1 << bits) - 1)
    two = np.uint64(0x0001000100010001) * np.uint64((1 << 2 * bits) - 1)
    four = np.uint64(0x0000000100000001) * np.uint64((1 << 4 * bits) - 1)
    eight = np.uint64((1 << 8 * bits) - 1)
    for n in range(out.shape[0]):
        for i in range(out.shape[1]):
            word, shift = 8 * bits * i // 32, 8 * bits * i % 32
            run = np.uint64(words[n, word])
            if shift + 8 * bits > 32:
                run |= np.uint64(words[n, word + 1]) << np.uint64(32)
            run = run >> np.uint64(shift) & eight
            # Eight values side by side: the upper four move to the upper half, then two of each four, then one of two.
            run = (run | run << np.uint64(32 - 4 * bits)) & four
            run = (run | run << np.uint64(16 - 2 * bits)) & two
            out[n, i] = (run | run << np.uint64(8 - bits)) & one


@compiled
def unpack_fields(words: Array, places: Array, out: Array) -> None:
    """Nibble i of word `[r, k]` becomes `out[8 * r + places[i], k]`; uint32 `[r, k]`, uint8 `[8 * r, k]`."""
    for r in range(words.shape[0]):
        for i in range(8):
            row, shift = 8 * r + places[i], np.uint32(4 * i)
            for k in range(words.shape[1]):
                out[row, k] = (words[r, k] >> shift) & np.uint32(15)


def upright_fields(words: Array, places: Array, out: Array) -> None:
    """Nibble i of word `[8m + t, w]` becomes nibble t of word `[8w + places[i], m]`; uint32 `[8M, W]`, `[8W, M]`."""
    # Part of wider rows is gathered first, or the elements of a row do not lie side by side for the compiler.
    made, pairs = np.empty((8, _LINES, _LINES), np.uint32), np.empty((2, 4, _LINES), np.uint32)
    _upright_fields(np.ascontiguousarray(words), places, made, pairs, out)


@compiled
def _upright_fields(words: Array, places: Array, made: Array, pairs: Array, out: Array) -> None:
    """`pairs`: of two rows, their even nibbles side by side in a byte, and their odd ones."""
    low, byte, four = np.uint32(0x0F0F0F0F), np.uint32(0xFF), np.uint32(4)
    M, W = out.shape[1], words.shape[1]
    for left in range(0, W, _LINES):
        wide = min(_LINES, W - left)
        for top in range(0, M, _LINES):
            high = min(_LINES, M - top)
            for m in range(high):
                for pair in range(4):
                    k = 8 * (top + m) + 2 * pair
                    first, second = words[k, left : left + wide], words[k + 1, left : left + wide]
                    even, odd = pairs[0, pair], pairs[1, pair]
                    for w in range(wide):
                        even[w] = first[w] & low | (second[w] & low) << four
                        odd[w] = first[w] >> four & low | (second[w] >> four & low) << four
                for i in range(8):
                    shift, row = np.uint32(8 * (i // 2)), made[i, m]
                    a, b, c, d = pairs[i % 2, 0], pairs[i % 2, 1], pairs[i % 2, 2], pairs[i % 2, 3]
                    for w in range(_LINES):
                        word = a[w] >> shift & byte
                        word |= (b[w] >> shift & byte) << np.uint32(8)
                        word |= (c[w] >> shift & byte) << np.uint32(16)
                        row[w] = word | (d[w] >> shift & byte) << np.uint32(24)
            for i in range(8):
                for w in range(wide):
                    n = 8 * (left + w) + places[i]
                    if high == _LINES:
                        for m in range(_LINES):
                            out[n, top + m] = made[i, m, w]
                    else:
                        for m in range(high):
                            out[n, top + m] = made[i, m, w]


def spread_stream(words: Array, bits: int, added: Array, per_added: int, out: Array) -> None:
    """Nibble j of word i of a row becomes value 8i+j of the row's bit stream, plus what is added to its group.

    Args:
        words: uint32 `[n, w]`, in any memory order; value i takes bits `[i * bits, i * bits + bits)` of a row, 2 or 3.
        added: uint8 `[n, G]`: no sum exceeds 15.
        per_added: words of `out` that one of them is added to.
        out: uint32 `[n, m]`, written in place; 8 * bits * m <= 32 * w.
    """
    made = np.empty((_LINES, _LINES), np.uint32)
    _spread_stream(np.ascontiguousarray(words.T), bits, np.ascontiguousarray(added.T), per_added, made, out)


@compiled
def _spread_stream(columns: Array, bits: int, added: Array, per_added: int, made: Array, out: Array) -> None:
    """The same of words and what is added by columns: uint32 `[w, n]`, uint8 `[G, n]`."""
    mask, ones = np.uint32((1 << bits) - 1), np.uint32(0x11111111)
    N, M = out.shape
    for left in range(0, N, _LINES):
        wide = min(_LINES, N - left)
        for top in range(0, M, _LINES):
            high = min(_LINES, M - top)
            for m in range(high):
                start = 8 * bits * (top + m)
                word, shift = start // 32, np.uint32(start % 32)
                straddles = start % 32 + 8 * bits > 32
                first = columns[word, left : left + wide]
                then = columns[word + straddles, left : left + wide]
                # Of the next word; where nothing is wanted of it, shifted out twice, for a shift by 32 is undefined.
                back = np.uint32(31) - shift if straddles else np.uint32(31)
                plus, row = added[(top + m) // per_added, left : left + wide], made[m]
                for w in range(wide):
                    run = first[w] >> shift | then[w] << back << np.uint32(1)
                    nibbles = run & mask
                    nibbles |= (run >> np.uint32(bits) & mask) << np.uint32(4)
                    nibbles |= (run >> np.uint32(2 * bits) & mask) << np.uint32(8)
                    nibbles |= (run >> np.uint32(3 * bits) & mask) << np.uint32(12)
                    nibbles |= (run >> np.uint32(4 * bits) & mask) << np.uint32(16)
                    nibbles |= (run >> np.uint32(5 * bits) & mask) << np.uint32(20)
                    nibbles |= (run >> np.uint32(6 * bits) & mask) << np.uint32(24)
                    nibbles |= (run >> np.uint32(7 * bits) & mask) << np.uint32(28)
                    row[w] = nibbles + np.uint32(plus[w]) * ones
            for w in range(wide):
                if high == _LINES:
                    for m in range(_LINES):
                        out[left + w, top + m] = made[m, w]
                else:
                    for m in range(high):
                        out[left + w, top + m] = made[m, w]


def count_nibbles(words: Array, first: int, second: int) -> int:
    """How many nibbles of uint64 words `[n, w]`, whose rows may lie apart, are one of two codes."""
    height, width = words.shape
    return int(_count_nibbles(*flat(words), height, width, first, second))


@compiled
def _count_nibbles(words: Array, pitch: int, rows: int, wide: int, first: int, second: int) -> int:
    ones = np.uint64(0x1111111111111111)
    a, b = ones * np.uint64(first), ones * np.uint64(second)
    found = 0
    for n in range(rows):
        row = words[n * pitch : n * pitch + wide]
        for i in range(wide):
            # A nibble that differs leaves its lowest bit set.
            x, y = row[i] ^ a, row[i] ^ b
            x |= x >> np.uint64(2)
            y |= y >> np.uint64(2)
            same = (x | x >> np.uint64(1)) & (y | y >> np.uint64(1)) & ones ^ ones
            same = (same & np.uint64(0x0101010101010101)) + (same >> np.uint64(4) & np.uint64(0x0101010101010101))
            found += int(same * np.uint64(0x0101010101010101) >> np.uint64(56))
    return found


@compiled
def count_octets(octets: Array, first: int, second: int) -> int:
    """How many of uint8 `[n, k]`, whose rows may lie apart, are one of two codes."""
    found = 0
    for n in range(octets.shape[0]):
        row = octets[n]
        for k in range(len(row)):
            found += (row[k] == first) | (row[k] == second)
    return found


@compiled
def count_large(words: Array, least: int) -> int:
    """How many bytes of uint64 words are at least so much (1 to 128) without their sign bit."""
    ones = np.uint64(0x0101010101010101)
    magnitude, more = ones * np.uint64(0x7F), ones * np.uint64(0x80 - least)
    found = 0
    for i in range(len(words)):
        # What reaches 128 shows in the bit that the sign had.
        large = (words[i] & magnitude) + more >> np.uint64(7) & ones
        found += int(large * ones >> np.uint64(56))
    return found


def count_scales(values: Array) -> tuple[int, int, float, float]:
    """How many of float32 `values` are not finite, and 0; the sum of the squares of the finite ones, and the largest
    magnitude of them."""
    return _counted(_count_scales, values)


def _counted(loop: Callable[..., None], *arguments: Any) -> tuple[int, int, float, float]:
    """What a loop has left in its last two arguments: two whole numbers, two others."""
    counts, sizes = np.zeros(2, np.int64), np.zeros(2, np.float64)
    loop(*arguments, counts, sizes)
    return int(counts[0]), int(counts[1]), float(sizes[0]), float(sizes[1])


@compiled
def _count_scales(values: Array, counts: Array, sizes: Array) -> None:
    bad, zero, squares, largest = 0, 0, 0.0, 0.0
    for i in range(len(values)):
        value = abs(np.float64(values[i]))
        if value < np.inf:
            zero += value == 0
            squares += value * value
            largest = max(largest, value)
        else:
            bad += 1
    counts[0], counts[1] = bad, zero
    sizes[0], sizes[1] = squares, largest


def count_halves(bits: Array, mantissa: int) -> tuple[int, int, float, float]:
    """The same of values of 16 bits, without widening them first.

    Args:
        bits: uint16 `[n, k]`, in any memory order: a sign, an exponent, and so many bits of mantissa; 10 of float16, 7
            of bfloat16.
    """
    exponents = np.maximum(np.arange(1 << (15 - mantissa)), 1)
    bias = (1 << (14 - mantissa)) - 1
    return _counted(_count_halves, bits, mantissa, np.ldexp(1.0, exponents - bias - mantissa))


@compiled
def _count_halves(bits: Array, mantissa: int, units: Array, counts: Array, sizes: Array) -> None:
    """`units`: of each exponent, what the lowest bit of the mantissa is worth."""
    infinite, hidden = (len(units) - 1) << mantissa, 1 << mantissa
    bad, zero, squares, most = 0, 0, 0.0, 0
    for n in range(bits.shape[0]):
        for k in range(bits.shape[1]):
            magnitude = int(bits[n, k]) & 0x7FFF
            if magnitude < infinite:
                zero += magnitude == 0
                # Numbers of one sign are in the order of their bits.
                most = max(most, magnitude)
                value = _of_bits(magnitude, mantissa, hidden, units)
                squares += value * value
            else:
                bad += 1
    counts[0], counts[1] = bad, zero
    sizes[0], sizes[1] = squares, _of_bits(most, mantissa, hidden, units)


@compiled
def _of_bits(magnitude: int, mantissa: int, hidden: int, units: Array) -> float:
    exponent = magnitude >> mantissa
    whole = (magnitude & (hidden - 1)) + (hidden if exponent else 0)
    return float(whole * units[exponent])


@compiled
def count_dead(groups: Array, nothing: Array, mask: int) -> int:
    """How many groups hold nothing but one code.

    Args:
        groups: uint64 `[n, G, w]`, sixteen nibbles to a word.
        nothing: uint8 `[n, G]`, the code of each group that counts as nothing; `[1, G]` where it is that of every row.
        mask: the bits of a nibble that count.
    """
    ones = np.uint64(0x1111111111111111)
    counts = ones * np.uint64(mask)
    dead = 0
    for n in range(groups.shape[0]):
        codes = nothing[n if len(nothing) > 1 else 0]
        for g in range(groups.shape[1]):
            empty = ones * np.uint64(codes[g])
            alive = (groups[n, g, 0] ^ empty) & counts
            if not alive:
                for w in range(1, groups.shape[2]):
                    alive |= (groups[n, g, w] ^ empty) & counts
                dead += alive == 0
    return dead
