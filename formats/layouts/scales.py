"""What the layouts share about scales: the dtype that the user asked for, what it cannot hold, and blocks of rows."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from xpuquant.errors import UnsupportedError
from xpuquant.formats.checkpoint import Array
from xpuquant.formats.dtypes import numpy_dtype, rounds
from xpuquant.formats.scheme import Scheme


def rounded(sources: Iterable[str], asked: str | None) -> str | None:
    """`Conversion.rounded` of scales that are stored in the dtype asked for.

    Args:
        sources: safetensors labels of the source's scales.
        asked: label of the dtype that the user wants; None for the source's.
    """
    return asked if asked is not None and any(rounds(source, asked) for source in sources) else None


def cast(scales: Array, dtype: str, tensor: str) -> Array:
    """The scales in another dtype, rounded once, to nearest even.

    Args:
        dtype: safetensors label.
        tensor: name of the source's tensor, for the message.

    Raises:
        UnsupportedError: rounding makes an infinity, a NaN or a 0 of a scale: its group would mean nothing.
    """
    if scales.dtype == numpy_dtype(dtype):
        return scales
    with np.errstate(over="ignore", invalid="ignore"):
        stored: Array = scales.astype(numpy_dtype(dtype))
    refuse_lost(scales, stored, tensor, "scales", "keep the source's scale dtype")
    return stored


def refuse_lost(before: Array, after: Array, where: str, numbers: str, fix: str) -> None:
    """Refuse what rounding did to numbers that it made infinite, NaN or 0.

    Args:
        where: the tensor they are of.
        numbers: what they are.
        fix: what to do about it.

    Raises:
        UnsupportedError: there are such numbers.
    """
    lost = np.isfinite(before) & ~np.isfinite(after) | (before != 0) & (after == 0)
    if lost.any():
        became = f"{float(before[lost][0]):g} becomes {float(after[lost][0]):g}"
        count = int(np.count_nonzero(lost))
        raise UnsupportedError(
            f"{where}: {count} of {before.size} {numbers} do not fit {after.dtype.name} ({became}); {fix}"
        )


def kept(stored: str, asked: str | None) -> tuple[str, ...]:
    """The fact about scales that a kernel takes in one form only, where the user asked for another.

    Args:
        stored: label of the dtype they are stored in: `F32`, `U8` for exponents, `BF16` for those of NVFP4.
        asked: label of the dtype that the user wants; None for the source's.
    """
    if asked in (None, stored):
        return ()
    if stored == "BF16":
        return ("scales are bfloat16 whatever --scale-dtype says: it holds all that NVFP4 can have",)
    form = "exponents" if stored == "U8" else "float32"
    return (f"scales are {form} whatever --scale-dtype says: the kernel takes nothing else",)


def block_start(scheme: Scheme, start: int) -> int:
    """Number of the block that begins at row `start`. Raises ValueError inside a block."""
    if start % scheme.block_n:
        raise ValueError(f"row {start} is inside a block of {scheme.block_n} rows")
    return start // scheme.block_n
