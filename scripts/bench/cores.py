"""What more cores would give: the stages of a verified conversion, measured on this machine, put into a model.

    python scripts/bench/cores.py [--cores 16] [--format gptq] [--dense 4] [--moe 2] [--folder /dev/shm]
                                  [--markdown docs/performance.md]

One conversion with one worker, in memory (`/dev/shm`), so that no disk is waited for: the processor seconds of each of
its stages. The model: a stage of independent pieces takes its seconds over the number of cores, but never less than its
longest chain, which is work that one thread has to do after the other. It knows nothing of memory bandwidth, of caches
that cores share, and of Python's lock. How far that carries is shown by what this machine has: the same conversion with
one worker and with one for each core, as whole processes, beside what the model says of them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from bench.measure import apart, fresh, insert, machine, timed, warm, xpuquant
from bench.rates import Rates, measure_rates
from support.real_shapes import FORMATS, Model, write_checkpoint


@dataclass(frozen=True)
class Stage:
    """Part of a conversion.

    seconds  of processor, all of it
    chain    of them, those that one thread has to do after the other, at least
    why      what that chain is
    """

    what: str
    seconds: float
    chain: float
    why: str

    def on(self, cores: int) -> float:
        """Seconds that it takes."""
        return max(self.seconds / cores, self.chain)


@dataclass(frozen=True)
class Measured:
    """Processor seconds of one conversion with one worker.

    total           of the process
    writing         reading, making, hashing and writing the shards
    comparing       every value with the source
    kernels         of them `loading` the library
    written         bytes of all shards; `largest_shard` of the largest
    largest_module  share of the bytes that the largest module has
    """

    total: float
    writing: float
    comparing: float
    kernels: float
    loading: float
    written: int
    largest_shard: int
    largest_module: float


def measure(source: Path, out: Path) -> Measured:
    """Convert and verify with one worker, in this process."""
    import xpuquant.conversion.runs.request as request
    import xpuquant.conversion.verify.run as verifying
    from xpuquant.conversion.cli.app import run
    from xpuquant.conversion.plan.plan import Plan
    from xpuquant.kernels.onednn import api

    seconds: dict[str, float] = {}
    plans: list[Plan] = []

    def measured(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            plans.extend(one for one in given if isinstance(one, Plan))
            began = time.process_time()
            try:
                return function(*given, **named)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.process_time() - began

        return call

    request.execute_plan = measured("writing", request.execute_plan)
    verifying.verify_values = measured("comparing", verifying.verify_values)
    verifying._kernels = measured("kernels", verifying._kernels)
    api.engine = measured("loading", api.engine)
    code = run(["convert", str(source), str(out), "--jobs", "1", "--quiet"])
    assert code == 0, "the conversion failed"
    plan, sizes = plans[0], [shard.nbytes for shard in plans[0].shards]
    return Measured(
        time.process_time(),
        seconds["writing"],
        seconds["comparing"],
        seconds["kernels"],
        seconds["loading"],
        sum(sizes),
        max(sizes),
        max(module.nbytes for module in plan.modules) / sum(sizes),
    )


def stages(found: Measured, rates: Rates) -> list[tuple[Stage, ...]]:
    """The phases of a conversion, one after the other; the stages of each run side by side."""
    hashing = found.written / rates.sha256
    kernels = found.kernels - found.loading
    rest = found.total - found.writing - found.comparing - found.kernels
    return [
        (Stage("start, plan, index, reports", rest, rest, "all of it"),),
        (
            Stage("reading, making, writing", found.writing - hashing, 0.0, "none: idle threads make pieces ahead"),
            Stage("sha256", hashing, found.largest_shard / rates.sha256, "the largest shard"),
        ),
        (
            Stage("comparing, counting", found.comparing, found.comparing * found.largest_module, "the largest module"),
            Stage("kernels", kernels, 0.0, "none: a matrix of each module, and of each shape"),
            Stage("loading the kernels", found.loading, found.loading, "all of it, beside the comparison"),
        ),
    ]


def seconds_on(phases: Sequence[Sequence[Stage]], cores: int) -> float:
    """What the model says of a whole conversion."""
    return sum(
        max(sum(stage.seconds for stage in phase) / cores, *(stage.chain for stage in phase)) for phase in phases
    )


def table(phases: Sequence[Sequence[Stage]], written: int, cores: int) -> str:
    """Markdown: each stage, its longest chain, and the share of all work that this is."""
    whole = sum(stage.seconds for phase in phases for stage in phase)
    rows = [("stage", "s of processor", "s per GB", "longest chain", f"on {cores} cores"), ("---",) * 5]
    for phase in phases:
        for stage in phase:
            above = stage.chain > stage.seconds / cores
            chain = f"{stage.chain:.2f} s: {stage.why}" if stage.chain else stage.why
            shown = f"{stage.on(cores):.2f} s" + (", its chain" if above else "")
            rows.append((stage.what, f"{stage.seconds:.2f}", f"{stage.seconds / written * 1e9:.2f}", chain, shown))
    all_of_it = seconds_on(phases, cores)
    gain = f"{all_of_it:.2f} s: {seconds_on(phases, 1) / all_of_it:.1f} times as fast as one core"
    rows.append(("together", f"{whole:.2f}", f"{whole / written * 1e9:.2f}", "", gain))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=16)
    parser.add_argument("--format", default="gptq", choices=FORMATS)
    parser.add_argument("--dense", type=int, default=4, help="Llama-3.1-8B layers")
    parser.add_argument("--moe", type=int, default=2, help="Qwen3-30B-A3B layers")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="scratch space, in memory")
    parser.add_argument("--markdown", type=Path, help="renew the table in this file")
    given = parser.parse_args()
    # As `xpuquant/__main__.py` has it: threads of OpenBLAS wait by spinning, which would count as work of the kernels.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        source, out = Path(scratch) / "source", Path(scratch) / "out"
        apart(write_checkpoint, source, given.format, Model(given.dense, given.moe))
        warm(source)
        apart(measure, source, fresh(out))  # compiles what is not compiled yet
        phases = stages(found := apart(measure, source, fresh(out)), apart(measure_rates))
        here = len(os.sched_getaffinity(0))
        compared = []
        for jobs in sorted({1, here}):
            run = timed(xpuquant("convert", source, fresh(out), "--jobs", str(jobs)))
            compared.append(f"{jobs} at work: {run.wall:.1f} s measured, {seconds_on(phases, jobs):.1f} by the model")
        text = f"{machine(Path(scratch))}, load average {os.getloadavg()[0]:.1f}; {given.format}, "
        text += f"{found.written / 1e9:.1f} GB in memory. {'; '.join(compared)}.\n\n"
        text += table(phases, found.written, given.cores)
    print(text)
    if given.markdown:
        insert(given.markdown, "more_cores", text)


if __name__ == "__main__":
    main()
