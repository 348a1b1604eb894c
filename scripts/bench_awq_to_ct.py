"""AWQ to compressed-tensors: xpuquant against compressed-tensors' own converter, on the same input.

    python scripts/bench_awq_to_ct.py [--rounds 3] [--folder DIR] [--dense 34] [--moe 0]

An asymmetric AWQ checkpoint with the shapes of Llama-3.1-8B layers (and Qwen3-30B-A3B expert layers) is written; then,
in turn, `cp -r`, `xpuquant convert --layout compressed-tensors` (unverified and verified) and
`compressed_tensors.entrypoints.convert.convert_checkpoint` convert it as whole processes, start-up included, page cache
warm, outputs removed in between. The peer runs in an environment of its own, `.venv-compressed-tensors` in
$XPUQUANT_VENVS or the repository's root, which is made where it is missing. The two outputs are compared, tensor by
tensor, once. Reported are medians, and the median of the ratios of neighbouring runs; exits 1 when the goal is missed.
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

sys.path.insert(0, str(Path(__file__).parent))
from bench_checkpoints import Model, write_checkpoint
from bench_convert import Run, fresh, machine, timed, warm

from xpuquant.convert.shards import ShardReader

GOAL = 20.0
PEER = "compressed-tensors==0.20.0"
_PEER_PROGRAM = """
import sys
from compressed_tensors.entrypoints.convert import AutoAWQConverter, convert_checkpoint
source, out = sys.argv[1:]
convert_checkpoint(source, out, AutoAWQConverter.from_pretrained(source), max_workers=2)
"""


def peer_python() -> Path:
    """The peer's environment, made where it is missing."""
    venv = Path(os.environ.get("XPUQUANT_VENVS", Path(__file__).parent.parent)) / ".venv-compressed-tensors"
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
        for tensor in ShardReader(folder, (shard.name,)).header(shard.name).values():
            if tensor.name.endswith(".qzeros"):
                data[tensor.begin : tensor.end] = rng.integers(0, 256, tensor.end - tensor.begin, np.uint8)
        data.flush()


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and sha256 of everything in a checkpoint."""
    import hashlib

    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        data = np.memmap(shard, np.uint8, "r")
        for tensor in ShardReader(folder, (shard.name,)).header(shard.name).values():
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dense", type=int, default=34)
    parser.add_argument("--moe", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, default=None, help="scratch space (default: a temporary folder)"
    )
    arguments = parser.parse_args()
    python = peer_python()
    print(machine())
    print(f"load average before: {os.getloadavg()[0]:.1f}; {arguments.rounds} rounds; peer: {PEER}\n")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        source, out, other = (Path(scratch) / name for name in ("source", "out", "peer"))
        size = write_checkpoint(
            source, "awq", Model(dense=arguments.dense, moe=arguments.moe), shard_bytes=500_000_000
        )
        make_asymmetric(source)
        ours = [sys.executable, "-m", "xpuquant", "convert", str(source), str(out)]
        ours += ["--layout", "compressed-tensors"]
        theirs = [str(python), "-c", _PEER_PROGRAM, str(source), str(other)]
        runs: dict[str, list[Run]] = {"cp -r": [], "xpuquant --no-verify": [], "xpuquant": [], "peer": []}
        warm(source)
        for turn in range(arguments.rounds):
            runs["cp -r"].append(timed(["cp", "-r", str(source), str(fresh(out))]))
            fresh(out)
            runs["xpuquant --no-verify"].append(timed([*ours, "--no-verify"]))
            fresh(out)
            runs["xpuquant"].append(timed(ours))
            fresh(other).mkdir()
            runs["peer"].append(timed(theirs))
            if not turn:
                print(compare(out, other) + "\n", flush=True)
                config = json.loads((other / "config.json").read_text())["quantization_config"]
                assert config["quant_method"] == "compressed-tensors", config
        shutil.rmtree(source)
    print(f"{'what':24} {'median':>9} {'CPU':>9} {'GB/s':>7} {'peak MiB':>9}   AWQ, {size / 1e9:.2f} GB")
    for name, made in runs.items():
        seconds = statistics.median(run.wall for run in made)
        cpu = statistics.median(run.cpu for run in made)
        peak = max(run.peak for run in made) / 2**20
        print(f"{name:24} {seconds:8.2f}s {cpu:8.2f}s {size / 1e9 / seconds:7.2f} {peak:9.0f}")
    passed = True
    for name in ("xpuquant --no-verify", "xpuquant"):
        ratio = statistics.median(b.wall / a.wall for a, b in zip(runs[name], runs["peer"], strict=True))
        verdict = "" if name == "xpuquant" else f"goal {GOAL:.0f}: {'ok' if ratio >= GOAL else 'MISSED'}"
        cpu = statistics.median(b.cpu / a.cpu for a, b in zip(runs[name], runs["peer"], strict=True))
        print(f"peer / {name}: {ratio:.1f} in wall time, {cpu:.1f} in CPU time   {verdict}")
        passed &= name == "xpuquant" or ratio >= GOAL
    print(f"load average after: {os.getloadavg()[0]:.1f}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
