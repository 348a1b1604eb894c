"""What the layouts share about scales: the dtype that the user asked for, and blocks of rows."""

from __future__ import annotations

from collections.abc import Iterable

from xpuquant.formats.dtypes import rounds
from xpuquant.formats.scheme import Scheme


def rounded(sources: Iterable[str], asked: str | None) -> str | None:
    """`Conversion.rounded` of scales that are stored in the dtype asked for.

    Args:
        sources: safetensors labels of the source's scales.
        asked: label of the dtype that the user wants; None for the source's.
    """
    return asked if asked is not None and any(rounds(source, asked) for source in sources) else None


def kept(stored: str, asked: str | None) -> tuple[str, ...]:
    """The fact about scales that a kernel takes in one form only, where the user asked for another.

    Args:
        stored: label of the dtype they are stored in: `F32`, or `U8` for exponents.
        asked: label of the dtype that the user wants; None for the source's.
    """
    if asked in (None, stored):
        return ()
    form = "exponents" if stored == "U8" else "float32"
    return (f"scales are {form} whatever --scale-dtype says: the kernel takes nothing else",)


def block_start(scheme: Scheme, start: int) -> int:
    """Number of the block that begins at row `start`. Raises ValueError inside a block."""
    if start % scheme.block_n:
        raise ValueError(f"row {start} is inside a block of {scheme.block_n} rows")
    return start // scheme.block_n
