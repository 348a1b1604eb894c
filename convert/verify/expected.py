"""What a kernel should compute: float64 products of decoded weights with realistic activations.

Activations are as a transformer has them, rows of unit RMS with a few outlier channels, from a recorded seed. Weights
come from the source, or from the output where the source is gone and digests have shown that it is the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from xpuquant.conversion.verify.verdict import CONTRADICTIONS
from xpuquant.formats.dtypes import numpy_dtype
from xpuquant.formats.layouts.base import Layout, Matrix, Stored
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.base import row_blocks
from xpuquant.formats.weights.decoded import Decoded
from xpuquant.kernels.base import Array, Layer
from xpuquant.kernels.reference import dequantize
from xpuquant.values import frozen

SEED = 20240229
LARGEST = {"F32": 2.0**127, "BF16": 2.0**127, "F16": 2.0**15}
"""Activation dtype → the largest weight, sum and output that kernels surely hold: half of what the dtype does."""

_FLUSHED = {"F32": 2.0**-95, "BF16": 2.0**-95, "F16": 2.0**-12}
"""Activation dtype → what an output loses where its terms underflow, over the rounding that is allowed. Subnormals
may be flushed to zero, 2^-126 times the largest FP8 code; float16 rounds scales to multiples of 2^-24, √K of them."""

_MISREAD_ROWS = 64
_BLOCK_CODES = 1 << 20
_PLAIN = 1e30
"""A weight this large overflows a kernel whatever its layout."""

_OUTLIER_EVERY = 256
_OUTLIER_GAIN = 20.0

DecodeRows = Callable[[int, int], Decoded]
"""Decodes rows `start:stop` of a matrix: of the source, or of the output where the source is gone."""


@frozen
class Subject:
    """One matrix to compute."""

    stored: Stored
    layout: Layout
    matrix: Matrix
    rows: DecodeRows

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


@frozen
class Expected:
    """What a kernel is given, and what it should make of it.

    x         activations `[M, K]`
    product   float64 `[M, n]`
    size      float64 `[M, n]`, positive: what rounding is in proportion to; see `_size`
    overflow  a weight, an output or a sum on the way can exceed what kernels hold: infinity, or the NaN of two of
              them, is then no error of theirs
    """

    layer: Layer
    x: Array
    product: Array
    size: Array
    overflow: bool


class ExpectedProducts:
    """The products of one matrix, made once for all backends."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._made: dict[tuple[int, int, int, str], Expected] = {}

    def of(self, start: int, stop: int, M: int, dtype: str) -> Expected:
        key = (start, stop, M, dtype)
        if key not in self._made:
            self._made[key] = self._make(start, stop, M, dtype)
        return self._made[key]

    def _make(self, start: int, stop: int, M: int, dtype: str) -> Expected:
        """Rows `start:stop`, a block at a time."""
        K = self.subject.matrix.K
        layer = self.subject.layer(start, stop)
        x = activations(M, K, SEED ^ zlib.crc32(self.subject.stored.name.encode()), dtype)
        wide = x.astype(np.float64)
        product, size, largest = np.empty((M, stop - start)), np.empty((M, stop - start)), 0.0
        # A NaN that the source has makes NaN outputs on both sides, which is agreement.
        with np.errstate(invalid="ignore", over="ignore"):
            for top, bottom in row_blocks(stop - start, K, 8, _BLOCK_CODES):
                decoded = self.subject.rows(start + top, start + bottom)
                values, part = decoded.values(), slice(top, bottom)
                product[:, part] = wide @ values.T
                weights = _magnitudes(decoded, values, self.subject.stored.scheme)
                size[:, part] = _size(wide, product[:, part], weights, dtype)
                largest = max(largest, float(np.fmax.reduce(weights, axis=None, initial=0.0)))
            if "bias" in layer.tensors:
                bias = layer.tensors["bias"].astype(np.float64)
                product += bias
                size += np.abs(bias)
        reach = largest * float(np.abs(wide).sum(axis=1).max())
        highest = max(largest, float(np.fmax.reduce(np.abs(product), axis=None, initial=0.0)))
        return Expected(layer, x, product, size, reach > LARGEST["F32"] or highest > LARGEST[dtype])


def _magnitudes(decoded: Decoded, values: Array, scheme: Scheme) -> Array:
    """|W| `[n, K]`; of integers at least one step, because a kernel may multiply code and zero point by the scale
    before it subtracts them. Of two planes of nibbles 16 steps more: the upper one is a multiple of 16 steps and the
    lower one takes up to 15 of them back, so that small codes are the difference of larger terms."""
    if decoded.number != "int":
        return np.abs(values)
    step: Array = np.abs(decoded.scale.astype(np.float64))[decoded.row][:, decoded.col]
    least = 16 * step + np.abs(values) if scheme.layout == "int8_linear" else step
    return np.maximum(np.abs(values), least)


def _size(x: Array, products: Array, weights: Array, dtype: str) -> Array:
    """`[M, n]`: |output| + the root of the sum of the squares of its terms `x · w`.

    A weight or a partial sum that is rounded changes the output by a part of itself. Signs of activations are random,
    so partial sums, and what rounding adds to them, walk as far as the root of the sum of the squares. The sum of the
    magnitudes, which would be safe for any signs, is √K times larger and hides as much; the output alone will not do,
    because its terms may cancel. An activation counts at least as its row's RMS, 1: kernels that quantize activations
    leave a part of that (`kernels/activation_terms.py`).
    """
    terms = np.sqrt((np.square(x) + 1) @ np.square(weights).T)
    found: Array = np.abs(products) + terms + _FLUSHED[dtype]
    return found


def expected_of_misread(subject: Subject, M: int, dtype: str) -> tuple[Expected, float] | None:
    """What a kernel should make of a few rows, beside a layer that holds their bytes in a wrong order; and the largest
    deviation of that layer's own product, over the sizes of both. None where nothing is finite.

    Without the bias, which may be so large that the weight does not show.
    """
    start, stop = subject.window(_MISREAD_ROWS)
    try:
        layer = subject.layer(start, stop)
        layer = replace(layer, tensors={role: a for role, a in layer.tensors.items() if role != "bias"})
        broken = replace(layer, tensors=dict(_misread(layer)))
        decoded = subject.rows(start, stop)
        values, misread = decoded.values(), dequantize(broken)
    except CONTRADICTIONS:
        return None
    weights = _magnitudes(decoded, values, subject.stored.scheme)
    if not weights.max(initial=0.0) < _PLAIN or not np.abs(misread).max(initial=0.0) < _PLAIN:
        return None
    x = activations(M, layer.K, SEED, dtype)
    wide = x.astype(np.float64)
    right, wrong = wide @ values.T, wide @ misread.T
    size = _size(wide, right, weights, dtype)
    sizes = size + _size(wide, wrong, np.abs(misread), dtype)
    return Expected(broken, x, right, size, False), float((np.abs(right - wrong) / sizes).max(initial=0.0))


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
