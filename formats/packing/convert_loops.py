"""The conversion's inner loops: nibbles and bytes from the order of a source into that of a layout.

Each works tile by tile, so that what is read and written stays in the first-level cache. Nothing here is shared with
`verify_loops.py`: the two check each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xpuquant.formats.packing.jit import compiled

Array = np.ndarray[Any, Any]

_TILE = 16
"""Words of a line of the first-level cache: a tile is read and written in whole lines."""


def transpose_words(source: Array, out: Array) -> None:
    """`out[j, i] = source[i, j]` for 2-D arrays of one dtype; `out` is written in place. Measured: 10 GB/s a core."""
    # Part of wider rows is gathered first: that runs at 15 GB/s, where the tiles would wait for memory.
    _transpose(np.ascontiguousarray(source), out)


@compiled
def _transpose(source: Array, out: Array) -> None:
    height, width = source.shape
    for left in range(0, width, _TILE):
        for top in range(0, height, _TILE):
            if left + _TILE <= width and top + _TILE <= height:
                # The same as below, with bounds that the compiler knows.
                for j in range(_TILE):
                    for i in range(_TILE):
                        out[left + j, top + i] = source[top + i, left + j]
            else:
                for j in range(left, min(left + _TILE, width)):
                    for i in range(top, min(top + _TILE, height)):
                        out[j, i] = source[i, j]


@compiled
def _swap(first: Any, second: Any, shift: Any, mask: Any) -> tuple[Any, Any]:
    """Exchange the high parts of `first` with the low parts (`mask`) of `second`."""
    differ = ((first >> shift) ^ second) & mask
    return first ^ (differ << shift), second ^ differ


@compiled
def _transpose_fields(source: Array, out: Array, rows: Any, shifts: Any, masks: Any) -> None:
    """Eight rows of words are, at each column, an 8 x 8 matrix of fields; three rounds of swapping halves transpose it
    (Warren, Hacker's Delight, section 7-3).

    Args:
        source: `[8m, w]` words of eight fields; field i of word `[k, j]` is column `8j + rows[i]` of row k.
        out: `[8w, m]`, written in place; field t of word `[n, i]` is row 8i+t, column n of the source.
        shifts, masks: four, two and one field, and the low halves of pairs of so many; of the words' dtype.
    """
    height, width = out.shape[1], source.shape[1]
    four, two, one = shifts
    low4, low2, low1 = masks
    tile = np.empty((8, _TILE, _TILE), source.dtype)
    for left in range(0, width, _TILE):
        columns = min(_TILE, width - left)
        for top in range(0, height, _TILE):
            lines = min(_TILE, height - top)
            for i in range(lines):
                k = 8 * (top + i)
                for j in range(columns):
                    n = left + j
                    a, e = _swap(source[k, n], source[k + 4, n], four, low4)
                    b, f = _swap(source[k + 1, n], source[k + 5, n], four, low4)
                    c, g = _swap(source[k + 2, n], source[k + 6, n], four, low4)
                    d, h = _swap(source[k + 3, n], source[k + 7, n], four, low4)
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
                    n = 8 * (left + j) + rows[t]
                    if lines == _TILE:
                        for i in range(_TILE):
                            out[n, top + i] = tile[t, i, j]
                    else:
                        for i in range(lines):
                            out[n, top + i] = tile[t, i, j]


_NIBBLES = (np.uint32(16), np.uint32(8), np.uint32(4))
_NIBBLE_MASKS = (np.uint32(0x0000FFFF), np.uint32(0x00FF00FF), np.uint32(0x0F0F0F0F))
_BYTES = (np.uint64(32), np.uint64(16), np.uint64(8))
_BYTE_MASKS = (np.uint64(0x00000000FFFFFFFF), np.uint64(0x0000FFFF0000FFFF), np.uint64(0x00FF00FF00FF00FF))
_IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)


def transpose_nibbles(source: Array, out: Array, rows: tuple[int, ...]) -> None:
    """Turn words packed along columns into words packed along rows. Measured on one core: 6 GB/s.

    Args:
        source: uint32 `[8m, w]`; nibble i of word `[k, j]` is column `8j + rows[i]` of source row k.
        out: uint32 `[8w, m]`, written in place; nibble t of word `[n, i]` is source row 8i+t, column n.
    """
    _transpose_fields(np.ascontiguousarray(source), out, rows, _NIBBLES, _NIBBLE_MASKS)


def transpose_bytes(source: Array, out: Array) -> None:
    """`out[j, i] = source[i, j]` for uint8 `[h, w]` and `[w, h]`; `out` is written in place. Measured on one core:
    6.5 GB/s; byte by byte, at 1.7, where a side is no multiple of 8.

    Rows of either may lie apart (a part of wider rows), or the elements of `out` (every second column).
    """
    height, width = source.shape
    source = np.ascontiguousarray(source)
    if height % 8 or width % 8 or not _in_words(out):
        _transpose(source, out)
        return
    _transpose_fields(source.view(np.uint64), out.view(np.uint64), _IN_ORDER, _BYTES, _BYTE_MASKS)


def _in_words(matrix: Array) -> bool:
    """Whether each row is whole, aligned 64-bit words."""
    return matrix.strides[1] == 1 and matrix.strides[0] % 8 == 0 and matrix.ctypes.data % 8 == 0


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
    of `out`. Measured: 4 GB/s of output a core.

    Args:
        source: uint32 `[m * bits / 4, n]`, 2 or 3 bits; m a multiple of 4.
        out: uint32 `[n, m]`, written in place; nibble j of word i is code 8i+j.
    """
    _widen(np.ascontiguousarray(source), bits, out)


@compiled
def _widen(source: Array, bits: int, out: Array) -> None:
    width, height = out.shape
    tile = np.empty((_TILE, _TILE), np.uint32)
    for left in range(0, width, _TILE):
        columns = min(_TILE, width - left)
        for top in range(0, height, _TILE):
            lines = min(_TILE, height - top)
            for i in range(0, lines, 4):  # 32 codes are `bits` words
                k = (top + i) * bits // 4
                for j in range(columns):
                    n = left + j
                    if bits == 2:
                        tile[i, j], tile[i + 1, j] = _words2(source[k, n])
                        tile[i + 2, j], tile[i + 3, j] = _words2(source[k + 1, n])
                    else:
                        words = _words3(source[k, n], source[k + 1, n], source[k + 2, n])
                        tile[i, j], tile[i + 1, j], tile[i + 2, j], tile[i + 3, j] = words
            for j in range(columns):
                for i in range(lines):
                    out[left + j, top + i] = tile[i, j]


@compiled
def add_by_column(words: Array, added: Array, columns: Array) -> None:
    """`words[n, i] += added[n, columns[i]]`, in place."""
    for n in range(words.shape[0]):
        for i in range(words.shape[1]):
            words[n, i] += added[n, columns[i]]


@compiled
def permute_nibbles(words: Array, order: Array) -> None:
    """Nibble j of each row becomes its nibble `order[j]`, in place; uint32 `[n, K/8]`, order `[K]`."""
    codes = np.empty(8 * words.shape[1], np.uint32)
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
