"""How fast is a conversion, as a multiple of copying the same files?

    python scripts/bench_convert.py [--rounds 5] [--formats gptq,ct,...] [--folder DIR] [--dense 20 --moe 6]

For each format: a checkpoint of at least 4 GB with the shapes of Llama-3.1-8B layers and Qwen3-30B-A3B expert layers is
written; then, in turn, `cp -r` and `xpuquant convert` of it run as whole processes, start-up included, page cache warm,
outputs removed in between. Reported are medians of the ratios of neighbouring runs, and peak memory. Exits 1 when
a goal is missed.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bench_checkpoints import FORMATS, Model, write_checkpoint

COPY_GOAL = {"gptq": 2.0, "ct": 2.0, "fp8": 2.0, "mxfp4": 2.0, "awq": 3.0, "gptq3": 3.0, "gptq2": 3.0}
VERIFY_GOAL = 3.0
MEMORY_GOAL_BYTES = 1 << 30


@dataclass(frozen=True)
class Run:
    """One finished process: seconds of wall time, user and system time, peak resident bytes."""

    wall: float
    cpu: float
    peak: int


@dataclass(frozen=True)
class Line:
    """A row of the result: what was compared, the median ratio or figure, and the goal."""

    what: str
    figure: float
    unit: str
    goal: float
    detail: str

    @property
    def passed(self) -> bool:
        return self.figure <= self.goal


def timed(command: Sequence[str]) -> Run:
    """Run a command to its end; raises CalledProcessError when it fails."""
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def warm(folder: Path) -> None:
    """Read every file, so that both sides find it in the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def fresh(folder: Path) -> Path:
    """An output folder that does not exist; earlier pages are written out so that they burden nobody's turn."""
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    return folder


def bench(fmt: str, folder: Path, model: Model, rounds: int) -> list[Line]:
    """Measure one format."""
    source, out = folder / fmt, folder / "out"
    size = write_checkpoint(source, fmt, model)
    copies: list[Run] = []
    plain: list[Run] = []
    verified: list[Run] = []
    convert = [sys.executable, "-m", "xpuquant", "convert", str(source), str(out)]
    try:
        warm(source)
        for turn in range(rounds + 1):
            runs = (
                timed(["cp", "-r", str(source), str(fresh(out))]),
                timed([*convert[:-1], str(fresh(out)), "--no-verify"]),
                timed([*convert[:-1], str(fresh(out))]),
            )
            if turn:  # the first round warms up
                for runs_of, run in zip((copies, plain, verified), runs, strict=True):
                    runs_of.append(run)
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
    detail = (
        f"{size / 1e9:.1f} GB; cp {_median(copies):.2f} s, convert {_median(plain):.2f} s "
        f"({size / 1e9 / _median(plain):.2f} GB/s), verified {_median(verified):.2f} s"
    )
    peak = max(run.peak for run in plain + verified)
    return [
        Line(f"{fmt} → xpu, --no-verify", _ratio(plain, copies), "× cp", COPY_GOAL[fmt], detail),
        Line(f"{fmt} → xpu, verified", _ratio(verified, plain), "× unverified", VERIFY_GOAL, ""),
        Line(f"{fmt} peak memory", peak / 2**20, "MiB", MEMORY_GOAL_BYTES / 2**20, ""),
    ]


def _median(runs: Sequence[Run]) -> float:
    return statistics.median(run.wall for run in runs)


def _ratio(runs: Sequence[Run], others: Sequence[Run]) -> float:
    return statistics.median(a.wall / b.wall for a, b in zip(runs, others, strict=True))


def machine() -> str:
    """One line about where this ran."""
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument(
        "--folder", type=Path, default=None, help="scratch space (default: a temporary folder)"
    )
    parser.add_argument("--dense", type=int, default=Model.dense)
    parser.add_argument("--moe", type=int, default=Model.moe)
    arguments = parser.parse_args()
    model = Model(dense=arguments.dense, moe=arguments.moe)
    print(machine())
    print(f"load average before: {os.getloadavg()[0]:.1f}; {arguments.rounds} rounds\n")
    print(f"{'what':28} {'figure':>10} {'goal':>8}         detail", flush=True)
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        for fmt in arguments.formats.split(","):
            for line in bench(fmt, Path(scratch), model, arguments.rounds):
                lines.append(line)
                verdict = "ok" if line.passed else "MISSED"
                figure = f"{line.figure:.2f}" if line.figure < 100 else f"{line.figure:.0f}"
                print(
                    f"{line.what:28} {figure:>10} {line.goal:>8.0f} {verdict:6} {line.unit}  {line.detail}",
                    flush=True,
                )
    peak_children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"\nlargest process: {peak_children:.0f} MiB; load average after: {os.getloadavg()[0]:.1f}")
    return 0 if all(line.passed for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
