"""AWQ to compressed-tensors: xpuquant against compressed-tensors' own converter, on the same input.

    python scripts/bench/awq_to_ct.py [--rounds 5] [--folder DIR] [--dense 34] [--moe 0]

An asymmetric AWQ checkpoint with the shapes of Llama-3.1-8B layers (and Qwen3-30B-A3B expert layers) is written; then,
in turn, `cp -r`, `xpuquant convert --layout compressed-tensors` (unverified and verified) and
`compressed_tensors.entrypoints.convert.convert_checkpoint` convert it as whole processes, start-up included, page cache
warm, outputs removed in between. The peer runs in an environment of its own, `.venv-compressed-tensors` in
$XPUQUANT_VENVS or the repository's root, which is made where it is missing. The two outputs are compared, tensor by
tensor, once. The ratio is the median of those of neighbouring runs; exits 1 when the goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from bench.measure import Line, Run, Table, apart, fresh, median, ratio, timed, warm, xpuquant
from support.real_shapes import Model, write_checkpoint

from xpuquant.conversion.sources.shard_reader import ShardReader
from xpuquant.conversion.tree import Tree

GOAL = 25.0
LAYERS = 34
"""Llama-3.1-8B layers that make 4 GB."""

SHARD_BYTES = 500_000_000
"""The peer's unit of work, of which it holds two at a time in memory."""

PEER = "compressed-tensors==0.20.0"
_PEER_PROGRAM = """
import sys
from compressed_tensors.entrypoints.convert import AutoAWQConverter, convert_checkpoint
source, out = sys.argv[1:]
convert_checkpoint(source, out, AutoAWQConverter.from_pretrained(source), max_workers=2)
"""


def peer_python() -> Path:
    """The peer's environment, made where it is missing."""
    venv = Path(os.environ.get("XPUQUANT_VENVS", Path(__file__).resolve().parents[2])) / ".venv-compressed-tensors"
    mark = venv / ".installed"
    if not mark.exists() or mark.read_text() != PEER:
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([venv / "bin/pip", "install", "-q", "torch==2.13.0", PEER], check=True)
        mark.write_text(PEER)
    return venv / "bin/python"


def make_asymmetric(folder: Path) -> None:
    """Random zero points: those of the other benchmarks are all 8, and we would rightly not store them."""
    rng = np.random.default_rng(1)
    for shard in folder.glob("*.safetensors"):
        data = np.memmap(shard, np.uint8, "r+")
        for tensor in ShardReader(Tree(folder), (shard.name,)).header(shard.name).values():
            if tensor.name.endswith(".qzeros"):
                data[tensor.begin : tensor.end] = rng.integers(0, 256, tensor.end - tensor.begin, np.uint8)
        data.flush()


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and sha256 of everything in a checkpoint."""
    import hashlib

    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        data = np.memmap(shard, np.uint8, "r")
        for tensor in ShardReader(Tree(folder), (shard.name,)).header(shard.name).values():
            digest = hashlib.sha256(data[tensor.begin : tensor.end]).digest()
            found[tensor.name] = (tensor.dtype, tensor.shape, digest)
    return found


def compare(ours: Path, theirs: Path) -> str:
    """What differs between the two outputs, in a sentence."""
    mine, other = tensors(ours), tensors(theirs)
    differ = [name for name in mine.keys() & other.keys() if mine[name] != other[name]]
    only = (mine.keys() - other.keys(), other.keys() - mine.keys())
    if differ or any(only):
        shown = sorted([*differ, *only[0], *only[1]])[:4]
        return (
            f"outputs differ: {len(differ)} tensors in content, {len(only[0])} only here, {len(only[1])} only there: "
            f"{', '.join(shown)}"
        )
    return f"both outputs hold the same {len(mine)} tensors, byte for byte"


def write_source(folder: Path, model: Model) -> int:
    """An asymmetric AWQ checkpoint; returns its bytes."""
    size = write_checkpoint(folder, "awq", model, SHARD_BYTES)
    make_asymmetric(folder)
    return size


def bench(folder: Path, python: Path, model: Model, rounds: int) -> tuple[list[Line], str]:
    """The lines of the table, and what the comparison of the outputs said.

    Args:
        folder: scratch space.
        python: of the peer's environment.
    """
    source, out, other = (folder / name for name in ("source", "out", "peer"))
    size = apart(write_source, source, model)
    ours = xpuquant("convert", source, out, "--layout", "compressed-tensors")
    copies: list[Run] = []
    plain: list[Run] = []
    verified: list[Run] = []
    theirs: list[Run] = []
    same = ""
    warm(source)
    for turn in range(rounds):
        copies.append(timed(["cp", "-r", source, fresh(out)]))
        fresh(out)
        verified.append(timed(ours))
        fresh(out)
        plain.append(timed([*ours, "--no-verify"]))
        fresh(other).mkdir()
        theirs.append(timed([python, "-c", _PEER_PROGRAM, source, other]))
        if not turn:
            same = apart(compare, out, other)
            config = json.loads((other / "config.json").read_text())["quantization_config"]
            assert config["quant_method"] == "compressed-tensors", config
        shutil.rmtree(other)
    shutil.rmtree(source)
    shutil.rmtree(out)
    detail = (
        f"{size / 1e9:.1f} GB: {PEER} {median(theirs):.1f} s, xpuquant {median(plain):.2f} s, verified "
        f"{median(verified):.2f} s ({ratio(theirs, verified):.1f} times), cp {median(copies):.2f} s; processor "
        f"{_cpu(theirs):.1f} s against {_cpu(plain):.2f} s"
    )
    what = "awq → compressed-tensors, --no-verify"
    return [Line(what, ratio(theirs, plain), "times faster", GOAL, detail, at_least=True)], same


def _cpu(runs: list[Run]) -> float:
    return statistics.median(run.cpu for run in runs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dense", type=int, default=LAYERS)
    parser.add_argument("--moe", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="scratch space (default: a temporary folder)")
    arguments = parser.parse_args()
    python = peer_python()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        table = Table(Path(scratch), arguments.rounds)
        model = Model(dense=arguments.dense, moe=arguments.moe)
        lines, same = bench(Path(scratch), python, model, arguments.rounds)
        table.note(same)
        table.add(lines)
    return 0 if table.passed else 1


if __name__ == "__main__":
    sys.exit(main())
