"""What the benchmarks share: processes timed as a whole, lines with a goal, and the table they make.

This process stays small: a child inherits its parent's peak as the start of its own (the kernel keeps the largest of
the memory before and after `exec`). Checkpoints are therefore written in a process of their own; see `apart`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

MEMORY_GOAL_MIB = 1024.0
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    """One finished process: seconds of wall time, seconds of user and system time, peak resident bytes."""

    wall: float
    cpu: float
    peak: int


@dataclass(frozen=True)
class Line:
    """A row of the result: what was measured, the figure, its goal (at most, or with `at_least`, at least)."""

    what: str
    figure: float
    unit: str
    goal: float
    detail: str = ""
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return self.figure >= self.goal if self.at_least else self.figure <= self.goal

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """what, figure, goal, verdict, detail."""
        shown = f"{self.figure:.2f}" if self.figure < 100 else f"{self.figure:.0f}"
        bound = f"{'≥' if self.at_least else '≤'} {self.goal:g}"
        return self.what, f"{shown} {self.unit}", bound, "ok" if self.passed else "MISSED", self.detail


class Table:
    """The result: lines are printed as they come, and kept."""

    _HEAD = ("what", "figure", "goal", "", "")
    _WIDTHS = (53, 18, 7, 6, 0)

    def __init__(self, folder: Path, rounds: int) -> None:
        self.lines: list[Line] = []
        self.conditions = f"{machine(folder)}; xpuquant {_version()} of {date.today().isoformat()}"
        self.head = [f"{self.conditions}; {rounds} rounds"]
        self.head.append(f"load average of the machine before: {os.getloadavg()[0]:.1f}")
        print("\n".join(self.head) + "\n")
        self._print(self._HEAD)

    def add(self, lines: Iterable[Line]) -> None:
        for line in lines:
            self.lines.append(line)
            self._print(line.cells)

    def note(self, text: str) -> None:
        """A sentence between the lines, and in the head of what is kept."""
        self.head.append(text)
        print(f"  {text}", flush=True)

    @property
    def passed(self) -> bool:
        return bool(self.lines) and all(line.passed for line in self.lines)

    def markdown(self) -> str:
        rows = [("what", "figure", "goal", "", "measured"), ("---",) * 5]
        rows += [(*line.cells[:3], line.cells[3].replace("MISSED", "**missed**"), line.cells[4]) for line in self.lines]
        return "\n\n".join(self.head) + "\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"

    def _print(self, cells: Sequence[str]) -> None:
        print(
            "".join(f"{cell:<{width}}  " for cell, width in zip(cells, self._WIDTHS, strict=True)).rstrip(),
            flush=True,
        )


def environment() -> dict[str, str]:
    """Of a process that is timed. What pip installs is compiled beforehand; a source tree is by the first round, which
    warms up, unless that is switched off: compiling all of it takes the better part of a second."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONSAFEPATH": "1"}


def xpuquant(*arguments: str | Path) -> list[str | Path]:
    """A command of this tree, as a user's installation runs it."""
    return [_installed(), "-m", "xpuquant", *arguments]


@cache
def _installed() -> Path:
    """A Python that finds the package in a folder, as one does into which pip has installed it, and what it needs where
    this one does. An editable installation is found by code that runs at each start of Python, for 15 ms."""
    linked = ["bash", "-ec", 'source scripts/lanes/linked_tree.sh; linked_tree "$PWD"']
    tree = Path(subprocess.check_output(linked, cwd=_ROOT, text=True).strip())
    atexit.register(shutil.rmtree, tree, ignore_errors=True)
    venv.create(tree / "venv", symlinks=True)
    places = sysconfig.get_path("purelib", "venv", {"base": str(tree / "venv"), "platbase": str(tree / "venv")})
    needed = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    Path(places, "tree.pth").write_text("\n".join((str(tree), *needed)))
    return tree / "venv" / "bin" / "python"


def timed(command: Sequence[str | Path]) -> Run:
    """Run a command to its end, silently; what it said is shown when it fails.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    with tempfile.TemporaryFile("w+") as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=environment())
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            said.seek(0)
            print(said.read(), file=sys.stderr)
            raise subprocess.CalledProcessError(process.returncode, [str(part) for part in command])
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def durable_copy(source: Path, out: Path) -> Run:
    """`cp` of a folder and `sync` of the copy: its bytes are on the disk, as those of a conversion that returns."""
    copy = timed(["cp", "-r", source, out])
    flush = timed(["sync", *files_in(out)])
    return Run(copy.wall + flush.wall, copy.cpu + flush.cpu, max(copy.peak, flush.peak))


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a process of its own, so that its memory is not ours."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def warm(folder: Path) -> None:
    """Read every file, so that both sides find it in the page cache."""
    for path in files_in(folder):
        with path.open("rb") as file:
            while file.read(1 << 22):
                pass


def files_in(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def fresh(folder: Path) -> Path:
    """An output folder that does not exist; earlier pages are written out so that they burden nobody's turn."""
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    return folder


def median(runs: Iterable[Run]) -> float:
    """Of the wall times."""
    return middle(run.wall for run in runs)


def middle(figures: Iterable[float]) -> float:
    """The median."""
    return statistics.median(figures)


def ratio(runs: Sequence[Run], others: Sequence[Run]) -> float:
    """The median of the ratios of neighbouring runs."""
    return statistics.median(a.wall / b.wall for a, b in zip(runs, others, strict=True))


def peak_line(what: str, runs: Iterable[Run]) -> Line:
    """The largest peak of some runs, against the goal of 1 GiB."""
    return Line(what, max(run.peak for run in runs) / 2**20, "MiB", MEMORY_GOAL_MIB)


def machine(folder: Path) -> str:
    """One line about where this runs; `folder` is where the files lie."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, {memory:.0f} GiB, {_filesystem(folder)}, Python {platform.python_version()}"


def insert(path: Path, mark: str, text: str) -> None:
    """Write `text` into a file: between `<!-- mark -->` and `<!-- /mark -->` where it has them, else as all of it."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    held = path.read_text() if path.exists() else ""
    between = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    block = f"{begin}\n{text}{end}"
    path.write_text(between.sub(lambda match: block, held) if between.search(held) else text)


def _filesystem(folder: Path) -> str:
    """Type of the file system a folder lies on: that of the longest mount point above it."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(len(point), kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(above, default=(0, "unknown file system"))[1]


def _version() -> str:
    from xpuquant import __version__

    return __version__
