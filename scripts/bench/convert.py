"""Every goal of speed, memory and growth, measured in one run: one table, and exit code 1 when a goal is missed.

    python scripts/bench/convert.py [--only gptq,ct,...] [--rounds 5] [--folder DIR] [--markdown FILE] [--svg FILE]

Times are those of whole processes, start-up included, page cache warm, outputs removed in between; a ratio is the
median over rounds of the ratio of two neighbouring runs. What there is to `--only`:

    gptq ct fp8 mxfp4 awq gptq3 gptq2
             conversion against `cp -r` of the source, verified against unverified, and peak memory: at least 4 GB with
             the shapes of Llama-3.1-8B layers and Qwen3-30B-A3B expert layers. A conversion has its bytes on the disk
             when it returns, a copy in memory; the ratio to a copy and the flush of it stands beside, as information
    jobs     more `--jobs` are never slower
    inspect  a repo of 1,000 shards
    peer     AWQ → compressed-tensors against that library's own converter (awq_to_ct.py)
    growth   time per byte from 1 to 64 layers, time per tensor from 1,000 to 100,000 tensors (growth.py)

It needs 15 GB of disk and about 25 minutes. `--markdown docs/performance.md` renews the table there, `--svg
docs/growth.svg` the plot.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from bench import awq_to_ct
from bench import growth as growing
from bench.measure import XPUQUANT, Line, Run, Table, apart, fresh, insert, median, peak_line, ratio, timed, warm
from support.real_shapes import FORMATS, Model, write_checkpoint

COPY_GOAL = {"gptq": 2.0, "ct": 2.0, "fp8": 2.0, "mxfp4": 2.0, "awq": 3.0, "gptq3": 3.0, "gptq2": 3.0}
VERIFY_GOAL = 3.0
INSPECT_GOAL_SECONDS = 2.0
JOBS = (1, 2, 4, 8)
JOBS_GOAL = 1.1
"""Not slower, but for the noise of two medians."""

PARTS = (*COPY_GOAL, "jobs", "inspect", "peer", "growth")
_SHARDS = 1000


def convert(source: Path, out: Path, *options: str) -> Run:
    """One conversion into a folder that is not there."""
    return timed([*XPUQUANT, "convert", source, fresh(out), *options])


def bench_format(fmt: str, folder: Path, model: Model, rounds: int) -> list[Line]:
    """One format against `cp`."""
    source, out = folder / "source", folder / "out"
    size = apart(write_checkpoint, source, fmt, model)
    copies: list[Run] = []
    flushes: list[Run] = []
    plain: list[Run] = []
    verified: list[Run] = []
    warm(source)
    for turn in range(rounds + 1):
        copy = timed(["cp", "-r", source, fresh(out)])
        flush = timed(["sync", *out.iterdir()])
        runs = (copy, flush, convert(source, out, "--no-verify"), convert(source, out))
        if turn:  # the first round warms up
            for made, run in zip((copies, flushes, plain, verified), runs, strict=True):
                made.append(run)
    shutil.rmtree(source)
    shutil.rmtree(out)
    seconds = median(plain)
    durable = [
        Run(copy.wall + flush.wall, copy.cpu + flush.cpu, copy.peak)
        for copy, flush in zip(copies, flushes, strict=True)
    ]
    detail = (
        f"{size / 1e9:.1f} GB: cp {median(copies):.2f} s + {median(flushes):.2f} s until it is on the disk, "
        f"convert {seconds:.2f} s ({ratio(plain, durable):.2f} × both), {size / 1e9 / seconds:.2f} GB/s, "
        f"{_cpu(plain):.2f} s of processor"
    )
    checked = median(verified)
    checking = f"{checked:.2f} s, {size / 1e9 / checked:.2f} GB/s, {_cpu(verified):.2f} s of processor"
    return [
        Line(f"{fmt} → xpu, --no-verify", ratio(plain, copies), "× cp", COPY_GOAL[fmt], detail),
        Line(f"{fmt} → xpu, verified", ratio(verified, plain), "× unverified", VERIFY_GOAL, checking),
        peak_line(f"{fmt} → xpu, peak memory", [*plain, *verified]),
    ]


def _cpu(runs: list[Run]) -> float:
    return sorted(run.cpu for run in runs)[len(runs) // 2]


def bench_jobs(folder: Path, model: Model, rounds: int) -> list[Line]:
    """More jobs against the best of fewer, with and without verification."""
    source, out = folder / "source", folder / "out"
    # Half: eight conversions a round.
    half = Model(dense=max(1, model.dense // 2), moe=model.moe // 2, experts=model.experts)
    size = apart(write_checkpoint, source, "gptq", half)
    runs: dict[tuple[int, bool], list[Run]] = {(jobs, verify): [] for verify in (False, True) for jobs in JOBS}
    warm(source)
    convert(source, out)
    for _ in range(rounds):
        for (jobs, verify), made in runs.items():
            made.append(convert(source, out, "--jobs", str(jobs), *["--no-verify"][verify:]))
    shutil.rmtree(source)
    shutil.rmtree(out)
    lines = []
    for verify in (False, True):
        seconds = {jobs: median(runs[jobs, verify]) for jobs in JOBS}
        for fewer, jobs in enumerate(JOBS[1:], 1):
            best = min(seconds[other] for other in JOBS[:fewer])
            detail = f"{seconds[jobs]:.2f} s, the best of fewer {best:.2f} s; gptq, {size / 1e9:.1f} GB"
            what = f"--jobs {jobs}, {'verified' if verify else '--no-verify'}"
            lines.append(Line(what, seconds[jobs] / best, "× fewer jobs", JOBS_GOAL, detail))
    return lines


def bench_inspect(folder: Path, rounds: int) -> list[Line]:
    """`inspect` of a repo of many shards; the weights are small, only headers are read."""
    source = folder / "source"
    apart(write_checkpoint, source, "gptq", growing.small_tensors(40), 68_000)
    shards = len(list(source.glob("*.safetensors")))
    assert shards >= _SHARDS, shards
    warm(source)
    runs = [timed([*XPUQUANT, "inspect", source]) for _ in range(rounds + 1)][1:]
    shutil.rmtree(source)
    tensors = growing.count(growing.small_tensors(40))
    return [Line("inspect", median(runs), "s", INSPECT_GOAL_SECONDS, f"{shards} shards, {tensors} tensors")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="scratch space (default: a temporary folder)")
    parser.add_argument("--dense", type=int, default=Model.dense, help="Llama-3.1-8B layers")
    parser.add_argument("--moe", type=int, default=Model.moe, help="Qwen3-30B-A3B layers")
    parser.add_argument("--peer-layers", type=int, default=awq_to_ct.LAYERS)
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    parser.add_argument("--svg", type=Path, help="write the plot of the growth here")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only {', '.join(sorted(unknown))}: want some of {', '.join(PARTS)}")
    assert set(COPY_GOAL) == set(FORMATS)
    rounds, model = arguments.rounds, Model(dense=arguments.dense, moe=arguments.moe)
    peer = awq_to_ct.peer_python() if "peer" in parts else None
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        table = Table(folder, rounds)
        for fmt in (part for part in parts if part in FORMATS):
            table.add(bench_format(fmt, folder, model, rounds))
        if "jobs" in parts:
            table.add(bench_jobs(folder, model, rounds))
        if "inspect" in parts:
            table.add(bench_inspect(folder, rounds))
        if peer is not None:
            lines, same = awq_to_ct.bench(folder, peer, Model(arguments.peer_layers, 0), rounds)
            table.note(same)
            table.add(lines)
        if "growth" in parts:
            growth = growing.measure(folder, min(rounds, 3))
            table.add(growth.lines)
            if arguments.svg:
                arguments.svg.write_text(growing.plot(growth))
    if arguments.markdown:
        insert(arguments.markdown, "bench_convert", table.markdown())
    return 0 if table.passed else 1


if __name__ == "__main__":
    sys.exit(main())
