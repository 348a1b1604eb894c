"""What makes the bytes of NVFP4 weights: see `xpu/nvfp4_linear.py` and `xpu/nvfp4_experts.py`.

Codes are stored as twice their value, an integer, and scales as half of theirs. Scales take a power of two of the
global scale with them besides: what is left of it is near 1, so that a kernel's sums, which it is applied to
afterwards, are about as large as the outputs. Unscaled they are thousands of times larger, which float16 does not hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from xpuquant.formats.checkpoint import Array, whole
from xpuquant.formats.dtypes import numpy_dtype
from xpuquant.formats.layouts.base import Filler, Piece
from xpuquant.formats.weights.base import Arrays, row_blocks
from xpuquant.formats.weights.nvfp4 import GROUP, Nvfp4Weight
from xpuquant.values import frozen

_FARTHEST = 100
"""Largest power of two, up or down, that goes into the scales: bfloat16 holds e4m3 times any of them exactly."""

_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""Twice the value of each code."""

_OCTETS = np.arange(256, dtype=np.uint8)
_LOW, _HIGH = _DOUBLED[_OCTETS & 15], _DOUBLED[_OCTETS >> 4]
_INTEGERS = np.stack([_LOW, _HIGH], axis=-1).view(np.uint16).reshape(256)
"""Two codes in a byte → two integers, int8 each, the even column first."""


def _nibbles(low: Array, high: Array) -> Array:
    """uint8: signed nibbles as kernels for unsigned ones with a zero point of 8 read them."""
    return (low + 8).astype(np.uint8) | (high + 8).astype(np.uint8) << np.uint8(4)


def _first(doubled: Array) -> Array:
    """The part of an integer that the first plane has: all of it, or half of what no nibble holds."""
    return np.where(np.abs(doubled) < 8, doubled, doubled // 2)


_PLANES = (_nibbles(_first(_LOW), _first(_HIGH)), _nibbles(_LOW - _first(_LOW), _HIGH - _first(_HIGH)))
"""Two codes in a byte → two nibbles of the first plane, and of the second."""


def power_of_two(number: float, divides: bool) -> int:
    """The power of two, as its exponent, that goes out of a global scale into the scales.

    What is left makes outputs larger than the kernel's sums: a factor of 1 to 2, or a divisor of 1/2 to 1.
    """
    if not np.isfinite(number) or number == 0:
        return 0
    exponent = int(np.frexp(number)[1]) - (not divides)
    return max(-_FARTHEST, min(_FARTHEST, exponent))


def _number(array: Array) -> float:
    return float(array.reshape(()))


@frozen
class Nvfp4Rows(Filler):
    """A filler of rows `start:stop`, a byte of the piece for each code."""

    weight: Nvfp4Weight
    start: int
    stop: int

    def octets(self, arrays: Arrays) -> Array:
        """uint8 `[stop - start, K/2]`."""
        return np.ascontiguousarray(arrays[0].T) if self.weight.transposed else arrays[0]

    def piece(self) -> Piece:
        return Piece((self.weight.code_rows(self.start, self.stop),), (self.stop - self.start) * self.weight.K, self)

    def cut(self, piece: Piece, limit: int) -> Iterator[Piece]:
        """The rows in blocks."""
        for first, last in row_blocks(self.stop - self.start, self.weight.K, limit=limit):
            yield replace(self, start=self.start + first, stop=self.start + last).piece()


@frozen
class FillIntegers(Nvfp4Rows):
    """int8 `[stop - start, K]`: twice the value of each code."""

    def fill(self, arrays: Arrays, out: Array) -> None:
        from xpuquant.formats.packing.convert_loops import look_up

        look_up(self.octets(arrays).reshape(-1), _INTEGERS, out.view(np.uint16))


@frozen
class FillSums(Nvfp4Rows):
    """`[stop - start, 2K/8]` u4 words: of each group the nibbles of one plane, then those of the other, whose sum less
    16 is twice the value of a code."""

    def fill(self, arrays: Arrays, out: Array) -> None:
        from xpuquant.formats.packing.convert_loops import look_up_planes

        codes = self.octets(arrays).reshape(-1, GROUP // 2)
        look_up_planes(codes, *_PLANES, out.reshape(len(codes), 2, GROUP // 2))


def row_pieces(kind: type[Nvfp4Rows], weight: Nvfp4Weight) -> tuple[Piece, ...]:
    """The rows of a whole weight, in blocks."""
    return tuple(kind(weight, start, stop).piece() for start, stop in row_blocks(weight.N, weight.K))


@frozen
class FillHalvedScales(Filler):
    """BF16 `[K/16, N]` scales (`[N, K/16]` where `by_row`): half of the source's, times the power of two."""

    weight: Nvfp4Weight
    by_row: bool = False

    def fill(self, arrays: Arrays, out: Array) -> None:
        scales, number = arrays
        exponent = power_of_two(_number(number), self.weight.divides)
        exponent = -exponent if self.weight.divides else exponent
        # One of 256 numbers each: what it becomes is looked up.
        every = _OCTETS.view(scales.dtype).astype(np.float64)
        table = np.ldexp(every, exponent - 1).astype(numpy_dtype("BF16"))
        octets = scales.view(np.uint8)
        found = table[octets if self.by_row != self.weight.transposed else octets.T]
        out.view(table.dtype).reshape(found.shape)[...] = found

    def piece(self) -> Piece:
        inputs = (*self.weight.scales(0, self.weight.N).inputs, whole(self.weight.global_scale))
        return Piece(inputs, 2 * self.weight.N * (self.weight.K // GROUP), self)


@frozen
class FillGlobalScales(Filler):
    """F32, a number for each of some matrices: what their global scales are without the power of two."""

    weights: tuple[Nvfp4Weight, ...]

    def fill(self, arrays: Arrays, out: Array) -> None:
        numbers = [_number(array) for array in arrays]
        out.view(np.float32)[...] = [
            np.ldexp(number, -power_of_two(number, weight.divides))
            for number, weight in zip(numbers, self.weights, strict=True)
        ]

    def piece(self) -> Piece:
        return Piece(tuple(whole(weight.global_scale) for weight in self.weights), 4 * len(self.weights), self)
