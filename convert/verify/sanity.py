"""The check `sanity`: numbers that are the source's and still worth a look before they are served.

Counted on the decoded output, block by block, in the pass that checks exactness. All of it warns; only a NaN or an
infinity that cannot be shown to come from the source fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from xpuquant.conversion.sizes import counted
from xpuquant.conversion.verify.proof import Checked, Claim
from xpuquant.conversion.verify.verdict import Finding, Sanity
from xpuquant.formats.checkpoint import Array
from xpuquant.formats.weights.decoded import Decoded, even_groups, lies_by_columns
from xpuquant.formats.weights.packed import WORD_ZERO, Packed, Rows

_DEAD_SHARE = 0.01
"""Of a module's groups. Producers leave a few all-zero groups (padding, pruned channels); one in a hundred is odd."""

_SATURATED_SHARE = 0.25
"""Of a module's codes. Uniformly random 4-bit codes have 1/8 at the ends, real weights far fewer."""

_SAMPLE = 4
"""One row in so many is looked at for saturation, which is a share and not a fault."""

_SCALE_OUTLIER = 100.0
"""Largest scale over their root mean square. Real checkpoints stay below about 30."""

_LARGEST = {"2e2m1": (-12, 12), "e2m1": (0x07, 0x0F), "e4m3": (0x7E, 0xFE), "e5m2": (0x7B, 0xFB)}
_NOT_FINITE = {"e4m3": 0x7F, "e5m2": 0x7C}

_MANTISSA = {"float16": 10, "bfloat16": 7}
"""Bits of it, of the dtypes that nearly all scales have."""


@dataclass
class SanityCount:
    """Counts one module, block by block.

    symmetric  zero points are in the middle, so -8 and 7 are the ends of the range
    """

    symmetric: bool = True
    sanity: Sanity = field(default_factory=Sanity)
    _squares: float = 0.0
    _finite: int = 0
    _last_row: int = -1

    def update(self, rows: Rows) -> None:
        """Count rows of one matrix."""
        h = self.sanity
        scale = self._new(rows)
        bad, zero, largest = self._scales(scale)
        sample = rows.codes[::_SAMPLE]
        codes, saturated = sample.size, 0
        if isinstance(rows, Packed):
            codes *= 2
            saturated = _saturated_nibbles(rows.number, sample, self.symmetric)
        else:
            saturated = _saturated(rows.number, sample, self.symmetric)
        self.sanity = Sanity(
            groups=h.groups + scale.size,
            bad_scales=h.bad_scales + bad,
            zero_scales=h.zero_scales + zero,
            dead_groups=h.dead_groups + (_dead_nibbles(rows) if isinstance(rows, Packed) else _dead(rows)),
            codes=h.codes + codes,
            saturated=h.saturated + saturated,
            bad_codes=h.bad_codes + (0 if isinstance(rows, Packed) else _bad(rows)),
            scale_max=max(h.scale_max, largest),
            scale_typical=math.sqrt(self._squares / self._finite) if self._finite else 0.0,
        )

    def _new(self, rows: Rows) -> Array:
        """The scales that these rows bring: a block of scales covers the rows of several calls."""
        if len(rows.scale) == len(rows.row):
            return rows.scale
        first = np.diff(rows.row, prepend=self._last_row) != 0
        self._last_row = int(rows.row[-1])
        scale: Array = rows.scale[rows.row[first]]
        return scale

    def _scales(self, scale: Array) -> tuple[int, int, float]:
        bad, zero, squares, largest = _count_scales(scale)
        self._squares += squares
        self._finite += scale.size - bad
        return bad, zero, largest


def _count_scales(scale: Array) -> tuple[int, int, float, float]:
    """As `count_scales`, of scales of any dtype."""
    from xpuquant.formats.packing.verify_loops import count_halves, count_scales

    if lies_by_columns(scale):
        scale = scale.T
    if (mantissa := _MANTISSA.get(scale.dtype.name)) is not None and scale.ndim == 2:
        return count_halves(scale.view(np.uint16), mantissa)
    with np.errstate(over="ignore"):  # an infinity is what it is to a kernel
        widened = np.ascontiguousarray(scale, np.float32)
    bad, zero, squares, largest = count_scales(widened.reshape(-1))
    return bad, zero, squares, largest


def _saturated(number: str, codes: Array, symmetric: bool) -> int:
    """Codes at an end of their range."""
    from xpuquant.formats.packing.verify_loops import count_octets

    ends = (-8, 7) if number == "int" and symmetric else _LARGEST.get(number)
    if ends is None:
        return 0
    if codes.itemsize == 1:
        return int(count_octets(codes.view(np.uint8), *(end & 0xFF for end in ends)))
    return sum(int(np.count_nonzero(codes == end)) for end in ends)


def _saturated_nibbles(number: str, codes: Array, symmetric: bool) -> int:
    """The same of packed codes, without the last columns where they fill no word of 16."""
    from xpuquant.formats.packing.verify_loops import count_nibbles

    if number == "int" and not symmetric:
        return 0
    ends = (0, 15) if number == "int" else _LARGEST[number]
    wide = codes.shape[1] // 8 * 8
    words = codes[:, :wide] if codes.strides[0] % 8 == 0 else np.ascontiguousarray(codes[:, :wide])
    return count_nibbles(words.view(np.uint64), *ends)


def _bad(rows: Decoded) -> int:
    """Codes that are no finite number."""
    if rows.number == "float":
        return int(np.count_nonzero(~np.isfinite(rows.codes)))
    limit = _NOT_FINITE.get(rows.number)
    if limit is None:
        return 0
    from xpuquant.formats.packing.verify_loops import count_large

    codes = rows.codes.reshape(-1)
    whole = codes.size // 8 * 8
    rest = int(np.count_nonzero((codes[whole:] & 0x7F) >= limit))
    return int(count_large(codes[:whole].view(np.uint64), limit)) + rest


def _run_length(rows: Rows, K: int) -> int:
    """Columns of a group, where each row has groups of its own and they are equal runs of columns; otherwise 0."""
    groups = rows.scale.shape[1]
    size = K // groups if groups > 1 and K % groups == 0 else 0
    if not size or len(rows.scale) != len(rows.codes):
        return 0
    return size if rows.col is even_groups(K, size) or (rows.col[::size] == np.arange(groups)).all() else 0


def _dead(rows: Decoded) -> int:
    """Groups along K all of whose codes mean 0. Only where groups are equal runs of columns of a multiple of 8;
    scales that cover a whole row, block or tensor have no groups to die."""
    n, K = rows.codes.shape
    groups, size = rows.scale.shape[1], _run_length(rows, K)
    if rows.codes.itemsize != 1 or not size or size % 8:
        return 0
    codes = np.ascontiguousarray(rows.codes).view(np.uint64).reshape(n, groups, size // 8)
    # The sign bit of a float zero says nothing.
    sign = {"int": 0, "2e2m1": 0, "e2m1": 0x08}.get(rows.number, 0x80)
    magnitude = np.uint64(int.from_bytes(bytes([0xFF ^ sign]) * 8, "little"))
    # A group whose first word is alive is alive: few are left to be looked at whole.
    doubtful = codes[:, :, 0] & magnitude == 0
    return int(np.count_nonzero(~(codes[doubtful] & magnitude).any(axis=1)))


def _dead_nibbles(rows: Packed) -> int:
    """The same of packed codes; groups of a multiple of 16 columns."""
    from xpuquant.formats.packing.verify_loops import count_dead

    n, groups, size = len(rows.codes), rows.scale.shape[1], _run_length(rows, rows.K)
    if not size or size % 16:
        return 0
    nothing = np.zeros((1, groups), np.uint8) if rows.number == "e2m1" else rows.zeros
    if nothing is None:
        nothing = np.full((1, groups), WORD_ZERO, np.uint8)
    # The sign bit of a float zero says nothing.
    mask = 0x7 if rows.number == "e2m1" else 0xF
    return int(count_dead(rows.codes.view(np.uint64).reshape(n, groups, size // 16), nothing, mask))


def findings(sanity: Mapping[str, Sanity], checked: Mapping[str, Checked]) -> Iterator[Finding]:
    """What is worth a look.

    Args:
        checked: module → what was found of it. Whatever is odd about numbers that are the source's is the source's.
    """
    for name, h in sanity.items():
        found = checked.get(name)
        is_of_source = found is not None and found.is_of_source
        then = found is not None and found.claim is Claim.RECORDED
        origin = ("; so they were when it was converted" if then else "; so has the source") if is_of_source else ""
        if h.bad_scales or h.bad_codes:
            what = f"{counted(h.bad_scales, 'scale')} and {counted(h.bad_codes, 'code')} are NaN or infinite{origin}"
            yield Finding("sanity", name, what, fails=not is_of_source)
        if h.zero_scales:
            yield Finding(
                "sanity",
                name,
                f"{h.zero_scales} of {counted(h.groups, 'scale')} {'is' if h.zero_scales == 1 else 'are'} 0{origin}",
                False,
            )
        if h.dead_groups > _DEAD_SHARE * h.groups:
            yield Finding("sanity", name, f"only zeros in {h.dead_groups} of {counted(h.groups, 'group')}", False)
        if h.saturated > _SATURATED_SHARE * h.codes:
            share = f"{h.saturated / h.codes:.0%} of the codes are at an end of their range"
            yield Finding("sanity", name, share, False)
        if h.scale_max > _SCALE_OUTLIER * h.scale_typical > 0:
            what = f"the largest scale is {h.scale_max / h.scale_typical:.0f} times their root mean square"
            yield Finding("sanity", name, what, False)
