"""Codes compared as they are packed: two to a byte, on both ends of a conversion.

`Decoded` is what a weight means, one code to a byte. Nearly all weights have four bits, and then equal nibbles with
equal zero points and equal scales mean the same without being taken apart: half the bytes to make, compare, digest and
count. Where packed rows differ, or one end has no packed form (act-order, rare packings), the decoded ones decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xpuquant.formats.checkpoint import Array
from xpuquant.formats.packing.plain import unpack_nibbles
from xpuquant.formats.weights.decoded import Decoded, difference, distinct_pairs, in_order, same_scales, subtract_zeros

WORD_ZERO = 8
"""The zero point of every stored nibble of a weight that has none of its own."""


@dataclass(frozen=True)
class Packed:
    """Rows `[n, K]` of a weight with 4-bit codes, in the source's column order.

    number  what a nibble means: `int` (unsigned code minus zero point) or `e2m1`
    codes   uint8 `[n, K/2]`, contiguous: the even column in the low nibble
    zeros   uint8 `[n, G]` zero points of `int`, `col` their columns too; None where all are 8
    scale   as in `Decoded`, and so are `row` and `col`
    """

    number: str
    codes: Array
    zeros: Array | None
    scale: Array
    row: Array
    col: Array

    @property
    def K(self) -> int:
        """Columns."""
        return 2 * int(self.codes.shape[1])

    def zero_points(self) -> Array:
        """uint8 `[n, G]`, written out."""
        if self.zeros is not None:
            return self.zeros
        return np.full((len(self.codes), self.scale.shape[1]), WORD_ZERO, np.uint8)

    def decoded(self) -> Decoded:
        """The same, one code to a byte."""
        codes = unpack_nibbles(self.codes)
        if self.number == "int":
            codes = subtract_zeros(codes, self.zeros, 4, self.col)
        return Decoded(self.number, codes, self.scale, self.row, self.col)


@dataclass(frozen=True)
class PackedColumns:
    """Rows of 4-bit integers as they lie in a file that has them by columns: compared in place, which is twice as fast
    as made upright first.

    words   uint32 `[K/8, n]`, K/8 and n even: nibble j of word `[i, r]` is column 8i+j of row r; its rows may lie apart
    zeros   as in `Packed`, and so are `scale`, `row` and `col`
    """

    words: Array
    zeros: Array | None
    scale: Array
    row: Array
    col: Array

    def upright(self) -> Packed:
        """The same by rows."""
        return Packed("int", word_octets(in_order(self.words.T)), self.zeros, self.scale, self.row, self.col)


Rows = Packed | Decoded
"""Rows of a weight, packed where its format or layout can show them so."""


def word_octets(words: Array) -> Array:
    """uint8 `[n, K/2]` from contiguous 32-bit words `[n, K/8]` whose nibble j is column 8i+j."""
    octets: Array = np.ascontiguousarray(words).view(np.uint8)
    return octets


def rows_difference(expected: Rows | PackedColumns, actual: Rows) -> str | None:
    """None where both mean the same; otherwise one line on the first place where they do not (`difference`).

    Args:
        expected: the source's rows; with their scales rounded, where that was asked for.
        actual: the output's.
    """
    if isinstance(expected, PackedColumns):
        if isinstance(actual, Packed) and _same_columns(expected, actual):
            return None
        expected = expected.upright()
    if isinstance(expected, Packed) and isinstance(actual, Packed) and _same(expected, actual):
        return None
    return difference(unpacked_rows(expected), unpacked_rows(actual))


def unpacked_rows(rows: Rows) -> Decoded:
    """Rows one code to a byte."""
    return rows.decoded() if isinstance(rows, Packed) else rows


def _same(a: Packed, b: Packed) -> bool:
    from xpuquant.formats.packing.verify_loops import equal_bytes

    if a.number != b.number or a.codes.shape != b.codes.shape or not equal_bytes(a.codes, b.codes):
        return False
    return _same_zeros(a, b) and same_scales(a, b)


def _same_columns(a: PackedColumns, b: Packed) -> bool:
    from xpuquant.formats.packing.verify_loops import equal_upright

    if b.number != "int" or b.codes.shape != (a.words.shape[1], 4 * a.words.shape[0]):
        return False
    same = equal_upright(a.words.view(np.uint64), b.codes.view(np.uint64))
    return bool(same) and _same_zeros(a, b) and same_scales(a, b)


def _same_zeros(a: Packed | PackedColumns, b: Packed) -> bool:
    if a.zeros is None or b.zeros is None:
        return all(side.zeros is None or bool((side.zeros == WORD_ZERO).all()) for side in (a, b))
    ours, theirs = distinct_pairs(a.col, b.col)
    return bool((a.zeros[:, ours] == b.zeros[:, theirs]).all())
