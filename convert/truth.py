"""What a kernel should compute: float64 products of decoded weights with realistic activations.

Activations are as a transformer has them, rows of unit RMS with a few outlier channels, from a recorded seed. Weights
come from the source, or from the output where the source is gone and digests have shown that it is the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from xpuquant.convert.verdict import CONTRADICTIONS
from xpuquant.formats.decoded import Decoded
from xpuquant.formats.dtypes import numpy_dtype
from xpuquant.formats.layout import Layout, Matrix, Stored
from xpuquant.formats.weight import row_blocks
from xpuquant.kernels import Array, Layer
from xpuquant.kernels.reference import dequantize

SEED = 20240229
LARGEST = float(np.finfo(np.float32).max)
_MISREAD_ROWS = 64
_BLOCK_CODES = 1 << 20
_PLAIN = 1e30
"""A weight this large overflows a kernel whatever its layout."""

_OUTLIER_EVERY = 256
_OUTLIER_GAIN = 20.0

Rows = Callable[[int, int], Decoded]
"""Rows `start:stop` of a matrix, decoded: from the source, or from the output where the source is gone."""


@dataclass(frozen=True)
class Subject:
    """One matrix to compute."""

    stored: Stored
    layout: Layout
    matrix: Matrix
    rows: Rows

    def layer(self, start: int, stop: int) -> Layer:
        arrays = self.layout.layer(self.stored, self.matrix, start, stop)
        return Layer(self.stored.scheme, stop - start, self.matrix.K, arrays)

    def window(self, rows: int) -> tuple[int, int]:
        """About `rows` rows from the middle: stored by eights at the most, and a block of scales cannot be cut."""
        N = self.matrix.N
        step = max(8, self.stored.scheme.block_n)
        if rows >= N:
            return 0, N
        start = (N - rows) // 2 // step * step
        return start, min(N, start + max(rows // step, 1) * step)


def activations(M: int, K: int, seed: int, dtype: str) -> Array:
    """`[M, K]` as a transformer has them: rows of unit RMS, every 256th channel 20 times larger."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((M, K), np.float32)
    x[:, :: min(_OUTLIER_EVERY, K)] *= _OUTLIER_GAIN
    x /= np.sqrt(np.mean(np.square(x), axis=1, keepdims=True))
    return x.astype(numpy_dtype(dtype))


@dataclass(frozen=True)
class Truth:
    """What a kernel is given, and what it should make of it.

    x         activations `[M, K]`
    wanted    float64 `[M, n]`
    overflow  a sum on the way can exceed float32, in which kernels add up: infinity, or the NaN of two of them, is
              then no error of theirs
    """

    layer: Layer
    x: Array
    wanted: Array
    overflow: bool


class Truths:
    """The truths of one matrix, made once for all backends."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._made: dict[tuple[int, int, int, str], Truth] = {}

    def of(self, start: int, stop: int, M: int, dtype: str) -> Truth:
        key = (start, stop, M, dtype)
        if key not in self._made:
            self._made[key] = self._make(start, stop, M, dtype)
        return self._made[key]

    def _make(self, start: int, stop: int, M: int, dtype: str) -> Truth:
        """Rows `start:stop`, a block at a time."""
        K = self.subject.matrix.K
        layer = self.subject.layer(start, stop)
        x = activations(M, K, SEED ^ zlib.crc32(self.subject.stored.name.encode()), dtype)
        wide = x.astype(np.float64)
        wanted, largest = np.empty((M, stop - start)), 0.0
        # A NaN that the source has makes NaN outputs on both sides, which is agreement.
        with np.errstate(invalid="ignore", over="ignore"):
            for top, bottom in row_blocks(stop - start, K, 8, _BLOCK_CODES):
                values = self.subject.rows(start + top, start + bottom).values()
                wanted[:, top:bottom] = wide @ values.T
                largest = max(largest, float(np.fmax.reduce(np.abs(values), axis=None, initial=0.0)))
            if "bias" in layer.tensors:
                wanted += layer.tensors["bias"].astype(np.float64)
        reach = largest * float(np.abs(wide).sum(axis=1).max())
        return Truth(layer, x, wanted, reach > LARGEST)


def misread_truth(subject: Subject) -> tuple[Layer, Array] | None:
    """(a few rows with the weight's bytes in a wrong order, the right weight `[n, K]`); None where that order
    changes nothing (all codes of a byte alike), or nothing finite.

    Without the bias, which may be so large that the weight does not show.
    """
    start, stop = subject.window(_MISREAD_ROWS)
    try:
        layer = subject.layer(start, stop)
        layer = replace(layer, tensors={role: a for role, a in layer.tensors.items() if role != "bias"})
        broken = replace(layer, tensors=dict(_misread(layer)))
        values = subject.rows(start, stop).values()
        with np.errstate(invalid="ignore", over="ignore"):
            same = np.array_equal(values, dequantize(broken), equal_nan=True)
        largest = float(np.abs(values).max(initial=0.0))
        return None if same or not largest < _PLAIN else (broken, values)
    except CONTRADICTIONS:
        return None


def _misread(layer: Layer) -> Iterator[tuple[str, Array]]:
    """The layer with the two nibbles of every byte exchanged, or its fp8 rows rolled by one."""
    for role, array in layer.tensors.items():
        if role not in ("qweight", "weight"):
            yield role, array
        elif array.dtype.kind in "iu":
            octets = np.ascontiguousarray(array).view(np.uint8)
            yield role, (octets >> 4 | octets << 4).view(array.dtype)
        else:
            yield role, np.ascontiguousarray(np.roll(array, 1, axis=0))
