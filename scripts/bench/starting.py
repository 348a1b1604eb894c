"""What a conversion costs before its first byte: start-up of a small model, and planning of a very large one.

    python scripts/bench/starting.py [--rounds 5] [--folder DIR] [--tensors 1000000]

Start-up is the time from the start of the process until its first shard is opened to be written. Planning is
`make_plan` alone, in a process of its own, from tensors in memory to every byte's place: time per tensor, and the peak
memory of the process with all of them. Exits 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from bench.measure import Line, Table, apart, environment, fresh, middle, warm, xpuquant
from support.real_shapes import GROUP, Model, config_of, entries, write_checkpoint

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.formats.checkpoint import Array, Checkpoint
from xpuquant.formats.dtypes import nbytes
from xpuquant.formats.safetensors import Tensor

START_GOAL_SECONDS = 0.25
PLAN_GOAL_MICROSECONDS = 10.0
PLAN_GOAL_MIB = 2048.0
TENSORS = 1_000_000
_FEWER = 10
"""Time per tensor is taken at a tenth of them as well: the slope between the two is what one more costs."""

_PLANS = 3

SMALL = Model(10, 0, hidden=512, intermediate=1024, vocab=1024)
"""300 tensors of GPTQ."""


def start_up(folder: Path, rounds: int) -> list[Line]:
    """Seconds until the first shard of a small model is opened, verified conversions."""
    source, out = folder / "source", folder / "out"
    apart(write_checkpoint, source, "gptq", SMALL)
    warm(source)
    seconds = [_first_byte(source, fresh(out)) for _ in range(rounds + 1)][1:]
    shutil.rmtree(source)
    shutil.rmtree(out)
    tensors = sum(1 for _ in entries("gptq", SMALL))
    detail = f"{tensors} tensors; {', '.join(f'{one:.2f}' for one in sorted(seconds))} s"
    return [Line("start-up, to the first shard", middle(seconds), "s", START_GOAL_SECONDS, detail)]


def _first_byte(source: Path, out: Path) -> float:
    """The staged shard is looked for every half millisecond; the finished one, in case it was missed."""
    places = (out / ".xpuquant" / "files" / "model.safetensors", out / "model.safetensors")
    began = time.perf_counter()
    process = subprocess.Popen(
        xpuquant("convert", source, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    while not any(map(os.path.exists, places)) and process.poll() is None:
        time.sleep(0.0005)
    seconds = time.perf_counter() - began
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, "xpuquant convert")
    return seconds


@dataclass(frozen=True)
class Planned:
    """tensors, seconds of processor time of `make_plan`, peak bytes of the process."""

    tensors: int
    seconds: float
    peak: int


def planning(tensors: int) -> list[Line]:
    """Time per tensor and peak memory, GPTQ experts. Of three processes each the fastest: what else runs on a machine
    only adds to processor time, up to two thirds on one that shares its cores."""
    fewer, most = (
        min((apart(plan_once, count) for _ in range(_PLANS)), key=lambda planned: planned.seconds)
        for count in (tensors // _FEWER, tensors)
    )
    each = (most.seconds - fewer.seconds) / (most.tensors - fewer.tensors) * 1e6
    detail = f"{fewer.tensors:,} tensors {fewer.seconds:.2f} s, {most.tensors:,} {most.seconds:.2f} s of processor"
    return [
        Line("planning, a tensor more", each, "µs", PLAN_GOAL_MICROSECONDS, detail),
        Line(f"planning {most.tensors:,} tensors, peak memory", most.peak / 2**20, "MiB", PLAN_GOAL_MIB),
    ]


def plan_once(tensors: int) -> Planned:
    """Plan a checkpoint of about so many tensors, as the command line does: see `xpuquant/__main__.py`."""
    gc.set_threshold(100_000, 50, 100)
    checkpoint = _in_memory(tensors)
    began = time.process_time()
    make_plan(checkpoint, Options())
    seconds = time.process_time() - began
    return Planned(len(checkpoint.tensors), seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _in_memory(count: int) -> Checkpoint:
    """Headers of a GPTQ checkpoint of expert layers; small tensors are made once for each shape."""
    each = sum(1 for _ in entries("gptq", _experts(2))) - sum(1 for _ in entries("gptq", _experts(1)))
    tensors: dict[str, Tensor] = {}
    position = 0
    for name, dtype, shape, _ in entries("gptq", _experts(max(1, round(count / each)))):
        end = position + nbytes(dtype, shape)
        tensors[name] = Tensor(name, dtype, shape, "model.safetensors", position, end)
        position = end
    config: Mapping[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 128,
        "quantization_config": config_of("gptq"),
    }
    return Checkpoint(config, config["quantization_config"], tensors, _small)


def _experts(layers: int) -> Model:
    return Model(0, layers, 64, hidden=128, moe_hidden=128, moe_intermediate=128, vocab=64)


def _small(tensor: Tensor) -> Array | None:
    """A tensor that planning looks into; reading it from a file is not what is measured."""
    return _made(tensor.name.rpartition(".")[2], tensor.shape)


@cache
def _made(suffix: str, shape: tuple[int, ...]) -> Array | None:
    if suffix == "g_idx":
        return (np.arange(shape[0]) // GROUP).astype(np.int32)
    return np.full(shape, 0x77777777, np.int32) if suffix == "qzeros" else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="scratch space (default: a temporary folder)")
    parser.add_argument("--tensors", type=int, default=TENSORS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        table = Table(Path(scratch), arguments.rounds)
        table.add(start_up(Path(scratch), arguments.rounds))
        table.add(planning(arguments.tensors))
    return 0 if table.passed else 1


if __name__ == "__main__":
    sys.exit(main())
