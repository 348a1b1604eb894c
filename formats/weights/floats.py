"""Scaled float weights in normal form: FP8, MXFP4, MXFP8 and their kin.

A weight is a table of codes (fp8 bytes, or E2M1 nibbles) and a coarser table of multipliers, each of which covers a
block of rows and columns. Per-tensor, per-channel, 128 x 128 blocks and MX groups of 32 columns differ in the size of
that block alone.
"""

from __future__ import annotations

import math

import numpy as np

from xpuquant.formats.checkpoint import Array, Slice, columns, rows, whole
from xpuquant.formats.dtypes import nbytes
from xpuquant.formats.packing.plain import unpack_nibbles
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import ArrayRecipe, Arrays, DecodedRecipe, Recipe, RowsRecipe, Weight
from xpuquant.formats.weights.decoded import Decoded, each_row, even_groups
from xpuquant.formats.weights.packed import Packed
from xpuquant.values import frozen

ELEMENTS = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
"""safetensors label → `FloatWeight.element` of the fp8 types that kernels take."""

E8M0 = "F8_E8M0"
"""Label under which exponent bytes are read, whatever the file calls them (most call them U8)."""

MX_GROUP = 32
"""Columns that share one exponent (OCP Microscaling Formats v1.0, section 5.2)."""

FP8_BLOCK = 128
"""Columns per block of the XPU fp8 kernels; rows, where N allows."""


def view(tensor: Tensor, dtype: str, shape: tuple[int, ...], index: int = 0) -> Tensor:
    """Run number `index` of a tensor's bytes, as a tensor of its own: one expert of a stack, or the same bytes
    under another dtype or shape. Keeps the name, by which it is known to be used."""
    size = nbytes(dtype, shape)
    begin = tensor.begin + index * size
    return Tensor(tensor.name, dtype, shape, tensor.file, begin, begin + size)


@frozen(kw_only=True)
class FloatWeight(Weight):
    """A matrix of fp8 or fp4 codes with multipliers.

    element      `e4m3`, `e5m2` (a byte each) or `e2m1` (two to a byte, even column in the low nibble)
    granularity  what one scale covers, in the format's words: `tensor`, `channel`, `block`, `group` (MX)
    block        the same in numbers, (rows, columns): (N, K), (1, K), (128, 128), (1, 32)
    codes        `[N, K]`, e2m1 `[N, K/2]`
    scale        `[ceil(N / rows), ceil(K / columns)]`; E8M0 where the scales are exponents
    transposed   `codes` and `scale` are stored the other way round, `[K, N]`
    exponent_shift  to add to every stored exponent, modulo 256 (compressed-tensors 0.13 wrote them 2 too small)
    input_scale  the static scale of the activations, where the checkpoint has one
    scale_value  a per-tensor scale's value, where it was asked for and could be read
    """

    element: str
    granularity: str
    block: tuple[int, int]
    codes: Tensor
    scale: Tensor
    transposed: bool = False
    exponent_shift: int = 0
    input_scale: Tensor | None = None
    scale_value: float | None = None

    @property
    def is_mx(self) -> bool:
        """Scales are exponents, and too fine for the kernels of 128 x 128 blocks."""
        fine = self.granularity == "block" and (self.block[0] % FP8_BLOCK or self.block[1] % FP8_BLOCK)
        exponents = self.scale.dtype == E8M0 and self.block[1] % MX_GROUP == 0
        return self.granularity == "group" or bool(fine and exponents)

    @property
    def kind(self) -> str:
        if self.granularity == "group":
            return "mxfp4" if self.element == "e2m1" else f"mxfp8 {self.element}"
        size = f"{self.block[0]}x{self.block[1]}" if self.granularity == "block" else self.granularity
        return f"fp8 {self.element} {size}"

    @property
    def dtype(self) -> str:
        """safetensors label of the stored codes."""
        return self.codes.dtype

    def code_rows(self, start: int, stop: int) -> Slice:
        """Codes of rows `start:stop`: an array `[n, K]`, or `[K, n]` where transposed."""
        return (columns if self.transposed else rows)(self.codes, start, stop)

    def code_columns(self, start: int, stop: int) -> Slice:
        """Codes of columns `start:stop` of fp8: an array `[N, n]`, or `[n, N]` where transposed."""
        return (rows if self.transposed else columns)(self.codes, start, stop)

    def scales(self, start: int, stop: int) -> ArrayRecipe:
        """`[rows of scales, columns of scales]` that cover rows `start:stop`, in the source's dtype."""
        first, last = start // self.block[0], -(-stop // self.block[0])
        return Recipe(((columns if self.transposed else rows)(self.scale, first, last),), self._table)

    def _rows_of_scales(self, start: int, stop: int) -> Array:
        """Which of the rows of `scales` covers each of rows `start:stop`."""
        if self.block[0] == 1:
            return each_row(stop - start)
        return np.arange(start, stop) // self.block[0] - start // self.block[0]

    def spread(self, scales: Array, row_step: int, column_step: int) -> Array:
        """`[N / row_step, K / column_step]`: the scales of the whole weight, repeated to finer blocks."""
        down = np.arange(0, self.N, row_step) // self.block[0]
        across = np.arange(0, self.K, column_step) // self.block[1]
        return scales[down][:, across]

    def decoded(self, start: int, stop: int) -> DecodedRecipe:
        scales = self.scales(start, stop)

        def build(arrays: Arrays) -> Decoded:
            codes = (arrays[0].T if self.transposed else arrays[0]).view(np.uint8)
            if self.element == "e2m1":
                codes = unpack_nibbles(np.ascontiguousarray(codes))
            row = self._rows_of_scales(start, stop)
            return Decoded(self.element, codes, scales.build(arrays[1:]), row, even_groups(self.K, self.block[1]))

        return Recipe((self.code_rows(start, stop), *scales.inputs), build)

    def as_packed(self, start: int, stop: int) -> RowsRecipe:
        if self.element != "e2m1" or self.transposed:
            return super().as_packed(start, stop)
        scales = self.scales(start, stop)

        def build(arrays: Arrays) -> Packed:
            row = self._rows_of_scales(start, stop)
            codes, col = np.ascontiguousarray(arrays[0]).view(np.uint8), even_groups(self.K, self.block[1])
            return Packed("e2m1", codes, None, scales.build(arrays[1:]), row, col)

        return Recipe((self.code_rows(start, stop), *scales.inputs), build)

    def _table(self, arrays: Arrays) -> Array:
        table = arrays[0].T if self.transposed else arrays[0]
        if not self.exponent_shift:
            return table
        # Bytes wrap, as they did when they were written: the exponent of an all-zero group is 0, stored as 254.
        return (table.view(np.uint8) + np.uint8(self.exponent_shift)).view(table.dtype)


@frozen(kw_only=True)
class FusedWeight(FloatWeight):
    """A fused linear that has one scale for each linear in it: a scale per row, most of them alike.

    parts  rows of each; `scale` is `[len(parts)]`
    """

    parts: tuple[int, ...]

    def scales(self, start: int, stop: int) -> ArrayRecipe:
        part_of = np.repeat(np.arange(len(self.parts)), self.parts)[start:stop]
        return Recipe((whole(self.scale),), lambda arrays: arrays[0].reshape(-1)[part_of][:, None])


def is_upended(weight: Weight) -> bool:
    """Whether the unquantized model has a matrix of a stack as `[K, N]`: as the source does."""
    return isinstance(weight, FloatWeight) and weight.transposed and bool(weight.stack)


def block_rows(weight: FloatWeight) -> int:
    """Rows per block that the kernels can be given: the most that divides N, the source's block and 128.

    A ragged last block of rows becomes several whole ones by repeating scale rows, as vLLM does when it loads
    (`XPUFp8BlockScaledMMKernel`).
    """
    return math.gcd(weight.N, weight.block[0], FP8_BLOCK)
