"""What makes the bytes of the output's tensors: one filler per way in which a tensor differs from its source.

Each names what it fills. A filler is small and holds no data: a plan has a few for every matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from xpuquant.formats.checkpoint import Array, columns
from xpuquant.formats.dtypes import numpy_dtype
from xpuquant.formats.layouts.base import Filler, Piece
from xpuquant.formats.layouts.scales import cast, refuse_lost
from xpuquant.formats.packing.plain import NIBBLES_PER_WORD, SIGN_FLIP, pack_nibbles
from xpuquant.formats.weights.base import CACHED_CODES, ROWS_MULTIPLE, Arrays, Weight, all_inputs, deal, row_blocks
from xpuquant.formats.weights.decoded import to_bf16
from xpuquant.formats.weights.floats import FP8_BLOCK, FloatWeight
from xpuquant.formats.weights.integers import OCTET_ZERO, IntWeight, Regrouping
from xpuquant.formats.weights.packed import WORD_ZERO
from xpuquant.formats.weights.parts import BiasRows, FloatRows
from xpuquant.values import frozen

LINE_BYTES = 64
"""Rows of a transposed stack are columns of the source, and are cut in multiples of a line of the cache."""

# Of integer weights.


@frozen(slots=True)
class FillWords(Filler):
    """`[stop - start, K/8]` u4 words of rows `start:stop`; two's complement nibbles (u4 XOR 8) where `signed`."""

    weight: IntWeight
    start: int
    stop: int
    signed: bool = False

    def fill(self, arrays: Arrays, out: Array) -> None:
        words = out.view(np.uint32).reshape(-1, self.weight.K // NIBBLES_PER_WORD)
        self.weight.words(self.start, self.stop).build(arrays, words)
        if self.signed:
            np.bitwise_xor(words, SIGN_FLIP, out=words)

    def piece(self) -> Piece:
        """The words; a copy where the source has them so."""
        inputs = self.weight.words(self.start, self.stop).inputs
        verbatim = self.weight.verbatim and not self.signed
        return Piece(inputs, (self.stop - self.start) * self.weight.K // 2, None if verbatim else self)

    def cut(self, piece: Piece, limit: int) -> Iterator[Piece]:
        """The rows in blocks. Act-order stays whole: each block would derive the order again."""
        if self.weight.groups_of is not None:
            yield piece
            return
        for first, last in row_blocks(self.stop - self.start, self.weight.K // 2, ROWS_MULTIPLE, limit):
            yield replace(self, start=self.start + first, stop=self.start + last).piece()


def word_pieces(weight: IntWeight, signed: bool = False) -> tuple[Piece, ...]:
    """`[N, K/8]` words of a whole weight, in blocks of rows."""
    blocks = row_blocks(weight.N, weight.K // 2, NIBBLES_PER_WORD)
    return tuple(FillWords(weight, start, stop, signed).piece() for start, stop in blocks)


@frozen(slots=True)
class FillGroupScales(Filler):
    """`[K/g, N]` scales (`[N, K/g]` where `by_row`), regrouped and cast to `dtype`."""

    weight: IntWeight
    groups: Regrouping
    dtype: str
    by_row: bool = False

    def fill(self, arrays: Arrays, out: Array) -> None:
        scales = self.groups.rows(self.weight.scales().build(arrays))
        if self.by_row:
            scales = scales.T
        target = out.view(numpy_dtype(self.dtype)).reshape(scales.shape)
        target[...] = cast(scales, self.dtype, self.weight.scales().inputs[0].tensor.name)

    def piece(self) -> Piece:
        count = self.weight.N * (self.weight.K // self.groups.size)
        return Piece(self.weight.scales().inputs, count * numpy_dtype(self.dtype).itemsize, self)


@frozen
class FillZeroPoints(Filler):
    """`[K/g, ceil(N/8)]` words of true zero points, packed along N (`[ceil(N/8), K/g]` where `by_row`). Those of a
    weight that needs none are 8.

    octets  four to a word instead, of what `IntWeight.octets` gives; those of a weight that needs none are 128
    """

    weight: IntWeight
    groups: Regrouping
    by_row: bool = False
    octets: bool = False

    @property
    def _stored(self) -> bool:
        return self.weight.has_octet_zeros if self.octets else self.weight.has_zero_points

    @property
    def _to_a_word(self) -> int:
        return 4 if self.octets else NIBBLES_PER_WORD

    def fill(self, arrays: Arrays, out: Array) -> None:
        N = self.weight.N
        width = -(-N // self._to_a_word)
        target = out.view(np.uint32).reshape((width, -1) if self.by_row else (-1, width))
        if not self._stored:
            target[...] = OCTET_ZERO * 0x01010101 if self.octets else WORD_ZERO * 0x11111111
            return
        zeros = self.groups.rows(self.weight.zeros(0, N).build(arrays))
        missing = -N % self._to_a_word
        padded = np.pad(zeros, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(zeros)
        words = padded.astype(np.uint8).view(np.uint32) if self.octets else pack_nibbles(padded)
        target[...] = words.T if self.by_row else words

    def piece(self) -> Piece:
        inputs = self.weight.zeros(0, self.weight.N).inputs if self._stored else ()
        words = -(-self.weight.N // self._to_a_word) * (self.weight.K // self.groups.size)
        return Piece(inputs, 4 * words, self)


@frozen
class OctetRows(Filler):
    """A filler of rows `start:stop` whose codes are read as octets, one byte of the piece for each."""

    weight: IntWeight
    start: int
    stop: int

    def piece(self) -> Piece:
        inputs = self.weight.octets(self.start, self.stop).inputs
        return Piece(inputs, (self.stop - self.start) * self.weight.K, self)

    def cut(self, piece: Piece, limit: int) -> Iterator[Piece]:
        """The rows in blocks."""
        for first, last in row_blocks(self.stop - self.start, self.weight.K, ROWS_MULTIPLE, limit):
            yield replace(self, start=self.start + first, stop=self.start + last).piece()


@frozen
class FillOctets(OctetRows):
    """`[stop - start, K]` u8 codes of rows `start:stop`; two's complement (u8 XOR 128) where `signed`."""

    signed: bool

    def fill(self, arrays: Arrays, out: Array) -> None:
        octets = out.reshape(-1, self.weight.K)
        self.weight.octets(self.start, self.stop).build(arrays, octets)
        if self.signed:
            np.bitwise_xor(octets, np.uint8(OCTET_ZERO), out=octets)


def octet_pieces(weight: IntWeight, signed: bool) -> tuple[Piece, ...]:
    """`[N, K]` octets of a whole weight, in blocks of rows."""
    blocks = row_blocks(weight.N, weight.K, ROWS_MULTIPLE)
    return tuple(FillOctets(weight, start, stop, signed).piece() for start, stop in blocks)


@frozen
class FillZeroOctets(Filler):
    """uint8 `[N, K/g]`: true zero points, one to a byte.

    octets  those of `octets`, 128 where it needs none; otherwise those of `words`, 8 where it needs none
    """

    weight: IntWeight
    groups: Regrouping
    octets: bool

    @property
    def _stored(self) -> bool:
        return self.weight.has_octet_zeros if self.octets else self.weight.has_zero_points

    def fill(self, arrays: Arrays, out: Array) -> None:
        target = out.reshape(self.weight.N, -1)
        if self._stored:
            target[...] = self.groups.rows(self.weight.zeros(0, self.weight.N).build(arrays)).T
        else:
            target[...] = OCTET_ZERO if self.octets else WORD_ZERO

    def piece(self) -> Piece:
        inputs = self.weight.zeros(0, self.weight.N).inputs if self._stored else ()
        return Piece(inputs, self.weight.N * (self.weight.K // self.groups.size), self)


@frozen
class FillOrder(Filler):
    """int32 `[K]`: the act-order permutation."""

    weight: IntWeight

    def fill(self, arrays: Arrays, out: Array) -> None:
        order = self.weight.order
        assert order is not None, "only a weight in act-order has a permutation"
        out.view(np.int32)[...] = order


@frozen
class FillShape(Filler):
    """int64 `[2]`: N, K."""

    N: int
    K: int

    def fill(self, arrays: Arrays, out: Array) -> None:
        out.view(np.int64)[...] = self.N, self.K


# Of float weights.


@frozen
class FillUpright(Filler):
    """Rows of codes from a source that stores them as columns, or with other rows between them."""

    weight: FloatWeight

    def fill(self, arrays: Arrays, out: Array) -> None:
        stored = arrays[0].view(np.uint8)
        codes = stored.T if self.weight.transposed else stored
        step = self.weight.stride.step if isinstance(self.weight, FloatRows) else 1
        out.reshape(-1, codes.shape[1])[...] = codes[::step]


def code_pieces(weight: FloatWeight) -> tuple[Piece, ...]:
    """Codes `[N, K]`, two to a byte those of fp4, in blocks of rows; copied where the source has them so."""
    skips = isinstance(weight, FloatRows) and weight.stride.step > 1
    filler = FillUpright(weight) if weight.transposed or skips else None
    width = weight.K // 2 if weight.element == "e2m1" else weight.K
    return tuple(
        Piece((weight.code_rows(start, stop),), (stop - start) * width, filler)
        for start, stop in row_blocks(weight.N, width)
    )


@frozen
class FillScales(Filler):
    """The scales as they lie in the source, cast to `dtype`."""

    weight: FloatWeight
    dtype: str

    def fill(self, arrays: Arrays, out: Array) -> None:
        recipe = self.weight.scales(0, self.weight.N)
        scales = recipe.build(arrays)
        target = out.view(numpy_dtype(self.dtype)).reshape(scales.shape)
        target[...] = cast(scales, self.dtype, recipe.inputs[0].tensor.name)

    def piece(self) -> Piece:
        rows, columns = self.weight.block
        count = -(-self.weight.N // rows) * -(-self.weight.K // columns)
        return Piece(self.weight.scales(0, self.weight.N).inputs, count * numpy_dtype(self.dtype).itemsize, self)


@frozen
class FillBlockScales(Filler):
    """`[K / column_step, N / row_step]` scales of one weight, `[N / row_step, K / column_step]` where `by_row`.

    dtype  label of a float (every source dtype widens to `F32` exactly), or `U8` for exponents
    """

    weight: FloatWeight
    row_step: int
    column_step: int
    dtype: str
    by_row: bool = False

    def fill(self, arrays: Arrays, out: Array) -> None:
        scales = self.weight.scales(0, self.weight.N).build(arrays)
        spread = self.weight.spread(scales, self.row_step, self.column_step)
        values = (
            np.ascontiguousarray(spread).view(np.uint8)
            if self.dtype == "U8"
            else cast(spread.astype(np.float32), self.dtype, self.weight.scale.name)
        )
        target = values if self.by_row else values.T
        out.view(numpy_dtype(self.dtype)).reshape(target.shape)[...] = target

    def piece(self) -> Piece:
        count = (self.weight.N // self.row_step) * (self.weight.K // self.column_step)
        inputs = self.weight.scales(0, self.weight.N).inputs
        return Piece(inputs, count * numpy_dtype(self.dtype).itemsize, None if self._verbatim else self)

    @property
    def _verbatim(self) -> bool:
        """Whether the source's exponents lie just so."""
        same = (
            self.by_row and self.weight.block == (self.row_step, self.column_step) and type(self.weight) is FloatWeight
        )
        return self.dtype == "U8" and same and not self.weight.exponent_shift and not self.weight.transposed


@frozen
class FillExpertScales(Filler):
    """The float32 scales of one expert: one number, or `[K/128, N/128]` where `blocks`, of matrices that lie side by
    side."""

    members: tuple[FloatWeight, ...]
    blocks: bool

    def fill(self, arrays: Arrays, out: Array) -> None:
        recipes = [weight.scales(0, weight.N) for weight in self.members]
        tables = [recipe.build(mine) for recipe, mine in zip(recipes, deal(recipes, arrays), strict=True)]
        target = out.view(np.float32)
        if not self.blocks:
            target[...] = tables[0].astype(np.float32).reshape(1)
            return
        both = zip(self.members, tables, strict=True)
        # As float32 first: there is no dtype that exponents and bfloat16 have in common.
        parts = [weight.spread(table.astype(np.float32), FP8_BLOCK, FP8_BLOCK) for weight, table in both]
        scales = np.concatenate(parts)
        target.reshape(scales.T.shape)[...] = scales.T

    def piece(self) -> Piece:
        inputs = all_inputs([weight.scales(0, weight.N) for weight in self.members])
        codes = sum(weight.N * weight.K for weight in self.members)
        return Piece(inputs, 4 * (codes // FP8_BLOCK**2 if self.blocks else 1), self)


@frozen
class FillSideBySide(Filler):
    """Rows `[n, N]` of a transposed stack: the columns of each matrix after those of the one before, or alternating.

    widths     N of each matrix
    alternate  columns of the two matrices alternate
    """

    widths: tuple[int, ...]
    alternate: bool

    def fill(self, arrays: Arrays, out: Array) -> None:
        from xpuquant.formats.packing.convert_loops import transpose_bytes

        target = out.reshape(-1, sum(self.widths))
        left = 0
        for i, (array, width) in enumerate(zip(arrays, self.widths, strict=True)):
            place = target[:, i::2] if self.alternate else target[:, left : left + width]
            transpose_bytes(array.view(np.uint8), place)
            left += width

    def cut(self, piece: Piece, limit: int) -> Iterator[Piece]:
        """Rows of the output, which are columns of every input."""
        total = sum(self.widths)
        for first, last in row_blocks(piece.nbytes // total, total, LINE_BYTES, limit):
            inputs = tuple(columns(part.tensor, part.start + first, part.start + last) for part in piece.inputs)
            yield Piece(inputs, (last - first) * total, self)


# Of any.


@frozen
class FillInterleaved(Filler):
    """Rows of two pieces by turns: the first of `even`, the first of `odd`, the second of `even`, ..."""

    even: Piece
    odd: Piece
    rows: int

    def fill(self, arrays: Arrays, out: Array) -> None:
        pairs = out.reshape(self.rows, 2, -1)
        at = len(self.even.inputs)
        for side, (piece, mine) in enumerate(((self.even, arrays[:at]), (self.odd, arrays[at:]))):
            half = np.empty(piece.nbytes, np.uint8)
            piece.fill(mine, half)
            pairs[:, side] = half.reshape(self.rows, -1)

    def piece(self) -> Piece:
        return Piece(self.even.inputs + self.odd.inputs, self.even.nbytes + self.odd.nbytes, self)


@frozen
class FillCast(Filler):
    """The one input, cast to `dtype` (a safetensors label)."""

    dtype: str

    def fill(self, arrays: Arrays, out: Array) -> None:
        target = out.view(numpy_dtype(self.dtype))
        target[...] = arrays[0].reshape(target.shape)


@frozen
class FillBias(Filler):
    """A bias taken out of a fused one."""

    bias: BiasRows

    def fill(self, arrays: Arrays, out: Array) -> None:
        values = self.bias.values().build(arrays)
        out.view(values.dtype)[...] = values


@frozen
class FillDequantized(Filler):
    """Rows `start:stop` as bf16, rounded once: `[n, K]`, or `[K, n]` where `upended`."""

    weight: Weight
    start: int
    stop: int
    upended: bool = False

    def fill(self, arrays: Arrays, out: Array) -> None:
        target = out.view(numpy_dtype("BF16"))
        rows = target.reshape(self.weight.K, -1).T if self.upended else target.reshape(-1, self.weight.K)
        whole = self.weight.decoded(self.start, self.stop)
        for start, stop in row_blocks(self.stop - self.start, self.weight.K, ROWS_MULTIPLE, 4 * CACHED_CODES):
            recipe = self.weight.decoded(self.start + start, self.start + stop)
            parts = zip(recipe.inputs, whole.inputs, arrays, strict=True)
            values = recipe.build([part.inside(of, array) for part, of, array in parts]).values()
            rounded = to_bf16(values)
            where = f"{self.weight.name}.weight, rows {self.start + start}:{self.start + stop}"
            refuse_lost(values, rounded, where, "values", "no kernel takes it, and it cannot be dequantized")
            rows[start:stop] = rounded

    def piece(self) -> Piece:
        nbytes = (self.stop - self.start) * self.weight.K * 2
        return Piece(self.weight.decoded(self.start, self.stop).inputs, nbytes, self)
