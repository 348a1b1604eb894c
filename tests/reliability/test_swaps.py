"""Files and folders that are exchanged while a command runs, at any of the things that it asks of the file system. A
few of the cases that scripts/lanes/trust plays by the thousand, and those that were found before."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from support.checkpoints import FIXTURES
from support.fuzz.case import command
from support.fuzz.deal import cases
from support.fuzz.places import Prepared
from support.fuzz.swaps import FILES, at_moments, in_place, other_bytes, play_swap
from support.fuzz.tally import count

from xpuquant.conversion.options import Options
from xpuquant.conversion.repo.journal import Finished
from xpuquant.conversion.repo.staging import Staging
from xpuquant.errors import XpuquantError

pytest_plugins = "support.fuzz.fixtures"

CASES = cases("XPUQUANT_TRUST_SWAP_CASES", 60)


@pytest.mark.parametrize("block", range(CASES.blocks))
def test_nothing_exchanged_goes_unnoticed(block: int, prepared: Prepared) -> None:
    codes: set[int] = set()
    for seed in CASES.of(block):
        what, code, problem = play_swap(seed, prepared, prepared.source.parent / f"case-{seed}")
        assert problem is None, f"case {seed}: {what}: {problem}"
        codes.add(code)
        count(f"swaps: exit {code}")
        count("swaps: exchanged in time", not what.endswith("never"))
    assert len(codes) > 1


STAGED = {
    "model.safetensors": b"\1" * 70_000,
    "tokenizer.json": b'{"vocab": {"a": 0}}',
    "sub/x.txt": b"theirs",
    "xpuquant.json": b'{"shards": {}}',
    "README.md": b"# a card",
}
"""Files of an output, as they are staged: a shard, copied ones, and those that are written anew."""


def published(out: Path, acts: Mapping[int, Callable[[], None]]) -> int:
    """Stage files as a conversion does, and publish them; returns how often the file system was asked meanwhile."""
    with Staging(out) as staging:
        shard, *others = STAGED
        staging.begin("a plan", Options(), {shard: len(STAGED[shard])}, force=False)
        staging.files.write(shard, STAGED[shard])
        staging.finish(shard, Finished(hashlib.sha256(STAGED[shard]).hexdigest(), len(STAGED[shard])))
        files = {name: staging.files.write(name, STAGED[name]) for name in others}
        with at_moments(acts) as counted:
            staging.publish([shard], files, b"{}")
    return counted[0]


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder whose disk is flushed at once: a thousand outputs are."""
    memory = Path("/dev/shm")
    room = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else tmp_path))
    yield room
    shutil.rmtree(room)


@pytest.mark.parametrize("name", STAGED)
@pytest.mark.parametrize("act", FILES)
def test_what_is_published_is_what_was_hashed(act: Callable[[Path], None], name: str, in_memory: Path) -> None:
    """A staged file becomes another one, at each moment between its sha256 and the end: noticed, and nothing can be
    loaded. Only where a shard is written into between the last look at it and its move, which follows at once, and its
    time is set back, nobody can tell; `verify` does."""
    (in_memory / "outside" / "folder").mkdir(parents=True)
    (in_memory / "outside" / "canary").write_bytes(b"secret")
    every = published(in_memory / "undisturbed", {})
    unnoticed = 0
    # The lane takes each moment; otherwise every file has a third of them, another one.
    first, step = (1, 1) if "XPUQUANT_TRUST_SWAP_CASES" in os.environ else (1 + [*STAGED].index(name) % 3, 3)
    for moment in range(first, every + 1, step):
        out = in_memory / f"out-{moment}"

        def swap(target: Path = out / ".xpuquant" / "files" / name) -> None:
            with suppress(FileNotFoundError):  # it has been moved
                act(target)

        try:
            published(out, {moment: swap})
        except (XpuquantError, OSError):
            assert not (out / "config.json").exists()
        else:
            held = {held: (out / held).read_bytes() for held in STAGED}
            unnoticed += held != STAGED
        shutil.rmtree(out)
    assert unnoticed <= 8 * (act is in_place and name == "model.safetensors")
    assert (in_memory / "outside" / "canary").read_bytes() == b"secret"


@pytest.mark.parametrize("moment", range(20, 120, 12))
def test_a_folder_that_was_another_one_for_a_while(moment: int, tmp_path: Path) -> None:
    """Nothing in the source itself changes: its folder is moved away, another has its name, and then it is back. No
    file shows it afterwards; what was opened meanwhile is another file."""
    source, other = tmp_path / "source", tmp_path / "other"
    shutil.copytree(FIXTURES / "gptqmodel-qwen3-w4g32", source)
    shutil.copytree(source, other, copy_function=shutil.copy2)
    other_bytes(other / "model.safetensors")

    def exchange() -> None:
        source.rename(tmp_path / "away")
        other.rename(source)

    def back() -> None:
        source.rename(other)
        (tmp_path / "away").rename(source)

    arguments = ("convert", str(source), "--jobs", "1")
    assert command(*arguments[:2], str(tmp_path / "expected"), *arguments[2:])[0] == 0
    with at_moments({moment: exchange, moment + 12: back}) as counted:
        code, _, error = command(*arguments[:2], str(tmp_path / "out"), *arguments[2:])
    assert counted[0] >= moment
    wanted = (tmp_path / "expected" / "model.safetensors").read_bytes()
    if code == 0:
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted
    else:
        assert code in (2, 3, 4) and error.count("\n") == 1 and not (tmp_path / "out" / "config.json").exists(), error
