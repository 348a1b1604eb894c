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
