"""Odd environments, limits and standard streams. A few of the cases that scripts/lanes/trust plays by the hundred, and
those that were found before."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.fuzz.deal import cases
from support.fuzz.places import Prepared
from support.fuzz.surroundings import CHANGES, play_surroundings
from support.fuzz.tally import count

pytest_plugins = "support.fuzz.fixtures"

CASES = cases("XPUQUANT_TRUST_SURROUNDINGS", len(CHANGES), per_block=50)


@pytest.mark.parametrize("block", range(CASES.blocks))
def test_one_line_or_the_whole_output(block: int, prepared: Prepared) -> None:
    for seed in CASES.of(block):
        room = prepared.source.parent / f"case-{seed}"
        room.mkdir()
        what, code, problem = play_surroundings(seed, prepared, room)
        assert problem is None, f"case {seed}: {what}: {problem}"
        count(f"surroundings: exit {code}")


@pytest.mark.parametrize("seed", [30, 60, 77, 81, 103, 124])
def test_found_before(seed: int, prepared: Prepared, tmp_path: Path) -> None:
    """Closed streams; a variable over which ARK's library stumbles; a limit that Intel's OpenCL took for a crash."""
    what, _, problem = play_surroundings(seed, prepared, tmp_path)
    assert problem is None, f"{what}: {problem}"
