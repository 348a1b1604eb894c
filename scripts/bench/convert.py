"""Every goal of speed, memory and growth, measured in one run: one table, and exit code 1 when a goal is missed.

    python scripts/bench/convert.py [--only gptq,ct,...] [--rounds 5] [--folder DIR]
        [--markdown FILE] [--readme FILE] [--svg FILE]

Times are those of whole processes, start-up included, page cache warm, outputs removed in between; a ratio is the
median over rounds of the ratio of two neighbouring runs. What there is to `--only`:

    gptq ct fp8 mxfp4 mxfp8 awq gptq3 gptq2
             conversion, verified and unverified, against a durable copy: `cp` of the output's bytes and `sync` of them,
             for a conversion too has its bytes on the disk when it returns; and peak memory. At least 4 GB written with
             the shapes of Llama-3.1-8B layers and Qwen3-30B-A3B expert layers; 8-bit formats have half the layers, so
             that source, output and copy fit into 23 GB of memory
    jobs     more `--jobs` are never slower
    inspect  a repo of 1,000 shards
    start    the time to the first shard, the time to plan a tensor (starting.py)
    peer     AWQ → compressed-tensors against that library's own converter (awq_to_ct.py)
    growth   time per byte from 1 to 64 layers, time per tensor from 1,000 to 100,000 tensors (growth.py)

It needs 20 GB of disk and about 35 minutes. `--markdown docs/performance.md` renews the table there, `--readme
README.md` the figures that stand in README, `--svg docs/growth.svg` the plot.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from bench import awq_to_ct, readme, starting
from bench import growth as growing
from bench.measure import (
    Line,
    Run,
    Table,
    apart,
    durable_copy,
    files_in,
    fresh,
    insert,
    median,
    middle,
    peak_line,
    ratio,
    timed,
    warm,
    xpuquant,
)
from bench.rates import Rates, measure_rates
from support.real_shapes import FORMATS, Model, write_checkpoint

VERIFIED_GOAL = {"gptq": 2.0, "ct": 2.0, "fp8": 2.0, "mxfp4": 2.0, "mxfp8": 2.0, "awq": 2.5, "gptq3": 2.5, "gptq2": 2.5}
UNVERIFIED_GOAL = {fmt: 1.5 if goal == 2.0 else 2.0 for fmt, goal in VERIFIED_GOAL.items()}
"""Times a durable copy of the output."""

HALVED = ("fp8", "mxfp8")
"""Formats of twice the bytes a weight."""

INSPECT_GOAL_SECONDS = 2.0
JOBS = (1, 2, 4, 8)
JOBS_GOAL = 1.1
"""Not slower, but for the noise of two medians."""

PARTS = (*VERIFIED_GOAL, "jobs", "inspect", "start", "peer", "growth")
_SHARDS = 1000


def convert(source: Path, out: Path, *options: str) -> Run:
    """One conversion into a folder that is not there."""
    return timed(xpuquant("convert", source, fresh(out), *options))


def bench_format(fmt: str, folder: Path, model: Model, rounds: int, rates: Rates) -> list[Line]:
    """One format against a durable copy of what it becomes."""
    source, reference, out = folder / "source", folder / "reference", folder / "out"
    read = apart(write_checkpoint, source, fmt, halved(model) if fmt in HALVED else model)
    warm(source)
    convert(source, reference)
    written = sum(path.stat().st_size for path in files_in(reference))
    copies: list[Run] = []
    plain: list[Run] = []
    verified: list[Run] = []
    for turn in range(rounds + 1):
        runs = (
            durable_copy(reference, fresh(out)),
            convert(source, out, "--no-verify"),
            convert(source, out),
        )
        if turn:  # the first round warms up
            for made, run in zip((copies, plain, verified), runs, strict=True):
                made.append(run)
    for made_folder in (source, reference, out):
        shutil.rmtree(made_folder)
    copied = median(copies)
    floor = rates.floor(written, copied)
    detail = f"{read / 1e9:.1f} GB to {written / 1e9:.1f} GB: durable copy {copied:.2f} s, "
    return [
        Line(
            f"{fmt} → xpu, verified",
            ratio(verified, copies),
            "× durable copy",
            VERIFIED_GOAL[fmt],
            detail + _against(verified, written, floor),
        ),
        Line(
            f"{fmt} → xpu, --no-verify",
            ratio(plain, copies),
            "× durable copy",
            UNVERIFIED_GOAL[fmt],
            _against(plain, written, floor),
        ),
        peak_line(f"{fmt} → xpu, peak memory", [*plain, *verified]),
    ]


def halved(model: Model) -> Model:
    """Half the layers."""
    return replace(model, dense=max(1, model.dense // 2), moe=model.moe // 2)


def _against(runs: list[Run], written: int, floor: str) -> str:
    seconds = median(runs)
    return (
        f"convert {seconds:.2f} s, {written / 1e9 / seconds:.2f} GB/s, {_cpu(runs):.2f} s of processor; limit: {floor}"
    )


def _cpu(runs: list[Run]) -> float:
    return middle(run.cpu for run in runs)


def bench_jobs(folder: Path, model: Model, rounds: int) -> list[Line]:
    """More jobs against the best of fewer, with and without verification."""
    source, out = folder / "source", folder / "out"
    # Half: eight conversions a round.
    size = apart(write_checkpoint, source, "gptq", halved(model))
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
    runs = [timed(xpuquant("inspect", source)) for _ in range(rounds + 1)][1:]
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
    parser.add_argument("--readme", type=Path, help="write the figures of all formats into README's table")
    parser.add_argument("--svg", type=Path, help="write the plot of the growth here")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only {', '.join(sorted(unknown))}: want some of {', '.join(PARTS)}")
    if arguments.readme and not set(FORMATS) <= set(parts):
        parser.error("--readme wants the figures of every format")
    assert set(VERIFIED_GOAL) == set(FORMATS)
    rounds, model = arguments.rounds, Model(dense=arguments.dense, moe=arguments.moe)
    peer = awq_to_ct.peer_python() if "peer" in parts else None
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        table = Table(folder, rounds)
        rates = apart(measure_rates)
        table.note(rates.sentence())
        for fmt in (part for part in parts if part in FORMATS):
            table.add(bench_format(fmt, folder, model, rounds, rates))
        if "jobs" in parts:
            table.add(bench_jobs(folder, model, rounds))
        if "inspect" in parts:
            table.add(bench_inspect(folder, rounds))
        if "start" in parts:
            table.add(starting.start_up(folder, rounds))
            table.add(starting.planning(starting.TENSORS))
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
    if arguments.readme:
        readme.renew(arguments.readme, table.lines, table.conditions)
    return 0 if table.passed else 1


if __name__ == "__main__":
    sys.exit(main())
