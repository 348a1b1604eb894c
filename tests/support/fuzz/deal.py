"""Which cases a run plays: the environment says how many, from which on."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Cases:
    """The cases of a run, dealt to blocks that are a test each."""

    first: int
    count: int
    blocks: int

    def of(self, block: int) -> range:
        """The seeds of one block."""
        begin, end = (self.first + at * self.count // self.blocks for at in (block, block + 1))
        return range(begin, end)


def cases(variable: str, count: int, *, per_block: int = 250, least_blocks: int = 2) -> Cases:
    """As the environment says.

    Args:
        variable: how many of them; `XPUQUANT_TRUST_FIRST` has the first seed.
        count: without it.
    """
    count = int(os.environ.get(variable, count))
    first = int(os.environ.get("XPUQUANT_TRUST_FIRST", "0"))
    return Cases(first, count, max(least_blocks, count // per_block))
