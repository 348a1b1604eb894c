"""Files and folders that are exchanged while a command runs, at any of the things that it asks of the file system. A
few of the cases that scripts/lanes/trust plays by the thousand, and those that were found before."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.checkpoints import FIXTURES
from support.fuzz.case import command
from support.fuzz.deal import cases
from support.fuzz.places import Prepared
from support.fuzz.swaps import at_moments, other_bytes, play_swap
from support.fuzz.tally import count

pytest_plugins = "support.fuzz.fixtures"

CASES = cases("XPUQUANT_TRUST_SWAP_CASES", 60)


@pytest.mark.parametrize("block", range(CASES.blocks))
def test_nothing_exchanged_goes_unnoticed(block: int, prepared: Prepared) -> None:
    codes: set[int] = set()
    for seed in CASES.of(block):
        what, code, problem = play_swap(seed, prepared, prepared.source.parent / f"case-{seed}")
        assert problem is None, f"case {seed}: {what}: {problem}"
        codes.add(code)
        count(f"swaps: exit {code}")
        count("swaps: exchanged in time", not what.endswith("never"))
    assert len(codes) > 1


@pytest.mark.parametrize("moment", range(20, 120, 12))
def test_a_folder_that_was_another_one_for_a_while(moment: int, tmp_path: Path) -> None:
    """Nothing in the source itself changes: its folder is moved away, another has its name, and then it is back. No
    file shows it afterwards; what was opened meanwhile is another file."""
    source, other = tmp_path / "source", tmp_path / "other"
    shutil.copytree(FIXTURES / "gptqmodel-qwen3-w4g32", source)
    shutil.copytree(source, other, copy_function=shutil.copy2)
    other_bytes(other / "model.safetensors")

    def exchange() -> None:
        source.rename(tmp_path / "away")
        other.rename(source)

    def back() -> None:
        source.rename(other)
        (tmp_path / "away").rename(source)

    arguments = ("convert", str(source), "--jobs", "1")
    assert command(*arguments[:2], str(tmp_path / "expected"), *arguments[2:])[0] == 0
    with at_moments({moment: exchange, moment + 12: back}) as counted:
        code, _, error = command(*arguments[:2], str(tmp_path / "out"), *arguments[2:])
    assert counted[0] >= moment
    wanted = (tmp_path / "expected" / "model.safetensors").read_bytes()
    if code == 0:
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted
    else:
        assert code in (2, 3, 4) and error.count("\n") == 1 and not (tmp_path / "out" / "config.json").exists(), error
