"""Odd environments, limits and standard streams. A few of the cases that scripts/lanes/trust plays by the hundred, and
those that were found before."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fuzz.places import Prepared
from support.fuzz.surroundings import CHANGES, play_surroundings
from support.fuzz.tally import count

CASES = int(os.environ.get("XPUQUANT_TRUST_SURROUNDINGS", str(len(CHANGES))))
FIRST = int(os.environ.get("XPUQUANT_TRUST_FIRST", "0"))
BLOCKS = max(2, CASES // 50)


@pytest.fixture(scope="module")
def prepared() -> Iterator[Prepared]:
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="xpuquant-", dir=memory if os.access(memory, os.W_OK) else None))
    yield Prepared(folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_one_line_or_the_whole_output(block: int, prepared: Prepared) -> None:
    for seed in range(FIRST + block * CASES // BLOCKS, FIRST + (block + 1) * CASES // BLOCKS):
        room = prepared.source.parent / f"case-{seed}"
        room.mkdir()
        what, code, problem = play_surroundings(seed, prepared, room)
        assert problem is None, f"case {seed}: {what}: {problem}"
        count(f"surroundings: exit {code}")
