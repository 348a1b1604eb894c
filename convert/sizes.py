"""Bytes as people write them (`5GB`) and read them (`4.1 GB`)."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)", re.IGNORECASE)
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
    """Bytes of `5GB` (10^9), `512MiB` (2^20), `1000`; None where it is no size."""
    match = _SIZE.fullmatch(text.strip())
    unit = match[2].lower().removesuffix("b") if match else "?"
    size = float(match[1]) * _UNITS[unit] if match is not None and unit in _UNITS else float("inf")
    return int(size) if size <= LARGEST_SIZE else None


def size(nbytes: float) -> str:
    """`4.1 GB` (powers of 1000, as disks and the Hub count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"
