"""Bytes as people write them (`5GB`) and read them (`4.1 GB`); seconds and counts as they read them."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b?|b)", re.IGNORECASE)
_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
LARGEST_SIZE = 2**62
"""Bytes: more than any disk has."""


def parse_size(text: str) -> int | None:
    """Bytes of `5GB` (10^9), `512MiB` (2^20), `1000B`; None where it is no size. A number without a unit is none: who
    writes 5 means no shards of five bytes."""
    match = _SIZE.fullmatch(text.strip())
    unit = match[2].lower().removesuffix("b") if match else "?"
    size = float(match[1]) * _UNITS[unit] if match is not None and unit in _UNITS else float("inf")
    return int(size) if size <= LARGEST_SIZE else None


def exact_size(nbytes: int) -> str:
    """Bytes as `parse_size` reads them again: `5GB`, `512MiB`, `1001B`."""
    for unit in ("t", "ti", "g", "gi", "m", "mi", "k", "ki"):
        if nbytes and nbytes % _UNITS[unit] == 0:
            return f"{nbytes // _UNITS[unit]}{unit if unit == 'k' else unit.capitalize()}B"
    return f"{nbytes}B"


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(nbytes: float) -> str:
    """`4.1 GB` (powers of 1000, as disks and the Hub count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def counted(count: int, one: str, several: str | None = None) -> str:
    """`1 module`, `2,048 modules`, `1 matrix decodes`: a number with what it counts, and its verb where `one` has one.

    Args:
        several: None: `one` with an s.
    """
    return f"{count:,} {one if count == 1 else several or one + 's'}"
