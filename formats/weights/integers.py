"""Integer weights in normal form: GPTQ, AWQ, AutoRound, compressed-tensors.

Codes have one scale per group of columns. A kernel's groups are equally long runs of stored columns. The source may
have one group for the whole row, a short last group, or (act-order) groups gathered by a permutation. All of them are
runs of columns that share a scale, so any common divisor of the run lengths is an exact group size: scale rows are
repeated, never changed.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import field
from functools import cache

import numpy as np

from xpuquant.formats.checkpoint import Array
from xpuquant.formats.packing.plain import NIBBLE_ONES, NIBBLES_PER_WORD, unpack_nibbles
from xpuquant.formats.weights.base import (
    ROWS_MULTIPLE,
    ArrayRecipe,
    Arrays,
    FillRecipe,
    Recipe,
    Weight,
    all_inputs,
    deal,
)
from xpuquant.formats.weights.decoded import each_row, even_groups, in_order
from xpuquant.formats.weights.packed import WORD_ZERO, Packed, PackedColumns, StreamColumns, WordColumns, word_octets
from xpuquant.values import frozen

GROUP_MULTIPLE = 32
"""oneDNN's int4 matmul as vllm-xpu-kernels calls it (`XPUwNa16LinearKernel.can_implement`): g % 32 == 0."""

OCTET_ZERO = 128
"""Zero point of u8 octets that have no zero points of their own."""

SPREADABLE = (2, 3)
"""Widths narrower than a nibble whose dense streams are widened to nibbles to be compared."""


@frozen(kw_only=True)
class IntWeight(Weight):
    """Integer codes with one scale per group of columns.

    bits        width of a stored code
    group_size  columns of one group in the source; K for channel-wise. The last group may be short.
    symmetric   every zero point is 2^(bits-1), whatever the config says
    groups_of   real act-order: `[K]` group of each source column; None where columns are in order
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: str
    groups_of: Array | None = field(default=None, compare=False)

    @property
    def groups(self) -> int:
        """Number of groups, G = ceil(K / group_size)."""
        return -(-self.K // self.group_size)

    @property
    def order(self) -> Array | None:
        """Real act-order: `[K]` source column of each stored column, groups contiguous; None otherwise.

        Derived each time: a plan holds the groups of a hundred thousand matrices, as small integers.
        """
        return None if self.groups_of is None else np.argsort(self.groups_of, kind="stable")

    @property
    def act_order(self) -> bool:
        """Whether the activations must be permuted to meet the stored columns."""
        return self.groups_of is not None

    @property
    def kind(self) -> str:
        size = "channel" if self.group_size == self.K else f"g{self.group_size}"
        order = " act-order" if self.act_order else ""
        return f"int{self.bits} {size} {'symmetric' if self.symmetric else 'asymmetric'}{order}"

    @property
    def widened(self) -> bool:
        """Fewer than 4 bits: the words hold q - z + 8, so the output is symmetric whatever z was."""
        return self.bits < 4

    @property
    def has_zero_points(self) -> bool:
        """Whether the words need zero points beside them; otherwise each is 8."""
        return not self.symmetric and not self.widened

    @property
    def has_octet_zeros(self) -> bool:
        """Whether the octets need zero points beside them; otherwise each is 128. q - z of fewer bits fits a byte."""
        return not self.symmetric and self.bits == 8

    @property
    def verbatim(self) -> bool:
        """The single input of `words` already is the words, so its bytes can be copied."""
        return False

    @abstractmethod
    def words(self, start: int, stop: int) -> FillRecipe:
        """Fills uint32 `[n, K/8]` with u4 codes of rows `start:stop`: nibble j of word i is column 8i+j of the stored
        order (`order` applied). Only for at most 4 bits and K a multiple of 32.

        A value is `nibble - zero`, with zero 8 where symmetric, and where the source has fewer than 4 bits (its codes
        are widened to q - z + 8).
        """

    @abstractmethod
    def octets(self, start: int, stop: int) -> FillRecipe:
        """Fills uint8 `[n, K]` with u8 codes of rows `start:stop` in the stored order, for any width.

        A value is `octet - zero`, with zero 128 unless `has_octet_zeros`: codes of fewer than 8 bits are widened to
        q - z + 128.
        """

    @abstractmethod
    def scales(self) -> ArrayRecipe:
        """`[G, N]` in the source's scale dtype (a view where possible)."""

    @abstractmethod
    def zeros(self, start: int, stop: int) -> ArrayRecipe:
        """uint8 `[G, stop - start]`: the true zero points of these rows. Only for asymmetric weights."""


@frozen(kw_only=True)
class SourceInts(IntWeight):
    """An integer weight as a file has it: `words` are its codes, put in stored order and widened to 4 bits."""

    @abstractmethod
    def codes(self, start: int, stop: int) -> FillRecipe:
        """Fills uint32 `[n, K/8]` with the codes of rows `start:stop` as they are, in source order: nibble j of word i
        is column 8i+j. Only for at most 4 bits and K a multiple of 32."""

    def words(self, start: int, stop: int) -> FillRecipe:
        codes, shift = self.codes(start, stop), self._shift(start, stop)
        if shift is None and self.groups_of is None:
            return codes
        recipes = (codes,) if shift is None else (codes, shift)

        def fill(arrays: Arrays, out: Array) -> None:
            from xpuquant.formats.packing.convert_loops import add_by_column, permute_nibbles

            for_codes, *for_shift = deal(recipes, arrays)
            codes.build(for_codes, out)
            order = self.order
            if order is not None:
                permute_nibbles(out, order)
            if shift is not None:
                add_by_column(out, shift.build(*for_shift), self._word_groups(order))

        return Recipe(all_inputs(recipes), fill)

    def wide_codes(self, start: int, stop: int) -> FillRecipe:
        """Fills uint8 `[n, K]` with the codes of rows `start:stop` as they are, in source order. Only for more than 4
        bits."""
        raise NotImplementedError(f"{self.format} has no codes of {self.bits} bits")

    def octets(self, start: int, stop: int) -> FillRecipe:
        zeros = None if self.symmetric or self.bits == 8 else self.zeros(start, stop)
        codes = self.wide_codes(start, stop) if self.bits > 4 else self.codes(start, stop)
        recipes = (codes,) if zeros is None else (codes, zeros)

        def fill(arrays: Arrays, out: Array) -> None:
            for_codes, *for_zeros = deal(recipes, arrays)
            if self.bits > 4:
                codes.build(for_codes, out)
            else:
                words = np.empty((stop - start, self.K // NIBBLES_PER_WORD), np.uint32)
                codes.build(for_codes, words)
                out[...] = unpack_nibbles(words.view(np.uint8))
            if zeros is not None:
                # A zero point of fewer than 8 bits is below 128, so nothing wraps around.
                shift = OCTET_ZERO - zeros.build(*for_zeros).T
                out += shift[:, column_groups(self)]
            elif self.bits < 8:
                out += np.uint8(OCTET_ZERO - (1 << (self.bits - 1)))
            if (order := self.order) is not None:
                out[...] = out[:, order]

        return Recipe(all_inputs(recipes), fill)

    def _shift(self, start: int, stop: int) -> ArrayRecipe | None:
        """Words to add to turn q into q - z + 8: `[n, G]`, or `[n, 1]` where symmetric. q + 8 - z fits its nibble, so
        nothing is carried."""
        if not self.widened:
            return None
        if self.symmetric:
            same = NIBBLE_ONES * np.uint32(WORD_ZERO - (1 << (self.bits - 1)))
            return Recipe((), lambda arrays: np.full((stop - start, 1), same))
        zeros = self.zeros(start, stop)
        return Recipe(zeros.inputs, lambda arrays: NIBBLE_ONES * (WORD_ZERO - zeros.build(arrays).T).astype(np.uint32))

    def _word_groups(self, order: Array | None) -> Array:
        """`[K/8]` column of `_shift` for each word of a row. In stored order, groups are whole words."""
        if self.symmetric:
            return np.zeros(self.K // NIBBLES_PER_WORD, np.intp)
        columns = column_groups(self) if order is None else column_groups(self)[order]
        return columns[::NIBBLES_PER_WORD]


def column_groups(weight: IntWeight) -> Array:
    """`[K]` group of each source column."""
    if weight.groups_of is not None:
        return weight.groups_of
    return even_groups(weight.K, weight.group_size)


def words_of_rows(bits: int, start: int, stop: int) -> slice | None:
    """The words that hold a value of `bits` bits for each of rows `start:stop`, packed along the rows; None where the
    first of them lies inside a word."""
    if start % ROWS_MULTIPLE:
        return None
    return slice(start // ROWS_MULTIPLE * bits, -(-stop // ROWS_MULTIPLE) * bits)


@frozen(slots=True)
class Regrouping:
    """How to lay out scale rows for groups of `size` columns.

    size    columns per output group
    source  source group of each output group; None where it is the identity
    """

    size: int
    source: tuple[int, ...] | None

    def rows(self, scales: Array) -> Array:
        """`[K/size, N]` from the source's `[G, N]` (the same array where nothing changes)."""
        return scales if self.source is None else scales[np.array(self.source)]


def source_group_size(claimed: int, K: int, G: int) -> int | None:
    """Columns per group where K columns have G groups: what the config claims if that gives G (the last group may
    be short), else K/G. None where neither does.

    Args:
        claimed: the config's group size; -1, 0 or more than K for one group of K.
    """
    size = claimed if 0 < claimed <= K else K
    if -(-K // size) == G:
        return size
    return K // G if G and K % G == 0 else None


def group_runs(weight: IntWeight) -> list[tuple[int, int]]:
    """(source group, columns) of each run of stored columns that shares a group, in stored order."""
    if weight.groups_of is None:
        full, last = divmod(weight.K, weight.group_size)
        return [(g, weight.group_size) for g in range(full)] + [(full, last)] * (last > 0)
    groups = np.sort(weight.groups_of)
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    lengths = np.diff(np.append(starts, weight.K))
    return [(int(groups[start]), int(length)) for start, length in zip(starts, lengths, strict=True)]


def _run_lengths(weight: IntWeight) -> Iterable[int]:
    """The columns of each run, without repetition where groups are in order: a plan asks this of every matrix."""
    if weight.groups_of is not None:
        return (length for _, length in group_runs(weight))
    full, last = divmod(weight.K, weight.group_size)
    return [weight.group_size] * (full > 0) + [last] * (last > 0)


def common_group_size(weights: Iterable[IntWeight], sizes: Sequence[int] | None = None) -> int | None:
    """The coarsest group size that is exact for every weight, of those a kernel has, or None.

    Args:
        sizes: the sizes the kernel has; None for any multiple of 32.
    """
    common = math.gcd(*(length for weight in weights for length in _run_lengths(weight)))
    if sizes is None:
        return common if common % GROUP_MULTIPLE == 0 else None
    return max((size for size in sizes if common % size == 0), default=None)


def divide_groups(weight: IntWeight, size: int) -> Regrouping:
    """The weight's groups cut into groups of `size` columns, which divides each of them."""
    if weight.groups_of is None and size == weight.group_size and weight.K % size == 0:
        return _as_they_are(size)
    source = [group for group, length in group_runs(weight) for _ in range(length // size)]
    identity = source == list(range(weight.groups))
    return Regrouping(size, None if identity else tuple(source))


@cache
def _as_they_are(size: int) -> Regrouping:
    """The source's own groups: nearly all matrices of a plan have the same."""
    return Regrouping(size, None)


def regroup(weight: IntWeight, sizes: Sequence[int] | None = None) -> Regrouping | None:
    """The coarsest exact grouping a kernel can take, or None. `sizes` as in `common_group_size`."""
    size = common_group_size((weight,), sizes)
    return None if size is None else divide_groups(weight, size)


def packs(weight: IntWeight) -> bool:
    """Whether rows of an integer weight can be shown as `Packed`: columns in order, whole words of them, of one group
    each where zero points are added to the codes."""
    if weight.groups_of is not None or weight.bits > 4 or weight.K % NIBBLES_PER_WORD:
        return False
    return weight.bits == 4 or not (weight.K % GROUP_MULTIPLE or weight.group_size % NIBBLES_PER_WORD)


def packed_ints(weight: IntWeight, codes: Array, zeros: Array | None, scale: Array) -> Packed:
    """Rows of an integer weight from its nibbles `[n, K/2]`, zero points `[n, G]` and scales `[n, G]`."""
    return Packed("int", codes, zeros, scale, each_row(len(codes)), column_groups(weight))


def packed_stream(weight: IntWeight, words: Array, zeros: Array | None, scale: Array) -> Packed:
    """Rows of an integer weight whose codes are a dense bit stream along each row.

    Args:
        words: uint32 `[n, K * bits / 32]`, in any memory order.
        zeros: uint8 `[n, G]` true zero points; None where symmetric.
        scale: `[n, G]`.
    """
    if weight.bits == 4:
        rows = words if words.flags.c_contiguous else in_order(words)
        return packed_ints(weight, word_octets(rows), zeros, scale)
    return _stream_columns(weight, words.T, zeros, scale).upright()


def columns_of_stream(weight: IntWeight, words: Array, zeros: Array | None, scale: Array) -> PackedColumns:
    """The same rows as `packed_stream` as they lie: uint32 `[K * bits / 32, n]`, n even. `packs` and `in_pairs` say of
    which weights."""
    if weight.bits == 4:
        return WordColumns(words, zeros, scale, each_row(words.shape[1]), column_groups(weight))
    return _stream_columns(weight, words, zeros, scale)


def _stream_columns(weight: IntWeight, words: Array, zeros: Array | None, scale: Array) -> StreamColumns:
    n, col = words.shape[1], column_groups(weight)
    if zeros is None:
        zeros = np.full((n, 1), 1 << (weight.bits - 1), np.uint8)
    per_zero = weight.K if zeros.shape[1] == 1 else weight.group_size
    return StreamColumns(words, None, scale, each_row(n), col, weight.bits, WORD_ZERO - zeros, per_zero)


def in_pairs(weight: IntWeight, start: int, stop: int, multiple: int = 2) -> bool:
    """Whether `PackedColumns` can show rows `start:stop`: so many of them and of columns that two words are one
    element.

    Args:
        multiple: rows that lie in two words.
    """
    return not (weight.K % (2 * NIBBLES_PER_WORD) or any(n % multiple for n in (weight.N, start, stop)))
