"""Loops as machine code: compiled once on a machine, kept in a file that nothing damaged gets through, then loaded
without numba."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core.errors import NumbaError, TypingError

from xpuquant.formats.packing import machine_code
from xpuquant.formats.packing.jit import Loop, compiled

PROGRAM = """
import sys
import numpy as np
sys.path.insert(0, {folder!r})
import loops
print(loops.add_up(np.arange(10, dtype=np.uint32)), "numba" in sys.modules)
"""
LOOPS = """
from xpuquant.formats.packing.jit import compiled

WEIGHT = 1

@compiled
def weighed(value):
    return value * WEIGHT

@compiled
def add_up(values):
    total = 0
    for i in range(len(values)):
        total += int(weighed(values[i]))
    return total
"""


@pytest.fixture
def loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module with loops in a folder of its own, and a cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "loops.py").write_text(LOOPS)
    return tmp_path / "code"


def run(folder: Path) -> tuple[int, bool]:
    """What a process of its own makes of the numbers below ten, and whether it imported numba for it."""
    program = PROGRAM.format(folder=str(folder))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    total, compiled_here = done.stdout.split()
    return int(total), compiled_here == "True"


def kept(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.o"))


def test_one_process_compiles_and_the_next_loads(loops: Path) -> None:
    assert run(loops) == (45, True)
    assert [file.name.partition("-")[0] for file in kept(loops)] == ["loops.add_up"]
    assert run(loops) == (45, False)
    assert not list(loops.rglob("*.o.*")), "nothing unfinished is left"


@pytest.mark.parametrize("damage", ["empty", "cut", 5, 500, 1500])
def test_a_file_that_is_not_as_it_was_written_is_made_anew(loops: Path, damage: str | int) -> None:
    run(loops)
    (file,) = kept(loops)
    good = file.read_bytes()
    bad = {"empty": b"", "cut": good[:-1]}.get(str(damage))
    if isinstance(damage, int):
        place = damage % len(good)
        bad = good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]
    assert bad is not None
    file.write_bytes(bad)
    assert run(loops) == (45, True)
    assert file.read_bytes() == good, "and kept again"
    assert run(loops) == (45, False)


def test_a_file_of_another_loop_is_not_taken_for_it(loops: Path) -> None:
    """Whatever its name says: the digest is of what it was made of, too."""
    run(loops)
    (before,) = kept(loops)
    (loops / "loops.py").write_text(LOOPS.replace("WEIGHT = 1", "WEIGHT = 2"))
    assert run(loops) == (90, True)
    (after,) = set(kept(loops)) - {before}
    shutil.copyfile(before, after)
    assert run(loops) == (90, True)


def test_where_the_module_s_folder_cannot_be_written_the_user_s_takes_it(loops: Path, tmp_path: Path) -> None:
    (loops / "__pycache__").write_text("not a folder")
    assert run(loops) == (45, True)
    assert kept(tmp_path / "cache" / "xpuquant")
    assert run(loops) == (45, False)


def test_where_no_folder_can_be_written_each_process_compiles(loops: Path, tmp_path: Path) -> None:
    (loops / "__pycache__").write_text("not a folder")
    (tmp_path / "cache").write_text("not a folder")
    assert run(loops) == run(loops) == (45, True)


def test_the_processor_is_part_of_what_it_is_made_for(loops: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As numba's own variables have it, by which `scripts/lanes/isa` caps it."""
    run(loops)
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    assert run(loops) == (45, True)
    assert len(kept(loops)) == 2


@compiled
def larger(first: np.ndarray, second: np.ndarray, times: int) -> int:
    count = 0
    for i in range(len(first)):
        count += first[i] > times * second[i]
    return count


@compiled
def any_above(values: np.ndarray, limits: tuple[Any, ...]) -> bool:
    for i in range(len(values)):
        for limit in limits:
            if values[i] > limit:
                return True
    return False


def test_types_and_how_elements_lie() -> None:
    """Every dtype, every second element, elements that lie at odd addresses, what must not be written."""
    for dtype in (np.uint8, np.int16, np.uint32, np.uint64, np.float32, np.float64):
        first, second = np.arange(40).astype(dtype), np.ones(40, dtype)
        assert larger(first, second, 7) == 32
        assert larger(first[::2], second[::2], 7) == 16
        octets = np.frombuffer(b"x" + first.tobytes(), np.uint8)[1:]
        assert larger(octets.view(dtype), second, 7) == 32
        assert not octets.flags.writeable
    assert any_above(np.arange(3), (5, 1))
    assert not any_above(np.arange(3, dtype=np.uint32), (np.uint32(5), np.uint32(2)))
    with pytest.raises(NumbaError, match=">u4"):
        larger(np.arange(3, dtype=">u4"), np.arange(3, dtype=np.uint32), 1)


def test_a_loop_allocates_nothing_and_calls_nothing() -> None:
    """Its machine code is loaded by itself: what it would call is not there."""

    @compiled
    def makes_room(values: np.ndarray) -> int:
        return int(np.zeros(len(values), np.uint8)[0])

    with pytest.raises(TypingError, match="zeros"):
        makes_room(np.arange(3))

    @compiled
    def root(values: np.ndarray) -> int:
        return int(np.expm1(values[0]))

    with pytest.raises(AssertionError, match=r"root calls .*expm1.*: loops call nothing"):
        root(np.ones(3))


def test_a_loop_gives_whole_numbers() -> None:
    @compiled
    def half(value: int) -> float:
        return value / 2

    with pytest.raises(AssertionError, match="half gives float64"):
        half(3)


def test_another_way_of_passing_arguments_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba's convention is its own affair: a release that changes it must not compute nonsense."""
    monkeypatch.setattr(machine_code, "_passed", lambda key: ["pointer", "pointer", "i64"])
    assert isinstance(larger, Loop)
    array = (np.dtype(np.uint8), 1, True, True)
    with pytest.raises(AssertionError, match=r"numba [\d.]+ passes arguments in a new way, \['pointer', 'pointer', "):
        machine_code.object_code(larger.function, (array, array, (np.dtype(np.int64),)))
