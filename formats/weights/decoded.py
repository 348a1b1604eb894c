"""The meaning of a stored weight, whatever the packing: integers, scales, and which scale covers what.

Both ends of a conversion decode to this form, by code that does not share the fast path; a conversion is exact
when `difference` finds none. Equality is of integers and of float values, never closeness.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from xpuquant.formats.checkpoint import Array
from xpuquant.formats.dtypes import numpy_dtype
from xpuquant.values import frozen

# The eight magnitudes of E2M1 (OCP Microscaling Formats v1.0, section 5.3.3); code = sign << 3 | index. Written out
# here, in kernels/reference.py and in xpuquant/layers.py, so that a mistake in one is found by the others.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@frozen
class Decoded:
    """Rows `[n, K]` of a weight, in the source's column order.

    number  what a code means: `int` (code minus zero point), `e2m1` (a nibble), `e4m3`/`e5m2` (a byte),
            `2e2m1` (twice what a nibble of e2m1 means), `float` (an unquantized value, widened)
    codes   `[n, K]`: int8 or int16 for `int`, int8 for `2e2m1`, uint8 for the float codes, a float for `float`
    scale   `[A, B]` multipliers, in the dtype they are stored in (E8M0 as its ml_dtypes type)
    row     `[n]`: row of `scale` that covers weight row n
    col     `[K]`: column of `scale` that covers weight column k
    """

    number: str
    codes: Array
    scale: Array
    row: Array
    col: Array

    def elements(self) -> Array:
        """float64 `[n, K]`: the codes as numbers, before scaling."""
        if self.number == "e2m1":
            nibbles: Array = _E2M1[self.codes]
            return nibbles
        if self.number in ("e4m3", "e5m2"):
            import ml_dtypes

            kind = ml_dtypes.float8_e4m3fn if self.number == "e4m3" else ml_dtypes.float8_e5m2
            numbers: Array = self.codes.view(kind).astype(np.float64)
            return numbers
        return self.codes.astype(np.float64)

    def values(self) -> Array:
        """float64 `[n, K]`: what the layer multiplies by. Exact: 8 + 24 significant bits fit in 53."""
        scale = self.scale.astype(np.float64)
        return self.elements() * scale[self.row][:, self.col]


def to_bf16(values: Array) -> Array:
    """bf16 nearest to float64 values, ties to even: rounded once.

    By way of float32, because numpy has no direct cast; float32 does not hold the product of an 8-bit code and a
    24-bit scale, so that rounding is made harmless: where it was inexact, to odd (Boldo and Melquiond, 2008).
    """
    with np.errstate(over="ignore"):
        wide = values.astype(np.float32)
    inexact = (wide != values) & ~np.isnan(values)
    bits = wide.view(np.uint32)
    bits -= inexact & (np.abs(wide) > np.abs(values))
    bits |= inexact
    return wide.astype(numpy_dtype("BF16"))


def subtract_zeros(codes: Array, zeros: Array | None, bits: int, col: Array) -> Array:
    """`[n, K]` codes minus zero points: int8 up to 4 bits, int16 above.

    Args:
        codes: uint8 `[n, K]`.
        zeros: uint8 `[n, G]`, the true zero points, or None for a symmetric weight (2^(bits-1)).
        col: `[K]` group of each column.
    """
    wide: Any = np.int8 if bits <= 4 else np.int16
    signed: Array = codes.view(np.int8) if bits <= 4 else codes.astype(wide)
    if zeros is None:
        middle: Array = signed - wide(1 << (bits - 1))
        return middle
    minus: Array = zeros.astype(wide)
    size = _group_size(col, zeros.shape[1])
    if size is None:
        return signed - minus.take(col, axis=1)
    # Spelling the zero points out per column would cost more than the subtraction itself.
    grouped: Array = signed.reshape(len(codes), -1, size) - minus[:, :, None]
    return grouped.reshape(codes.shape)


@lru_cache(256)
def even_groups(K: int, size: int) -> Array:
    """`[K]` group of each column where groups are `size` columns long. Read-only; the same object each time."""
    groups: Array = np.arange(K) // size
    groups.flags.writeable = False
    return groups


def each_row(n: int) -> Array:
    """`[n]`: scales of which every row has its own. Read-only; the same object each time."""
    return even_groups(n, 1)


def _group_size(col: Array, groups: int) -> int | None:
    """Columns per group where all groups are equally long and in order; otherwise None."""
    size, rest = divmod(len(col), groups)
    return size if not rest and _same_places(col, even_groups(len(col), size)) else None


def in_order(array: Array) -> Array:
    """A `[n, K]` array that lies by columns, by rows."""
    from xpuquant.formats.packing.verify_loops import upright_bytes, upright_words

    out = np.empty(array.shape, array.dtype)
    if array.itemsize == 1 and not (array.shape[0] % 8 or array.shape[1] % 8):
        upright_bytes(np.ascontiguousarray(array.T).view(np.uint64), out.view(np.uint64))
    else:
        same_size = np.dtype(f"u{array.itemsize}")
        upright_words(array.view(same_size).T, out.view(same_size))
    return out


_FEW = 1 << 12
"""Numbers for which the compiled loops are not imported."""


def lies_by_columns(array: Array) -> bool:
    """Whether elements of a column lie closer in memory than those of a row: it is then walked faster turned over."""
    return array.ndim == 2 and array.strides[0] < array.strides[1]


def difference(expected: Decoded, actual: Decoded) -> str | None:
    """None when both mean the same; otherwise one line on the first place where they do not.

    Args:
        expected: the decoded source; with its scales rounded, where that was asked for.
        actual: the decoded output.
    """
    if expected.number != actual.number or expected.codes.shape != actual.codes.shape:
        return (
            f"source is {expected.number} {list(expected.codes.shape)}, "
            f"output {actual.number} {list(actual.codes.shape)}"
        )
    if not _same_bits(expected.codes, actual.codes):
        same = expected.codes == actual.codes
        if expected.number == "float":
            # A NaN that stayed a NaN is the same value.
            same |= np.isnan(expected.codes) & np.isnan(actual.codes)
        if not same.all():
            n, k = np.argwhere(~same)[0]
            wrong = same.size - int(np.count_nonzero(same))
            return (
                f"code [{n}, {k}] is {actual.codes[n, k]}, source has {expected.codes[n, k]} "
                f"({wrong} of {same.size} differ)"
            )
    return _scale_difference(expected, actual)


class Scaled(Protocol):
    """Scales, and which of them covers what; see `Decoded`."""

    @property
    def scale(self) -> Array: ...

    @property
    def row(self) -> Array: ...

    @property
    def col(self) -> Array: ...


def same_scales(a: Scaled, b: Scaled) -> bool:
    """Whether every weight has the same multiplier in both."""
    return _scale_difference(a, b) is None


def _same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays are equal bit by bit: eight codes per comparison where they lie in order."""
    if a.dtype != b.dtype:
        return False
    if lies_by_columns(a) and lies_by_columns(b):
        a, b = a.T, b.T
    elif a.size > _FEW and a.shape == b.shape:
        a, b = (in_order(side) if lies_by_columns(side) else side for side in (a, b))
    if a.flags.c_contiguous and b.flags.c_contiguous and a.nbytes % 8 == 0 and a.ndim and a.shape[-1]:
        a, b = (side.reshape(-1).view(np.uint64) for side in (a, b))
    elif a.dtype.kind not in "iu":
        a, b = (np.ascontiguousarray(side).view(f"u{side.dtype.itemsize}") for side in (a, b))
    return bool((a == b).all())


def _scale_difference(expected: Scaled, actual: Scaled) -> str | None:
    """The first pair of scales that cover one weight and are of different values."""
    same_places = _same_places(expected.row, actual.row) and _same_places(expected.col, actual.col)
    if same_places and expected.scale.shape == actual.scale.shape and _same_bits(expected.scale, actual.scale):
        return None
    rows, cols = distinct_pairs(expected.row, actual.row), distinct_pairs(expected.col, actual.col)
    wanted = np.take(np.take(expected.scale, rows[0], axis=0), cols[0], axis=1)
    held = np.take(np.take(actual.scale, rows[1], axis=0), cols[1], axis=1)
    if _same_bits(wanted, held):
        return None
    want64, have64 = wanted.astype(np.float64), held.astype(np.float64)
    same = want64.view(np.uint64) == have64.view(np.uint64)
    same |= np.isnan(want64) & np.isnan(have64)
    if same.all():
        return None
    i, j = np.argwhere(~same)[0]
    return (
        f"scale [{rows[1][i]}, {cols[1][j]}] is {have64[i, j]}, source has {want64[i, j]} "
        f"({same.size - int(np.count_nonzero(same))} of {same.size} differ)"
    )


def _same_places(ours: Array, theirs: Array) -> bool:
    return ours is theirs or np.array_equal(ours, theirs)


def distinct_pairs(a: Array, b: Array) -> tuple[Array, Array]:
    """Each pair `(a[i], b[i])` once, as two arrays; the order of the pairs is of no meaning.

    Two ends of a conversion may cut their columns into groups differently. Which scale meets which is then a matter of
    few pairs, though of many columns: with `a` the groups of 4 columns and `b` those of 2,

        a = 0 0 0 0 1 1 1 1        distinct pairs: (0, 0) (0, 1) (1, 2) (1, 3)
        b = 0 0 1 1 2 2 3 3        returned:       [0 0 1 1], [0 1 2 3]

    so four scales are compared instead of eight, and `scale[:, [0 0 1 1]]` of one end lies beside
    `scale[:, [0 1 2 3]]` of the other.

    Args:
        a, b: indices of one length, not negative and below 2^31.
    """
    is_new = np.ones(len(a), bool)
    is_new[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    a, b = a[is_new], b[is_new]
    if len(a) > 1 and ((a[1:] < a[:-1]).any() or (b[1:] < b[:-1]).any()):
        # Act-order: pairs that were left come again. One 64-bit number for a pair makes them easy to tell apart.
        pairs = a.astype(np.int64) << 32 | b.astype(np.int64)
        _, first = np.unique(pairs, return_index=True)
        a, b = a[first], b[first]
    return a, b
