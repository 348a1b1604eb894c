"""One quantized matrix of a source checkpoint in normal form: what a reader yields, what a layout takes.

A `Weight` holds no data. It names the source slices each part needs and turns their arrays into the normal form,
so that the plan knows every byte that will be read before one is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from xpuquant.formats.checkpoint import Slice
from xpuquant.formats.packing.plain import NIBBLE_ONES, NIBBLES_PER_WORD
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.decoded import Decoded, even_groups

Array = np.ndarray[Any, Any]

PIECE_BYTES = 32 << 20
"""Output bytes whose inputs are read at once. Bounds the memory of a conversion (a piece or two per worker); large
enough that most matrices of a `[K/8, N]` source are read in one run, and the columns of others in runs of kilobytes."""

ROWS_MULTIPLE = 32
"""Rows of a block, but the last of a matrix: 32 zero points of any width are whole words."""

CACHED_CODES = 1 << 18
"""Codes unpacked to bytes at once, where there is no direct path: a few such arrays fit the second-level cache."""


def row_blocks(N: int, row_bytes: int, multiple: int = 1, limit: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """Cut N rows into blocks of about `limit` bytes at most, each a multiple of `multiple` rows but the last."""
    step = max(multiple, limit // max(row_bytes, 1) // multiple * multiple)
    for start in range(0, N, step):
        yield start, min(start + step, N)


def words_of_rows(bits: int, start: int, stop: int) -> slice | None:
    """The words that hold a value of `bits` bits for each of rows `start:stop`, packed along the rows; None where the
    first of them lies inside a word."""
    if start % ROWS_MULTIPLE:
        return None
    return slice(start // ROWS_MULTIPLE * bits, -(-stop // ROWS_MULTIPLE) * bits)


@dataclass(frozen=True, kw_only=True)
class Weight(ABC):
    """A quantized `[N, K]` matrix of the source.

    name     module name, without the tensor suffix (`model.layers.0.mlp.down_proj`)
    format   the reader's name, for reports
    tensors  every source tensor that belongs to the matrix and is used up by converting it
    bias     the matrix's slice of a stacked bias tensor (gpt-oss); ordinary biases are `name.bias`
    facts    what was decided and from what, for the report (`zero points: minus one (v1), from the words`)
    """

    name: str
    format: str
    N: int
    K: int
    tensors: tuple[Tensor, ...]
    facts: tuple[str, ...] = ()
    bias: Slice | None = None

    number: ClassVar[str]
    """What an element is: see `Decoded.number`."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """Short description for tables: `int4 g64 asymmetric`."""

    @abstractmethod
    def decode_inputs(self, start: int, stop: int) -> tuple[Slice, ...]:
        """Slices that `decode` needs for rows `start:stop`."""

    @abstractmethod
    def decode(self, arrays: Sequence[Array], start: int, stop: int) -> Decoded:
        """Rows `start:stop` from the arrays of `decode_inputs(start, stop)`, by the plain definition of the
        format (not the conversion's fast path)."""


@dataclass(frozen=True, kw_only=True)
class IntWeight(Weight):
    """Integer codes with one scale per group of columns: GPTQ, AWQ, AutoRound, compressed-tensors.

    bits        width of a stored code
    group_size  columns of one group in the source; K for channel-wise. The last group may be short.
    symmetric   every zero point is 2^(bits-1), whatever the config says
    groups_of   real act-order: `[K]` group of each source column; None where columns are in order
    folded      the act-order is met by the layers before, whose rows stand in stored order (`fold_act_order.py`)
    rows        `[N]` source row of each stored row, for such a layer before; None where rows are in order
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: str
    groups_of: Array | None = field(default=None, compare=False)
    folded: bool = False
    rows: Array | None = field(default=None, compare=False)

    number: ClassVar[str] = "int"

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
        return self.groups_of is not None and not self.folded

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
    def verbatim(self) -> bool:
        """The single input of `words` already is the words, so its bytes can be copied."""
        return False

    @abstractmethod
    def code_inputs(self, start: int, stop: int) -> tuple[Slice, ...]:
        """Slices that `code_words` needs for rows `start:stop`."""

    @abstractmethod
    def code_words(self, arrays: Sequence[Array], out: Array) -> None:
        """Fill `out`, uint32 `[n, K/8]`, with the codes as they are, in source order: nibble j of word i is
        column 8i+j. Only called for at most 4 bits and K a multiple of 32."""

    def word_inputs(self, start: int, stop: int) -> tuple[Slice, ...]:
        """Slices that `words` needs for rows `start:stop`."""
        inputs = self.code_inputs(start, stop)
        return (*inputs, *self.zero_inputs()) if self.widened and not self.symmetric else inputs

    def words(self, arrays: Sequence[Array], out: Array, start: int) -> None:
        """Fill `out`, uint32 `[n, K/8]`, with u4 codes of rows `start:start+n`, from the arrays of
        `word_inputs(start, start+n)`: nibble j of word i is column 8i+j of the stored order (`order` applied).

        A value is `nibble - zero`, with zero 8 where symmetric, and where the source has fewer than 4 bits
        (its codes are widened to q - z + 8).
        """
        self.code_words(arrays, out)
        order = self.order
        if order is None and not self.widened:
            return
        from xpuquant.formats.packing.convert_loops import add_by_column, permute_nibbles

        lift = self._lift(arrays, order, start, len(out))
        if order is not None:
            permute_nibbles(out, order)
        if lift is not None:
            add_by_column(out, *lift)

    def _lift(self, arrays: Sequence[Array], order: Array | None, start: int, rows: int) -> tuple[Array, Array] | None:
        """What turns q into q - z + 8: words to add, `[n, G]`, and the group of each word of a row.

        Groups are whole words once columns are in stored order, and q + 8 - z fits its nibble: no carry.
        """
        if not self.widened:
            return None
        if self.symmetric:
            shift = NIBBLE_ONES * np.uint32(8 - (1 << (self.bits - 1)))
            return np.full((rows, 1), shift), np.zeros(self.K // NIBBLES_PER_WORD, np.intp)
        inputs = len(self.code_inputs(start, start + rows))
        zeros = self.zeros(arrays[inputs:], start, start + rows).T
        columns = column_groups(self) if order is None else column_groups(self)[order]
        return NIBBLE_ONES * (8 - zeros).astype(np.uint32), columns[::NIBBLES_PER_WORD]

    @abstractmethod
    def scale_inputs(self) -> tuple[Slice, ...]:
        """Slices that `scales` needs."""

    @abstractmethod
    def scales(self, arrays: Sequence[Array]) -> Array:
        """`[G, N]` in the source's scale dtype (a view where possible)."""

    @abstractmethod
    def zero_inputs(self) -> tuple[Slice, ...]:
        """Slices that `zeros` needs. Only called where asymmetric."""

    @abstractmethod
    def zeros(self, arrays: Sequence[Array], start: int, stop: int) -> Array:
        """uint8 `[G, stop - start]`: the true zero points of these rows, from the arrays of `zero_inputs`. Only called
        where asymmetric."""


def column_groups(weight: IntWeight) -> Array:
    """`[K]` group of each source column."""
    if weight.groups_of is not None:
        return weight.groups_of
    return even_groups(weight.K, weight.group_size)
