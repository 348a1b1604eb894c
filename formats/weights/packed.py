"""Codes compared as they are packed: two to a byte, on both ends of a conversion.

`Decoded` is what a weight means, one code to a byte. Nearly all weights have four bits, and then equal nibbles with
equal zero points and equal scales mean the same without being taken apart: half the bytes to make, compare, digest and
count. Where packed rows differ, or one end has no packed form (act-order, rare packings), the decoded ones decide.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from xpuquant.formats.checkpoint import Array
from xpuquant.formats.packing.plain import NIBBLES_PER_WORD, unpack_nibbles
from xpuquant.formats.weights.decoded import Decoded, difference, distinct_pairs, in_order, same_scales, subtract_zeros
from xpuquant.values import frozen

WORD_ZERO = 8
"""The zero point of every stored nibble of a weight that has none of its own."""


@frozen
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


@frozen
class PackedColumns(ABC):
    """Rows `[n, K]` of 4-bit integers as they lie in a file that has them by columns: compared in place, which is twice
    as fast as made upright first. n is even, and K a multiple of 16.

    words   uint32; its rows may lie apart
    zeros   as in `Packed`, and so are `scale`, `row` and `col`
    """

    words: Array
    zeros: Array | None
    scale: Array
    row: Array
    col: Array

    @abstractmethod
    def holds(self, codes: Array) -> bool:
        """Whether these are the codes of `Packed` rows."""

    @abstractmethod
    def upright_words(self) -> Array:
        """uint32 `[n, K/8]`: nibble j of word i is column 8i+j."""

    def upright(self) -> Packed:
        """The same by rows."""
        return Packed("int", word_octets(self.upright_words()), self.zeros, self.scale, self.row, self.col)


@frozen
class WordColumns(PackedColumns):
    """Words `[K/8, n]`: nibble j of word `[i, r]` is column 8i+j of row r."""

    def holds(self, codes: Array) -> bool:
        from xpuquant.formats.packing.compare_loops import equal_upright

        return bool(equal_upright(self.words.view(np.uint64), codes.view(np.uint64)))

    def upright_words(self) -> Array:
        return in_order(self.words.T)


@frozen
class FieldColumns(PackedColumns):
    """Words `[K, n/8]`: nibble i of word `[k, w]` is column k of row `8w + places[i]`. n is a multiple of 16."""

    places: tuple[int, ...]

    def holds(self, codes: Array) -> bool:
        from xpuquant.formats.packing.compare_loops import equal_fields

        return equal_fields(self.words, np.array(self.places), codes.view(np.uint32))

    def upright_words(self) -> Array:
        from xpuquant.formats.packing.verify_loops import upright_fields

        K, width = self.words.shape
        out = np.empty((NIBBLES_PER_WORD * width, K // NIBBLES_PER_WORD), np.uint32)
        upright_fields(self.words, np.array(self.places), out)
        return out


@frozen
class StreamColumns(PackedColumns):
    """Words `[K * bits / 32, n]`: column r is the bit stream of row r, of 2 or 3 bits. A code is that of the stream and
    what is added to its group.

    added      uint8 `[n, G]`
    per_added  columns that one of them is added to, a multiple of 8
    """

    bits: int
    added: Array
    per_added: int

    def holds(self, codes: Array) -> bool:
        from xpuquant.formats.packing.compare_loops import equal_stream

        per_word = self.per_added // NIBBLES_PER_WORD
        return equal_stream(self.words, self.bits, self.added.T, per_word, codes.view(np.uint32))

    def upright_words(self) -> Array:
        from xpuquant.formats.packing.verify_loops import spread_stream

        out = np.empty((self.words.shape[1], len(self.col) // NIBBLES_PER_WORD), np.uint32)
        spread_stream(self.words.T, self.bits, self.added, self.per_added // NIBBLES_PER_WORD, out)
        return out


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
    from xpuquant.formats.packing.compare_loops import equal_bytes

    if a.number != b.number or a.codes.shape != b.codes.shape or not equal_bytes(a.codes, b.codes):
        return False
    return _same_zeros(a, b) and same_scales(a, b)


def _same_columns(a: PackedColumns, b: Packed) -> bool:
    if b.number != "int" or (len(b.codes), b.K) != (len(a.row), len(a.col)):
        return False
    return a.holds(b.codes) and _same_zeros(a, b) and same_scales(a, b)


def _same_zeros(a: Packed | PackedColumns, b: Packed) -> bool:
    if a.zeros is None or b.zeros is None:
        return all(side.zeros is None or bool((side.zeros == WORD_ZERO).all()) for side in (a, b))
    ours, theirs = distinct_pairs(a.col, b.col)
    return bool((a.zeros[:, ours] == b.zeros[:, theirs]).all())
