"""The conversion's inner loops: nibbles and bytes from the order of a source into that of a layout.

Each works tile by tile, so that what is read and written stays in the first-level cache. Nothing here is shared with
`verify_loops.py`: the two check each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from xpuquant.formats.packing.jit import compiled

Array = np.ndarray[Any, Any]

_TILE = 16
"""Words of a line of the first-level cache: a tile is read and written in whole lines."""


def transpose_words(source: Array, out: Array) -> None:
    """`out[j, i] = source[i, j]` for uint32 `[h, w]`, whose rows may lie apart, and `[w, h]`; `out` is contiguous and
    written in place. Measured on one core, a megabyte of a matrix of 8 to 30: 3.4 to 6.5 GB/s; a third of it where a
    side is odd."""
    source = _by_rows(source)
    if source.shape[0] % 2 or not _in_words(source) or not _in_words(out):
        _transpose(source, out)
    else:
        tile = np.empty((2, _TILE // 2, _TILE // 2), np.uint64)
        _transpose_pairs(*_flat(source.view(np.uint64)), tile, out.view(np.uint64))


def _by_rows(matrix: Array) -> Array:
    """The matrix itself where the elements of a row lie side by side, and rows behind each other."""
    wide = matrix.shape[1] * matrix.itemsize
    lies_so = matrix.strides[1] == matrix.itemsize and matrix.strides[0] >= wide
    return matrix if lies_so else np.ascontiguousarray(matrix)


def _in_words(matrix: Array) -> bool:
    """Whether each row is whole, aligned 64-bit words."""
    wide = matrix.shape[1] * matrix.itemsize
    apart, begin = matrix.strides[0], matrix.ctypes.data
    return matrix.strides[1] == matrix.itemsize and not (wide % 8 or apart % 8 or begin % 8)


def _flat(matrix: Array) -> tuple[Array, int]:
    """All from the first element of a matrix to its last, 1-D, and the elements from one row to the next: so the
    compiler knows that the elements of a row lie side by side, although rows lie apart."""
    pitch = matrix.strides[0] // matrix.itemsize
    size = (matrix.shape[0] - 1) * pitch + matrix.shape[1] if matrix.size else 0
    return as_strided(matrix, (size,), (matrix.itemsize,)), pitch


@compiled
def _transpose(source: Array, out: Array) -> None:
    """Of any dtype and shape."""
    height, width = source.shape
    for top in range(0, height, _TILE):
        for left in range(0, width, _TILE):
            for j in range(left, min(left + _TILE, width)):
                for i in range(top, min(top + _TILE, height)):
                    out[j, i] = source[i, j]


@compiled
def _transpose_pairs(source: Array, pitch: int, tile: Array, out: Array) -> None:
    """Two 32-bit words to an element: `source` as of `_flat`, `out` uint64 `[w, h/2]`; `tile` `[2, 8, 8]` is for what
    is between.

    Along the rows of the source first, which are read on from where the tile before ended: a matrix of which this is
    some columns is larger than the caches. Each line is read once and written once, whatever its address.
    """
    lower, up = np.uint64(0xFFFFFFFF), np.uint64(32)
    upper = lower << up
    half = _TILE // 2
    even, odd = tile
    width, height = out.shape[0] // 2, out.shape[1]
    for top in range(0, height, half):
        high = min(half, height - top)
        for left in range(0, width, half):
            wide = min(half, width - left)
            if high == half and wide == half:
                # The same as below, with bounds that the compiler knows.
                for k in range(half):
                    at = 2 * (top + k) * pitch + left
                    first, second = source[at : at + half], source[at + pitch : at + pitch + half]
                    for n in range(half):
                        even[k, n] = first[n] & lower | second[n] << up
                        odd[k, n] = first[n] >> up | second[n] & upper
                for n in range(half):
                    for k in range(half):
                        out[2 * (left + n), top + k] = even[k, n]
                    for k in range(half):
                        out[2 * (left + n) + 1, top + k] = odd[k, n]
            else:
                for k in range(high):
                    at = 2 * (top + k) * pitch + left
                    for n in range(wide):
                        first, second = source[at + n], source[at + pitch + n]
                        out[2 * (left + n), top + k] = first & lower | second << up
                        out[2 * (left + n) + 1, top + k] = first >> up | second & upper


@compiled
def _swap(first: Any, second: Any, shift: Any, mask: Any) -> tuple[Any, Any]:
    """Exchange the high parts of `first` with the low parts (`mask`) of `second`."""
    differ = ((first >> shift) ^ second) & mask
    return first ^ (differ << shift), second ^ differ


_FIELD_WORDS = 8
"""Columns of a tile of `_transpose_fields`: few, for it is eight times as high."""


@compiled
def _transpose_fields(
    source: Array,
    pitch: int,
    width: int,
    tile: Array,
    out: Array,
    apart: int,
    height: int,
    rows: Any,
    shifts: Any,
    masks: Any,
) -> None:
    """Eight rows of words are, at each column, an 8 x 8 matrix of fields; three rounds of swapping halves transpose it
    (Warren, Hacker's Delight, section 7-3).

    Args:
        source, pitch: `[8 * height, width]` words of eight fields, as of `_flat`; field i of word `[k, j]` is column
            `8j + rows[i]` of row k.
        tile: `[8, _TILE, _FIELD_WORDS]` words for what is between.
        out, apart: `[8 * width, height]`, as of `_flat`, written in place; field t of word `[n, i]` is row 8i+t, column
            n of the source.
        shifts, masks: four, two and one field, and the low halves of pairs of so many; of the words' dtype.
    """
    four, two, one = shifts
    low4, low2, low1 = masks
    for top in range(0, height, _TILE):
        lines = min(_TILE, height - top)
        for left in range(0, width, _FIELD_WORDS):
            columns = min(_FIELD_WORDS, width - left)
            for i in range(lines):
                at = 8 * (top + i) * pitch + left
                r0, r1 = source[at : at + columns], source[at + pitch : at + pitch + columns]
                at += 2 * pitch
                r2, r3 = source[at : at + columns], source[at + pitch : at + pitch + columns]
                at += 2 * pitch
                r4, r5 = source[at : at + columns], source[at + pitch : at + pitch + columns]
                at += 2 * pitch
                r6, r7 = source[at : at + columns], source[at + pitch : at + pitch + columns]
                for j in range(columns):
                    a, e = _swap(r0[j], r4[j], four, low4)
                    b, f = _swap(r1[j], r5[j], four, low4)
                    c, g = _swap(r2[j], r6[j], four, low4)
                    d, h = _swap(r3[j], r7[j], four, low4)
                    a, c = _swap(a, c, two, low2)
                    b, d = _swap(b, d, two, low2)
                    e, g = _swap(e, g, two, low2)
                    f, h = _swap(f, h, two, low2)
                    tile[0, i, j], tile[1, i, j] = _swap(a, b, one, low1)
                    tile[2, i, j], tile[3, i, j] = _swap(c, d, one, low1)
                    tile[4, i, j], tile[5, i, j] = _swap(e, f, one, low1)
                    tile[6, i, j], tile[7, i, j] = _swap(g, h, one, low1)
            for t in range(8):
                for j in range(columns):
                    at = (8 * (left + j) + rows[t]) * apart + top
                    line = out[at : at + lines]
                    for i in range(lines):
                        line[i] = tile[t, i, j]


def _turn_fields(source: Array, out: Array, rows: Any, shifts: Any, masks: Any) -> None:
    """`_transpose_fields` of matrices `[8m, w]` and `[8w, m]` whose rows may lie apart."""
    tile = np.empty((8, _TILE, _FIELD_WORDS), source.dtype)
    _transpose_fields(*_flat(source), source.shape[1], tile, *_flat(out), out.shape[1], rows, shifts, masks)


_NIBBLES = (np.uint32(16), np.uint32(8), np.uint32(4))
_NIBBLE_MASKS = (np.uint32(0x0000FFFF), np.uint32(0x00FF00FF), np.uint32(0x0F0F0F0F))
_BYTES = (np.uint64(32), np.uint64(16), np.uint64(8))
_BYTE_MASKS = (np.uint64(0x00000000FFFFFFFF), np.uint64(0x0000FFFF0000FFFF), np.uint64(0x00FF00FF00FF00FF))
_IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)


def transpose_nibbles(source: Array, out: Array, rows: tuple[int, ...]) -> None:
    """Turn words packed along columns into words packed along rows.

    Args:
        source: uint32 `[8m, w]`, whose rows may lie apart; nibble i of word `[k, j]` is column `8j + rows[i]` of
            source row k.
        out: uint32 `[8w, m]`, written in place; nibble t of word `[n, i]` is source row 8i+t, column n.
    """
    _turn_fields(_by_rows(source), out, rows, _NIBBLES, _NIBBLE_MASKS)


def transpose_bytes(source: Array, out: Array) -> None:
    """`out[j, i] = source[i, j]` for uint8 `[h, w]` and `[w, h]`; `out` is written in place. Byte by byte, at a third
    of the speed, where a side is no multiple of 8.

    Rows of either may lie apart (a part of wider rows), or the elements of `out` (every second column).
    """
    source = _by_rows(source)
    if not _in_words(source):
        source = np.ascontiguousarray(source)
    if source.shape[0] % 8 or source.shape[1] % 8 or not _in_words(out):
        _transpose(source, out)
    else:
        _turn_fields(source.view(np.uint64), out.view(np.uint64), _IN_ORDER, _BYTES, _BYTE_MASKS)


@compiled
def _spread3(run: Any) -> Any:
    """Eight codes of three bits, at the bottom of a word, to a nibble each: halves, quarters, codes move up."""
    run = (run & np.uint32(0x00000FFF)) | (run & np.uint32(0x00FFF000)) << np.uint32(4)
    run = (run & np.uint32(0x003F003F)) | (run & np.uint32(0x0FC00FC0)) << np.uint32(2)
    return (run & np.uint32(0x07070707)) | (run & np.uint32(0x38383838)) << np.uint32(1)


@compiled
def _spread2(run: Any) -> Any:
    """Eight codes of two bits, at the bottom of a word, to a nibble each."""
    run = (run & np.uint32(0x000000FF)) | (run & np.uint32(0x0000FF00)) << np.uint32(8)
    run = (run & np.uint32(0x000F000F)) | (run & np.uint32(0x00F000F0)) << np.uint32(4)
    return (run & np.uint32(0x03030303)) | (run & np.uint32(0x0C0C0C0C)) << np.uint32(2)


@compiled
def _words3(a: Any, b: Any, c: Any) -> Any:
    """Three words of a 3-bit stream as four of nibbles: four runs of 24 bits."""
    second = a >> np.uint32(24) | b << np.uint32(8)
    third = b >> np.uint32(16) | c << np.uint32(16)
    return _spread3(a), _spread3(second), _spread3(third), _spread3(c >> np.uint32(8))


@compiled
def _words2(a: Any) -> Any:
    """A word of a 2-bit stream as two of nibbles."""
    return _spread2(a), _spread2(a >> np.uint32(16))


@compiled
def spread_words(source: Array, bits: int, out: Array) -> None:
    """Widen a dense 2- or 3-bit stream to nibbles; the stream runs along axis 0 of both.

    Args:
        source: uint32 `[m * bits / 4, n]`, 8 * bits bits for each word of `out`.
        out: uint32 `[m, n]`, written in place; nibble j of word i is code 8i+j.
    """
    if bits == 2:
        for i in range(source.shape[0]):
            for n in range(source.shape[1]):
                out[2 * i, n], out[2 * i + 1, n] = _words2(source[i, n])
    else:
        for i in range(source.shape[0] // 3):
            for n in range(source.shape[1]):
                words = _words3(source[3 * i, n], source[3 * i + 1, n], source[3 * i + 2, n])
                out[4 * i, n], out[4 * i + 1, n], out[4 * i + 2, n], out[4 * i + 3, n] = words


def widen_words(source: Array, bits: int, out: Array) -> None:
    """`spread_words` and `transpose_words` in one: the stream runs along axis 0 of `source`, the nibbles along axis 1
    of `out`.

    Args:
        source: uint32 `[m * bits / 4, n]`, whose rows may lie apart; 2 or 3 bits, m a multiple of 4.
        out: uint32 `[n, m]`, contiguous, written in place; nibble j of word i is code 8i+j.
    """
    _widen(*_flat(_by_rows(source)), bits, np.empty((_TILE, _TILE), np.uint32), out)


@compiled
def _widen(source: Array, pitch: int, bits: int, tile: Array, out: Array) -> None:
    width, height = out.shape
    for top in range(0, height, _TILE):
        lines = min(_TILE, height - top)
        for left in range(0, width, _TILE):
            columns = min(_TILE, width - left)
            for i in range(0, lines, 4):  # 32 codes are `bits` words
                at = (top + i) * bits // 4 * pitch + left
                a, b = source[at : at + columns], source[at + pitch : at + pitch + columns]
                first, second, third, fourth = tile[i], tile[i + 1], tile[i + 2], tile[i + 3]
                if bits == 2:
                    for j in range(columns):
                        first[j], second[j] = _words2(a[j])
                        third[j], fourth[j] = _words2(b[j])
                else:
                    c = source[at + 2 * pitch : at + 2 * pitch + columns]
                    for j in range(columns):
                        first[j], second[j], third[j], fourth[j] = _words3(a[j], b[j], c[j])
            if lines == _TILE:
                # The same as below, with a bound that the compiler knows.
                for j in range(columns):
                    for i in range(_TILE):
                        out[left + j, top + i] = tile[i, j]
            else:
                for j in range(columns):
                    for i in range(lines):
                        out[left + j, top + i] = tile[i, j]


@compiled
def add_by_column(words: Array, added: Array, columns: Array) -> None:
    """`words[n, i] += added[n, columns[i]]`, in place."""
    for n in range(words.shape[0]):
        for i in range(words.shape[1]):
            words[n, i] += added[n, columns[i]]


def permute_nibbles(words: Array, order: Array) -> None:
    """Nibble j of each row becomes its nibble `order[j]`, in place; uint32 `[n, K/8]`, order `[K]`."""
    _permute_nibbles(words, order, np.empty(8 * words.shape[1], np.uint32))


@compiled
def _permute_nibbles(words: Array, order: Array, codes: Array) -> None:
    for n in range(words.shape[0]):
        for i in range(words.shape[1]):
            for j in range(8):
                codes[8 * i + j] = (words[n, i] >> np.uint32(4 * j)) & np.uint32(15)
        for i in range(words.shape[1]):
            word = np.uint32(0)
            for j in range(8):
                word |= codes[order[8 * i + j]] << np.uint32(4 * j)
            words[n, i] = word


@compiled
def look_up(octets: Array, table: Array, out: Array) -> None:
    """`out[i] = table[octets[i]]`, 1-D; a table of 256. Measured: 5 GB/s of 16-bit output a core, `np.take` 0.8."""
    for i in range(octets.size):
        out[i] = table[octets[i]]


@compiled
def look_up_planes(octets: Array, first: Array, second: Array, out: Array) -> None:
    """`out[i, 0] = first[octets[i]]` and `out[i, 1] = second[octets[i]]`, of runs `octets [m, n]`; tables of 256."""
    runs, length = octets.shape
    for run in range(runs):
        for i in range(length):
            octet = octets[run, i]
            out[run, 0, i] = first[octet]
            out[run, 1, i] = second[octet]
