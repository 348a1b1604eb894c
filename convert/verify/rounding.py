"""What was rounded on request, scales (`--scale-dtype`) or whole matrices (`--on-unsupported dequantize`): what that
changed, and whether it lost anything.

Rounding a scale changes every weight of its group by the same small part, which is what was asked for and is counted.
A number that becomes infinite, NaN or 0 is another matter: it no longer means what it did, so that fails.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np

from xpuquant.conversion.sizes import counted
from xpuquant.conversion.verify.proof import Rounding
from xpuquant.formats.checkpoint import Array
from xpuquant.formats.dtypes import numpy_dtype
from xpuquant.formats.weights.decoded import Decoded
from xpuquant.formats.weights.packed import Packed, PackedColumns

R = TypeVar("R", bound=Decoded | Packed | PackedColumns)

LARGEST_CHANGE = {"F16": 2.0**-11, "BF16": 2.0**-8}
"""dtype → the largest relative change of a number in its normal range: half of its last place. Below that range
(6.1e-5 of float16) a number keeps fewer bits and changes more."""


def round_scales(rows: R, dtype: str) -> R:
    """The same rows with their scales rounded once, to nearest even. `dtype` is a safetensors label."""
    with np.errstate(over="ignore", invalid="ignore"):
        return replace(rows, scale=rows.scale.astype(numpy_dtype(dtype)))


def change(dtype: str, before: Array, after: Array) -> tuple[Rounding, Array]:
    """What rounding `before` (float64) made of it: how many numbers changed and by how much, and a mask of those that
    were lost: NaN, infinite or 0 only by being rounded. They count as changed, not for the largest change."""
    changed = (before != after) & ~np.isnan(before)
    lost = np.isfinite(before) & ~np.isfinite(after) | (before != 0) & (after == 0)
    kept = changed & ~lost
    largest = float((np.abs(after[kept] - before[kept]) / np.abs(before[kept])).max(initial=0.0))
    return Rounding(dtype, before.size, int(np.count_nonzero(changed)), largest), lost


class RoundedScales:
    """Rounds the decoded source's scales of one matrix, and counts what that changes.

    rounding  the scales so far
    lost      scales so far that are NaN, infinite or 0 only by being rounded
    """

    def __init__(self, dtype: str) -> None:
        self.rounding = Rounding(dtype)
        self.lost = 0
        self._first_lost = ""

    def round(self, rows: R, continued: bool) -> R:
        """As `round_scales`.

        Args:
            rows: decoded rows of the source; the next ones with every call.
            continued: the first row of scales covers rows of the call before too, and has been counted there.
        """
        rounded = round_scales(rows, self.rounding.dtype)
        is_new = np.diff(rows.row, prepend=rows.row[0] if continued else -1) != 0
        chosen = rows.row[is_new]
        before, after = (side.scale[chosen].astype(np.float64) for side in (rows, rounded))
        changed, lost = change(self.rounding.dtype, before, after)
        if lost.any() and not self.lost:
            self._first_lost = f"{before[lost][0]:g} becomes {after[lost][0]:g}"
        self.lost += int(np.count_nonzero(lost))
        self.rounding += changed
        return rounded

    def error(self) -> str | None:
        """What was lost, and what to do about it; None where nothing was."""
        if not self.lost:
            return None
        name = numpy_dtype(self.rounding.dtype).name
        return (
            f"{self.lost} of {counted(self.rounding.numbers, 'scale')} do not fit {name} ({self._first_lost}); "
            "keep the source's scale dtype"
        )


def odd(rounding: Rounding) -> str | None:
    """What is worth a look where no scale was lost: scales so small that they lost more than rounding takes."""
    usual = LARGEST_CHANGE.get(rounding.dtype, 0.0)
    if rounding.largest <= usual:
        return None
    name = numpy_dtype(rounding.dtype).name
    return (
        f"scales too small for all bits of {name}: rounding changed one by {rounding.largest:.1e} of its value, "
        f"where {usual:.1e} is usual"
    )
