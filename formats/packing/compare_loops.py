"""The verification's comparisons of codes as they are packed: words of a source where they lie, with rows of an output.

As in `verify_loops.py`, nothing here is shared with the conversion. A tile of a source that lies by columns is put in
order in the first-level cache and compared there: no upright copy is written, and none is read again. Two 32-bit words
are one element, so that all arithmetic has the width of a register's lanes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xpuquant.formats.packing.jit import compiled
from xpuquant.formats.packing.verify_loops import flat

Array = np.ndarray[Any, Any]

_LINES = 16
"""Words of a line of the first-level cache."""


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


@compiled
def equal_upright(columns: Array, rows: Array) -> bool:
    """Whether 32-bit word `[k, n]` of a matrix that lies by columns is word `[n, k]` of one that lies by rows.
    Two words to an element: uint64 `[K, N/2]`, `[N, K/2]`; K and N are even."""
    lower, up = np.uint64(0xFFFFFFFF), np.uint64(32)
    upper = lower << up
    N, K = columns.shape[1], rows.shape[1]
    step = _LINES // 2
    for left in range(0, N, step):
        wide = min(step, N - left)
        for top in range(0, K, step):
            high = min(step, K - top)
            differ = np.uint64(0)
            if wide == step and high == step:
                # The same as below, with bounds that the compiler knows.
                for k in range(top, top + step):
                    for n in range(left, left + step):
                        a, b = columns[2 * k, n], columns[2 * k + 1, n]
                        differ |= (a & lower | b << up) ^ rows[2 * n, k]
                        differ |= (a >> up | b & upper) ^ rows[2 * n + 1, k]
            else:
                for k in range(top, top + high):
                    for n in range(left, left + wide):
                        a, b = columns[2 * k, n], columns[2 * k + 1, n]
                        differ |= (a & lower | b << up) ^ rows[2 * n, k]
                        differ |= (a >> up | b & upper) ^ rows[2 * n + 1, k]
            if differ:
                return False
    return True


def equal_fields(words: Array, places: Array, rows: Array) -> bool:
    """Whether nibble i of word `[8m + t, w]` is nibble t of word `[8w + places[i], m]`.

    Args:
        words: uint32 `[8M, W]`, W even; its rows may lie apart.
        places: the eight numbers below 8, in some order.
        rows: uint32 `[8W, M]`, contiguous, M even.
    """
    taken, fours, eights, made = (np.zeros((*shape, _FIELD_PAIRS), np.uint64) for shape in _BETWEEN)
    words, rows, pairs = words.view(np.uint64), rows.view(np.uint64), words.shape[1] // 2
    return bool(_equal_fields(*flat(words), pairs, places, taken, fours, eights, made, rows))


def equal_stream(words: Array, bits: int, added: Array, per_added: int, rows: Array) -> bool:
    """Whether nibble j of word i of a row is value 8i+j of the row's bit stream, plus what is added to its group.

    Args:
        words: uint32 `[w, N]`, N even; its rows may lie apart: value i of n takes bits `[i * bits, i * bits + bits)` of
            column n. 2 or 3 bits.
        added: uint8 `[G, N]`: no sum exceeds 15.
        per_added: words of a row of `rows` that one of them is added to.
        rows: uint32 `[N, M]`, contiguous, M even; 8 * bits * M <= 32 * w.
    """
    plus = np.ascontiguousarray(added).astype(np.uint32) * np.uint32(0x11111111)
    made, rows = np.empty((_LINES, _STREAM_PAIRS), np.uint64), rows.view(np.uint64)
    return bool(_equal_stream(*flat(words.view(np.uint64)), bits, plus.view(np.uint64), per_added, made, rows))


_FIELD_PAIRS = 8
"""Few enough that the compiler writes every step of a tile out."""
_BETWEEN = ((8,), (2, 4), (2, 2), (8, _LINES))
"""Runs of so many pairs of words: taken where fewer are left, and joined to fours, to eights and to words."""


@compiled
def _interleave(a: Array, b: Array, even: Array, odd: Array, shift: Any, mask: Any) -> None:
    """Even fields of two words side by side, and odd ones; `mask` has the even ones, `shift` is their width."""
    for w in range(_FIELD_PAIRS):
        x, y = a[w], b[w]
        even[w] = x & mask | (y & mask) << shift
        odd[w] = x >> shift & mask | y & ~mask


@compiled
def _equal_fields(
    words: Array,
    pitch: int,
    wide_words: int,
    places: Array,
    taken: Array,
    fours: Array,
    eights: Array,
    made: Array,
    rows: Array,
) -> bool:
    """`taken`, `fours`, `eights`, `made`: for what is between, `[..., _FIELD_PAIRS]`; `taken` holds whole lines."""
    nibbles, octets = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0x00FF00FF00FF00FF)
    halves = np.uint64(0x0000FFFF0000FFFF)
    lower, up = np.uint64(0xFFFFFFFF), np.uint64(32)
    upper = lower << up
    M = 2 * rows.shape[1]
    # Down first: the 128 rows of a tile are read on from where the tile before ended.
    for top in range(0, M, _LINES):
        high = min(_LINES, M - top)
        for left in range(0, wide_words, _FIELD_PAIRS):
            wide = min(_FIELD_PAIRS, wide_words - left)
            for m in range(high):
                at = 8 * (top + m) * pitch + left
                if wide == _FIELD_PAIRS:
                    for p in range(4):
                        x = words[at : at + _FIELD_PAIRS]
                        y = words[at + pitch : at + pitch + _FIELD_PAIRS]
                        _interleave(x, y, fours[0, p], fours[1, p], np.uint64(4), nibbles)
                        at += 2 * pitch
                else:
                    for t in range(8):
                        for w in range(wide):
                            taken[t, w] = words[at + w]
                        at += pitch
                    for p in range(4):
                        _interleave(taken[2 * p], taken[2 * p + 1], fours[0, p], fours[1, p], np.uint64(4), nibbles)
                for i in range(2):
                    a, b = eights[0], eights[1]
                    _interleave(fours[i, 0], fours[i, 1], a[0], a[1], np.uint64(8), octets)
                    _interleave(fours[i, 2], fours[i, 3], b[0], b[1], np.uint64(8), octets)
                    _interleave(a[0], b[0], made[i, m], made[i + 4, m], np.uint64(16), halves)
                    _interleave(a[1], b[1], made[i + 2, m], made[i + 6, m], np.uint64(16), halves)
            differ = np.uint64(0)
            if wide == _FIELD_PAIRS and high == _LINES:
                for i in range(8):
                    first = 16 * left + places[i]
                    for k in range(_LINES // 2):
                        for n in range(_FIELD_PAIRS):
                            a, b = made[i, 2 * k, n], made[i, 2 * k + 1, n]
                            differ |= (a & lower | b << up) ^ rows[first + 16 * n, top // 2 + k]
                            differ |= (a >> up | b & upper) ^ rows[first + 16 * n + 8, top // 2 + k]
            else:
                for i in range(8):
                    first = 16 * left + places[i]
                    for k in range(high // 2):
                        for n in range(wide):
                            a, b = made[i, 2 * k, n], made[i, 2 * k + 1, n]
                            differ |= (a & lower | b << up) ^ rows[first + 16 * n, top // 2 + k]
                            differ |= (a >> up | b & upper) ^ rows[first + 16 * n + 8, top // 2 + k]
            if differ:
                return False
    return True


_STREAM_PAIRS = 16
"""Enough that what is worked out once for a line is little beside it."""


@compiled
def _equal_stream(words: Array, pitch: int, bits: int, added: Array, per_added: int, made: Array, rows: Array) -> bool:
    both, lower, up = np.uint64(0x100000001), np.uint64(0xFFFFFFFF), np.uint64(32)
    upper = lower << up
    # Of the eight values of a word: the lower four of them, two of each four, one of each two; and the others.
    fours = both * np.uint64((1 << 4 * bits) - 1)
    twos = both * np.uint64(0x10001 * ((1 << 2 * bits) - 1))
    ones = both * np.uint64(0x01010101 * ((1 << bits) - 1))
    upper_fours, upper_twos = fours << np.uint64(4 * bits), twos << np.uint64(2 * bits)
    upper_ones = ones << np.uint64(bits)
    by_four, by_two, by_one = np.uint64(16 - 4 * bits), np.uint64(8 - 2 * bits), np.uint64(4 - bits)
    N, M = rows.shape[0] // 2, 2 * rows.shape[1]
    for left in range(0, N, _STREAM_PAIRS):
        wide = min(_STREAM_PAIRS, N - left)
        for top in range(0, M, _LINES):
            high = min(_LINES, M - top)
            for m in range(high):
                start = 8 * bits * (top + m)
                shift = np.uint64(start % 32)
                straddles = start % 32 + 8 * bits > 32
                kept = lower >> shift
                of_first, of_next = both * kept, both * (lower ^ kept) if straddles else np.uint64(0)
                back = np.uint64(32) - shift
                at = start // 32 * pitch + left
                first = words[at : at + wide]
                at += straddles * pitch
                then = words[at : at + wide]
                plus, row = added[(top + m) // per_added, left : left + wide], made[m]
                for w in range(wide):
                    run = first[w] >> shift & of_first | then[w] << back & of_next
                    run = run & fours | (run & upper_fours) << by_four
                    run = run & twos | (run & upper_twos) << by_two
                    run = run & ones | (run & upper_ones) << by_one
                    row[w] = run + plus[w]
            differ = np.uint64(0)
            if wide == _STREAM_PAIRS and high == _LINES:
                # The same as below, with bounds that the compiler knows.
                for n in range(_STREAM_PAIRS):
                    r = 2 * (left + n)
                    for k in range(_LINES // 2):
                        a, b = made[2 * k, n], made[2 * k + 1, n]
                        differ |= (a & lower | b << up) ^ rows[r, top // 2 + k]
                        differ |= (a >> up | b & upper) ^ rows[r + 1, top // 2 + k]
            else:
                for k in range(high // 2):
                    for n in range(wide):
                        a, b, r = made[2 * k, n], made[2 * k + 1, n], 2 * (left + n)
                        differ |= (a & lower | b << up) ^ rows[r, top // 2 + k]
                        differ |= (a >> up | b & upper) ^ rows[r + 1, top // 2 + k]
            if differ:
                return False
    return True
