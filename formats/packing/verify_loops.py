"""The verification's inner loops: codes out of words, one to a byte, by the definition of each packing.

Nothing here is shared with the conversion, whose loops are in `convert_loops.py`: the two check each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xpuquant.formats.packing.jit import compiled

Array = np.ndarray[Any, Any]


@compiled
def copy_columns(array: Array, out: Array, step: int) -> None:
    """`out[i, j] = array[i, j]`, `step` columns at a time: for a source whose columns are contiguous."""
    height, width = array.shape
    for left in range(0, width, step):
        for i in range(height):
            for j in range(left, min(left + step, width)):
                out[i, j] = array[i, j]


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


def equal_bytes(a: Array, b: Array) -> bool:
    """Whether two contiguous uint8 arrays of one shape hold the same."""
    a, b = a.reshape(-1), b.reshape(-1)
    whole = a.size // 8 * 8
    same = bool(_equal_words(a[:whole].view(np.uint64), b[:whole].view(np.uint64)))
    return same and bool((a[whole:] == b[whole:]).all())


@compiled
def _equal_words(a: Array, b: Array) -> bool:
    step = 1024
    for start in range(0, len(a), step):
        differ = np.uint64(0)
        for i in range(start, min(start + step, len(a))):
            differ |= a[i] ^ b[i]
        if differ:
            return False
    return True


_LINES = 16
"""Words of a line of the first-level cache."""


@compiled
def upright_fields(words: Array, places: Array, out: Array) -> None:
    """Nibble i of word `[8m + t, w]` becomes nibble t of word `[8w + places[i], m]`; uint32 `[8M, W]`, `[8W, M]`."""
    made = np.empty((8, _LINES, _LINES), np.uint32)
    M, W = out.shape[1], words.shape[1]
    for left in range(0, W, _LINES):
        wide = min(_LINES, W - left)
        for top in range(0, M, _LINES):
            high = min(_LINES, M - top)
            for m in range(high):
                k = 8 * (top + m)
                for i in range(8):
                    shift = np.uint32(4 * i)
                    for w in range(wide):
                        word = words[k, left + w] >> shift & np.uint32(15)
                        word |= (words[k + 1, left + w] >> shift & np.uint32(15)) << np.uint32(4)
                        word |= (words[k + 2, left + w] >> shift & np.uint32(15)) << np.uint32(8)
                        word |= (words[k + 3, left + w] >> shift & np.uint32(15)) << np.uint32(12)
                        word |= (words[k + 4, left + w] >> shift & np.uint32(15)) << np.uint32(16)
                        word |= (words[k + 5, left + w] >> shift & np.uint32(15)) << np.uint32(20)
                        word |= (words[k + 6, left + w] >> shift & np.uint32(15)) << np.uint32(24)
                        word |= (words[k + 7, left + w] >> shift) << np.uint32(28)
                        made[i, m, w] = word
            for i in range(8):
                for w in range(wide):
                    n = 8 * (left + w) + places[i]
                    for m in range(high):
                        out[n, top + m] = made[i, m, w]


@compiled
def spread_stream(words: Array, bits: int, added: Array, per_added: int, out: Array) -> None:
    """Nibble j of word i of a row becomes value 8i+j of the row's bit stream, plus what is added to its group.

    Args:
        words: uint32 `[n, w]`, in any memory order; value i takes bits `[i * bits, i * bits + bits)` of a row, 2 or 3.
        added: uint8 `[n, G]`: no sum exceeds 15.
        per_added: words of `out` that one of them is added to.
        out: uint32 `[n, m]`, written in place; 8 * bits * m <= 32 * w.
    """
    mask = np.uint64((1 << bits) - 1)
    made = np.empty((_LINES, _LINES), np.uint32)
    N, M = out.shape
    for left in range(0, N, _LINES):
        wide = min(_LINES, N - left)
        for top in range(0, M, _LINES):
            high = min(_LINES, M - top)
            for m in range(high):
                first = 8 * bits * (top + m)
                word, shift, group = first // 32, np.uint64(first % 32), (top + m) // per_added
                straddles = first % 32 + 8 * bits > 32
                for w in range(wide):
                    run = np.uint64(words[left + w, word])
                    if straddles:
                        run |= np.uint64(words[left + w, word + 1]) << np.uint64(32)
                    run >>= shift
                    nibbles = run & mask
                    for j in range(1, 8):
                        nibbles |= (run >> np.uint64(bits * j) & mask) << np.uint64(4 * j)
                    made[m, w] = np.uint32(nibbles) + np.uint32(added[left + w, group]) * np.uint32(0x11111111)
            for w in range(wide):
                for m in range(high):
                    out[left + w, top + m] = made[m, w]


@compiled
def count_nibbles(words: Array, first: int, second: int) -> int:
    """How many nibbles of uint64 words are one of two codes."""
    ones = np.uint64(0x1111111111111111)
    a, b = ones * np.uint64(first), ones * np.uint64(second)
    found = 0
    for i in range(len(words)):
        # A nibble that differs leaves its lowest bit set.
        x, y = words[i] ^ a, words[i] ^ b
        x |= x >> np.uint64(2)
        y |= y >> np.uint64(2)
        same = (x | x >> np.uint64(1)) & (y | y >> np.uint64(1)) & ones ^ ones
        same = (same & np.uint64(0x0101010101010101)) + (same >> np.uint64(4) & np.uint64(0x0101010101010101))
        found += int(same * np.uint64(0x0101010101010101) >> np.uint64(56))
    return found


@compiled
def count_dead(groups: Array, nothing: Array, mask: int) -> int:
    """How many groups hold nothing but one code.

    Args:
        groups: uint64 `[n, G, w]`, sixteen nibbles to a word.
        nothing: uint8 `[n, G]`, the code of each group that counts as nothing.
        mask: the bits of a nibble that count.
    """
    ones = np.uint64(0x1111111111111111)
    counts = ones * np.uint64(mask)
    dead = 0
    for n in range(groups.shape[0]):
        for g in range(groups.shape[1]):
            empty = ones * np.uint64(nothing[n, g])
            alive = (groups[n, g, 0] ^ empty) & counts
            if not alive:
                for w in range(1, groups.shape[2]):
                    alive |= (groups[n, g, w] ^ empty) & counts
                dead += alive == 0
    return dead
