"""What makes the bytes of an 8-bit weight that is stored as two planes of nibbles: see `xpu/int8_linear.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from xpuquant.errors import Argument, UnsupportedError
from xpuquant.formats.checkpoint import Array
from xpuquant.formats.dtypes import numpy_dtype
from xpuquant.formats.layouts.base import Filler, OutTensor, Piece
from xpuquant.formats.layouts.fillers import OctetRows
from xpuquant.formats.packing.plain import NIBBLES_PER_WORD, pack_nibbles
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import CACHED_CODES, ROWS_MULTIPLE, Arrays, row_blocks
from xpuquant.formats.weights.integers import OCTET_ZERO, IntWeight, Regrouping
from xpuquant.values import frozen

HIGH = 16
"""What one step of the high nibble counts."""

LARGER = (Argument("scale_dtype", "bfloat16"), " or float32")
"""Where all that float16 cannot hold fits."""


def _by_turns(high: Array, low: Array) -> Array:
    """`[2G, ...]`: rows of two `[G, ...]` arrays by turns."""
    return np.stack([high, low], axis=1).reshape(-1, *high.shape[1:])


@frozen
class FillPlanes(OctetRows):
    """`[stop - start, 2K/8]` u4 words of rows `start:stop`: of each group the high nibbles, then the low ones."""

    size: int

    def fill(self, arrays: Arrays, out: Array) -> None:
        octets = np.empty((self.stop - self.start, self.weight.K), np.uint8)
        self.weight.octets(self.start, self.stop).build(arrays, octets)
        words = out.view(np.uint32).reshape(len(octets), -1, 2, self.size // NIBBLES_PER_WORD)
        for first, last in row_blocks(len(octets), self.weight.K, limit=CACHED_CODES):
            for plane, nibbles in enumerate((octets[first:last] >> 4, octets[first:last] & 15)):
                packed = pack_nibbles(nibbles)
                words[first:last, :, plane] = packed.reshape(len(packed), -1, words.shape[3])


def plane_pieces(weight: IntWeight, size: int) -> tuple[Piece, ...]:
    """`[N, 2K/8]` words of a whole weight, in blocks of rows."""
    blocks = row_blocks(weight.N, weight.K, ROWS_MULTIPLE)
    return tuple(FillPlanes(weight, start, stop, size).piece() for start, stop in blocks)


@frozen
class FillPlaneScales(Filler):
    """`[2K/g, N]` scales cast to `dtype`: of each group 16 times the scale, then the scale."""

    weight: IntWeight
    groups: Regrouping
    dtype: str

    def overflow(self, arrays: Arrays) -> str | None:
        """Why the planes cannot be scaled in the dtype: 16 times a scale is too large for it; None where it is not."""
        low, high = self._scales(arrays)
        if not (np.isfinite(low.astype(np.float32)) & ~np.isfinite(high.astype(np.float32))).any():
            return None
        return (
            f"{HIGH} times its largest scale is beyond {low.dtype.name}, in which the two planes of an 8-bit weight "
            "are scaled"
        )

    def _scales(self, arrays: Arrays) -> tuple[Array, Array]:
        low = self.groups.rows(self.weight.scales().build(arrays)).astype(numpy_dtype(self.dtype))
        with np.errstate(over="ignore"):
            return low, low * low.dtype.type(HIGH)

    def fill(self, arrays: Arrays, out: Array) -> None:
        """Raises UnsupportedError where 16 times a scale is too large for the dtype. The plan says so before, of scales
        that it can look at."""
        if (reason := self.overflow(arrays)) is not None:
            raise UnsupportedError(f"{self.weight.name}: {reason}; convert it with ", *LARGER)
        low, high = self._scales(arrays)
        scales = _by_turns(high, low)
        out.view(scales.dtype).reshape(scales.shape)[...] = scales

    def piece(self) -> Piece:
        count = 2 * self.weight.N * (self.weight.K // self.groups.size)
        return Piece(self.weight.scales().inputs, count * numpy_dtype(self.dtype).itemsize, self)


@frozen
class FillPlaneZeros(Filler):
    """`[2K/g, N/8]` words, packed along N: of each group the high nibbles of the true zero points, then the low ones;
    8 and 0 where the zero point is 128."""

    weight: IntWeight
    groups: Regrouping

    def fill(self, arrays: Arrays, out: Array) -> None:
        shape = (self.weight.K // self.groups.size, self.weight.N)
        zeros = np.full(shape, OCTET_ZERO, np.uint8)
        if self.weight.has_octet_zeros:
            zeros = self.groups.rows(self.weight.zeros(0, self.weight.N).build(arrays))
        words = pack_nibbles(_by_turns(zeros >> 4, zeros & 15))
        out.view(np.uint32).reshape(words.shape)[...] = words

    def piece(self) -> Piece:
        inputs = self.weight.zeros(0, self.weight.N).inputs if self.weight.has_octet_zeros else ()
        return Piece(inputs, self.weight.N * (self.weight.K // self.groups.size), self)


def overflow_of(tensors: Iterable[OutTensor], peek: Callable[[Tensor], Array | None]) -> str | None:
    """Why the scales of a module in two planes do not fit float16, by their values; None where they do, where they are
    of another dtype, and where `peek` does not show them."""
    for tensor in tensors:
        for piece in tensor.pieces:
            if not isinstance(piece.filler, FillPlaneScales) or piece.filler.dtype != "F16":
                continue
            shown = [peek(box.tensor) for box in piece.inputs]
            arrays = [box.of(values) for box, values in zip(piece.inputs, shown, strict=True) if values is not None]
            if len(arrays) == len(shown) and (reason := piece.filler.overflow(tuple(arrays))) is not None:
                return reason
    return None
