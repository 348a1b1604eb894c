"""The bytes of a shard do not depend on how they were cut, who made them, or which way they went to the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import FIXTURES, REFUSED, SPOILT, all_checkpoints

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.conversion.repo.journal import Finished
from xpuquant.conversion.repo.staging import Staging
from xpuquant.conversion.sources.folder import LocalSource
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.write import output_files, shard_writer
from xpuquant.conversion.write.execute import execute_plan
from xpuquant.conversion.write.output_files import CachedFile, DirectFile, OutputFile
from xpuquant.errors import EnvironmentFault

MOE = FIXTURES / "gptqmodel-qwen3moe-w4g32"
BLOCK = 16384


def shards(source: Path, out: Path, jobs: int = 1, read_again: bool = True, **options: Any) -> dict[str, Finished]:
    """What a conversion of the folder writes, without the paperwork."""
    opened = LocalSource(source)
    plan = make_plan(opened.checkpoint, Options(**options))
    with Staging(out) as staging:
        made = execute_plan(plan, opened, staging, jobs, {}, lambda nbytes: None, read_again)
        for name, finished in made.items():
            assert (staging.folder / name).stat().st_size == finished.nbytes
    return made


CONVERTED = [name for name in all_checkpoints() if "/" not in name and name not in {*REFUSED, *SPOILT}]


@pytest.mark.parametrize("name", CONVERTED)
def test_pieces_may_be_cut_anywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fixture, in parts of a few rows, is what it is when each piece is made at one go."""
    folder = all_checkpoints()[name]
    whole = shards(folder, tmp_path / "whole")
    monkeypatch.setattr(shard_writer, "CHUNK_BYTES", 2048)
    assert shards(folder, tmp_path / "cut") == whole
    assert shards(folder, tmp_path / "ahead", jobs=4, read_again=False) == whole


def direct(tree: Tree, name: str, nbytes: int) -> DirectFile:
    return DirectFile(tree, name, nbytes, os.O_DIRECT)


@pytest.mark.parametrize("create", [CachedFile, direct])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(sizes=st.lists(st.integers(0, 3 * BLOCK), max_size=8), seed=st.integers(0, 9))
def test_what_was_appended_is_there(
    create: Any, sizes: list[int], seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_files, "_BLOCK_BYTES", BLOCK)
    data = np.random.default_rng(seed).integers(0, 256, sum(sizes), np.uint8)
    path = tmp_path / "shard"
    path.write_bytes(b"of an earlier run" * 10_000)
    begin = 0
    with create(Tree(tmp_path), "shard", data.size) as file:
        for size in sizes:
            part = data[begin : begin + size].copy()
            file.append(part)
            part[:] = 0xEE  # the caller's memory again
            begin += size
    assert path.read_bytes() == data.tobytes()


def filled(file: OutputFile, nbytes: int) -> None:
    with file:
        file.append(np.arange(nbytes, dtype=np.uint8))


class TestDirect:
    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(output_files, "_BLOCK_BYTES", BLOCK)

    def test_the_page_cache_is_passed(self, tmp_path: Path) -> None:
        file = direct(Tree(tmp_path), "shard", 5 * BLOCK)
        assert fcntl.fcntl(file._fd, fcntl.F_GETFL) & os.O_DIRECT
        filled(file, 5 * BLOCK)

    def test_a_file_system_that_refuses_to_open(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.open

        def refusing(path: Any, flags: int, *rest: Any, **options: Any) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "no such thing here")
            return real(path, flags, *rest, **options)

        monkeypatch.setattr(os, "open", refusing)
        filled(direct(Tree(tmp_path), "shard", 3 * BLOCK + 5), 3 * BLOCK + 5)
        assert (tmp_path / "shard").read_bytes() == bytes(range(256)) * (3 * BLOCK // 256) + bytes(range(5))

    def test_a_file_system_that_refuses_to_write(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.pwrite

        def refusing(fd: int, data: Any, offset: int) -> int:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "not in these units")
            return real(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", refusing)
        filled(direct(Tree(tmp_path), "shard", 2 * BLOCK + 1), 2 * BLOCK + 1)
        assert (tmp_path / "shard").read_bytes() == bytes(range(256)) * (2 * BLOCK // 256) + bytes(1)

    @pytest.mark.parametrize("at", [1, 3, 5])
    def test_a_full_disk_is_said_and_no_thread_is_left(
        self, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, calls, before = os.pwrite, [0], threading.active_count()

        def full(fd: int, data: Any, offset: int) -> int:
            calls[0] += 1
            if calls[0] >= at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(EnvironmentFault, match=r"cannot be written \(No space left on device\)"):
            shards(MOE, tmp_path / "out", read_again=False)
        assert threading.active_count() == before

    def test_an_error_of_the_caller_ends_the_thread(self, tmp_path: Path) -> None:
        before = threading.active_count()
        with pytest.raises(ZeroDivisionError), direct(Tree(tmp_path), "shard", 9 * BLOCK) as file:
            for _ in range(7):
                file.append(np.zeros(BLOCK, np.uint8))
            raise ZeroDivisionError
        assert threading.active_count() == before
