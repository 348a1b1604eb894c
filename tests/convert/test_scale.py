"""What must hold at any size: a conversion that is killed again and again, and memory that is bounded."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import FIXTURES
from support.real_shapes import Model, write_checkpoint

MOE = FIXTURES / "gptqmodel-qwen3moe-w4g32"
KILLS = int(os.environ.get("XPUQUANT_KILLS", "12"))
"""How often a conversion is killed, through the page cache and past it; 50 for the record in docs/performance.md."""

GIB = 1 << 30
_MEASURED = """
import sys
from xpuquant.__main__ import main
try:
    main()
finally:
    status = open("/proc/self/status").read()
    print("VmHWM", status.split("VmHWM:")[1].split()[0], file=sys.stderr)
"""


class Output:
    """One output folder under conversion, seen from outside while it is killed."""

    def __init__(self, folder: Path, options: list[str]) -> None:
        self.out = folder / "x"
        folder.mkdir(parents=True)
        self._command = [
            sys.executable,
            "-m",
            "xpuquant",
            "convert",
            str(MOE),
            "x",
            "--max-shard-size",
            "20kB",
        ]
        self._command += ["--jobs", "1", "--json", *options]

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command, cwd=self.out.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    @property
    def is_loadable(self) -> bool:
        return (self.out / "config.json").exists()

    @property
    def is_finished(self) -> bool:
        return self.is_loadable and not (self.out / ".xpuquant").exists()

    def noted(self) -> list[str]:
        """Shards that the journal calls finished; none where there is no journal (any more)."""
        try:
            lines = (self.out / ".xpuquant" / "journal.jsonl").read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        entries = [json.loads(line) for line in lines[1:] if line.endswith(b"\n")]
        return [entry["shard"] for entry in entries if "shard" in entry]

    def identities(self) -> dict[str, tuple[int, int]]:
        """Shard → inode and time of the last change of its content, which renaming leaves alone."""
        found = {}
        for folder in (self.out / ".xpuquant" / "files", self.out):
            for path in folder.glob("*.safetensors"):
                found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
        return found


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("options", [[], ["--no-verify"]], ids=["cached", "direct"])
def test_killed_at_random_moments_then_run_again(options: list[str], tmp_path: Path) -> None:
    """kill -9 at random moments: never loadable before it is whole, the same bytes in the end, and no shard that was
    finished before a kill is made again. A moment is some time after a random shard; a conversion that was faster than
    its killer is compared, and another begun."""
    moments = random.Random(6)
    wanted = Output(tmp_path / "wanted", options)
    began = time.monotonic()
    assert wanted.start().wait() == 0
    span = time.monotonic() - began
    expected, count = contents(wanted.out), len(wanted.identities())
    assert count > 5
    outputs = (Output(tmp_path / str(n), options) for n in range(KILLS + 1))
    output = next(outputs)
    kept = kills = resumed = 0

    def check_kept(before: dict[str, tuple[int, int]]) -> None:
        nonlocal kept
        after = output.identities()
        remade = [name for name, identity in before.items() if after.get(name) != identity]
        assert not remade, f"made again after kill {kills}: {remade}"
        kept += len(before)

    while kills < KILLS:
        held = output.identities()
        before = {name: held[name] for name in output.noted()}
        process = output.start()
        after = moments.randint(len(before), count)
        while process.poll() is None and len(output.noted()) < after:
            time.sleep(0.001)
        # The start, and what comes after the last shard (verification, publishing), last longer than a shard.
        time.sleep(moments.uniform(0, span / 2 if after in (0, count) else span / count))
        killed = process.poll() is None
        process.kill()
        process.wait()
        kills += killed
        check_kept(before)
        resumed += bool(before)
        assert killed or process.returncode == 0
        if output.is_loadable:
            held_now = {
                name: digest for name, digest in contents(output.out).items() if not name.startswith(".xpuquant/")
            }
            assert held_now == expected, "loadable, but not whole"
        if output.is_finished:
            shutil.rmtree(output.out.parent)
            output = next(outputs)
    held = output.identities()
    before = {name: held[name] for name in output.noted()}
    assert output.start().wait() == 0
    check_kept(before)
    assert contents(output.out) == expected
    assert kept and resumed, "no kill came between two shards: nothing was shown"
    print(f"{kills} kills, {resumed} runs resumed, {kept} finished shards kept")


def peak(source: Path, out: Path, *options: str) -> int:
    """Bytes resident at most in a conversion by two jobs, under a limit of 1 GiB on its private memory.

    The process reads its own mark: what its parent learns of it (`ru_maxrss`) includes the parent's own memory.
    """

    def limit() -> None:
        # Private writable memory: heap, thread stacks and arenas. Page cache does not count, and is not ours.
        resource.setrlimit(resource.RLIMIT_DATA, (GIB, GIB))

    command = [
        sys.executable,
        "-c",
        _MEASURED,
        "convert",
        str(source),
        str(out),
        "--jobs",
        "2",
        "--json",
        *options,
    ]
    process = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=limit, text=True)
    assert process.returncode == 0, process.stderr
    shutil.rmtree(out)
    return int(process.stderr.split("VmHWM")[1]) * 1024


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """Gigabytes that are not to wait for pytest's own cleaning."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.parametrize("fmt", ["gptq", "ct"])
def test_memory_is_bounded(fmt: str, room: Path) -> None:
    """A conversion of a gigabyte with real shapes, in less than a gigabyte."""
    model = Model(dense=4, moe=1, experts=64, vocab=32768)
    size = write_checkpoint(room / "source", fmt, model)
    assert size > 1_000_000_000
    assert peak(room / "source", room / "out") < GIB


def test_memory_depends_neither_on_layers_nor_on_shards(room: Path) -> None:
    """Layers and experts of real shapes, three of them and twelve, in one shard and in many: the same peak, but for
    a fraction of what there is more."""
    few, many = Model(3, 1, 32, 2048, 8192, vocab=2048), Model(12, 4, 32, 2048, 8192, vocab=2048)
    sizes = {name: write_checkpoint(room / name, "gptq", model) for name, model in (("few", few), ("many", many))}
    more = sizes["many"] - sizes["few"]
    assert more > 500_000_000
    # Loops that this machine has not compiled are compiled by whoever meets them first, in memory of its own.
    assert peak(room / "few", room / "out") < GIB
    peaks = {
        (name, shard): peak(room / name, room / "out", "--max-shard-size", shard)
        for name, shard in (("few", "50GB"), ("many", "50GB"), ("many", "40MB"))
    }
    print({f"{name} layers, {shard} shards": f"{nbytes >> 20} MiB" for (name, shard), nbytes in peaks.items()})
    assert max(peaks.values()) < GIB
    assert max(peaks.values()) - min(peaks.values()) < more / 8, peaks
