"""Byte matrices turned on their side: the fast path of layouts that store fp8 as `[K, N]`."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Measured, uint8 [2048, 4096] on one core: 128 x 1024 moves 3.4 GB/s; the tiles of `nibbles.transpose_words`, byte
# by byte, half of that; one plain `dst[...] = src.T` a twentieth.
_TILE_ROWS = 128
_TILE_COLUMNS = 1024


def transpose_bytes(source: Array, out: Array) -> None:
    """`out[j, i] = source[i, j]` for uint8 `[h, w]` and `[w, h]`; `out` is written in place.

    Rows of `out` may lie apart (a part of wider rows), or its elements (every second column).
    """
    height, width = source.shape
    packed = height - height % 8 if out.strides[1] == 1 else 0
    for left in range(0, width, _TILE_COLUMNS):
        right = min(left + _TILE_COLUMNS, width)
        for top in range(0, packed, _TILE_ROWS):
            bottom = min(top + _TILE_ROWS, packed)
            words = _eight_rows(source[top:bottom, left:right])
            out[left:right, top:bottom].view(np.uint64)[...] = words.T
        for top in range(packed, height, _TILE_ROWS):
            bottom = min(top + _TILE_ROWS, height)
            out[left:right, top:bottom] = source[top:bottom, left:right].T


def _eight_rows(rows: Array) -> Array:
    """uint64 `[h/8, w]`: byte t of word `[i, j]` is row 8i+t of column j. Rows are merged two by two, so that
    every step is a plain widening, shift and OR of whole rows."""
    words = rows
    for wider, bits in ((np.uint16, 8), (np.uint32, 16), (np.uint64, 32)):
        pairs = words.reshape(len(words) // 2, 2, -1)
        words = pairs[:, 1].astype(wider)
        words <<= wider(bits)
        words |= pairs[:, 0]
    return words
