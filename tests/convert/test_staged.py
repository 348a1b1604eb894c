"""Shards are checked while others are written: with the same results, whatever is wrong, and whoever stops."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import FIXTURES
from support.fuzz.case import command

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.conversion.sources.folder import LocalSource
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.verify import exactness
from xpuquant.conversion.write import output_files, read_back, shard_writer
from xpuquant.conversion.write.arrivals import Arrivals
from xpuquant.conversion.write.output_files import CachedFile
from xpuquant.conversion.write.read_ahead import Stopped
from xpuquant.conversion.write.read_back import ReadBack
from xpuquant.errors import EnvironmentFault
from xpuquant.formats.checkpoint import rows, whole
from xpuquant.formats.safetensors import Tensor

MOE = FIXTURES / "gptqmodel-qwen3moe-w4g32"
CONVERTED = (
    "gptqmodel-qwen3moe-w4g32",
    "autoawq-qwen3moe-w4g32-asym",
    "llmcompressor-qwen3moe-fp8-block",
    "gptqmodel-qwen3-w4g32-actorder",
)
SMALL = ("--max-shard-size", "20kB")


def convert(source: Path, out: Path, *options: str) -> tuple[int, str]:
    code, _, error = command("convert", str(source), str(out), "-q", *options)
    return code, error


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the card, which quotes the command."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "README.md"
    }


@pytest.fixture(autouse=True)
def reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


class TestArrivals:
    @settings(deadline=None)
    @given(st.data())
    def test_each_place_comes_once_and_never_too_early(self, data: st.DataObject) -> None:
        shards = "abc"
        ends = st.dictionaries(st.sampled_from(shards), st.integers(0, 9), max_size=3)
        wanted = data.draw(st.lists(ends, max_size=8))
        told = data.draw(st.lists(st.tuples(st.sampled_from(shards), st.integers(0, 9)), max_size=20))
        arrivals, there = Arrivals(), dict.fromkeys(shards, 0)
        coming, found = arrivals.in_turn(wanted), list[int]()

        def is_there(place: int) -> bool:
            return all(there[shard] >= end for shard, end in wanted[place].items())

        for shard, nbytes in [*told, *((shard, 9) for shard in shards)]:
            arrivals.tell(shard, nbytes)
            there[shard] = max(there[shard], nbytes)
            ready = [place for place in range(len(wanted)) if place not in found and is_there(place)]
            for _ in ready:
                found.append(next(coming))
            assert sorted(found[len(found) - len(ready) :]) == ready
        assert next(coming, None) is None and sorted(found) == list(range(len(wanted)))

    def test_whoever_waits_or_tells_is_stopped(self) -> None:
        arrivals, stopped = Arrivals(), list[str]()

        def waiting(name: str, wait: Callable[[], object]) -> threading.Thread:
            def run() -> None:
                with pytest.raises(Stopped):
                    wait()
                stopped.append(name)

            thread = threading.Thread(target=run)
            thread.start()
            return thread

        threads = [
            waiting("reader", lambda: arrivals.wait("a", 1)),
            waiting("checker", lambda: list(arrivals.in_turn([{"a": 1}]))),
        ]
        time.sleep(0.05)
        arrivals.stop(Stopped())
        for thread in threads:
            thread.join(10)
        with pytest.raises(Stopped):
            arrivals.tell("a", 1)
        assert sorted(stopped) == ["checker", "reader"]


class TestReadBack:
    def test_a_read_waits_until_its_bytes_are_there(self, tmp_path: Path) -> None:
        data = np.arange(64 * 32, dtype=np.uint8).reshape(64, 32)
        tensor = Tensor("t", "U8", data.shape, "shard", 8, 8 + data.nbytes)
        arrivals, found = Arrivals(), list[np.ndarray[Any, Any]]()
        with CachedFile(Tree(tmp_path), "shard", 8 + data.nbytes) as file:
            reader = ReadBack(Tree(tmp_path), arrivals)
            thread = threading.Thread(target=lambda: found.append(reader.read(rows(tensor, 8, 16))))
            thread.start()
            file.append(np.zeros(8, np.uint8))
            for begin in range(0, data.nbytes, 32):
                assert not found
                time.sleep(0.001)
                file.append(data.reshape(-1)[begin : begin + 32])
                arrivals.tell("shard", 8 + begin + 32)
                if begin + 32 == 16 * 32:
                    thread.join(10)
                    break
        assert np.array_equal(found[0], data[8:16])
        reader.close()

    def test_pages_are_given_back_when_nobody_reads_them_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given_back: list[tuple[int, int]] = []
        monkeypatch.setattr(read_back, "_KEPT_BYTES", 250)
        monkeypatch.setattr(os, "posix_fadvise", lambda fd, begin, nbytes, _: given_back.append((begin, nbytes)))
        (tmp_path / "shard").write_bytes(bytes(1000))
        arrivals = Arrivals()
        arrivals.tell("shard", 1000)
        reader = ReadBack(Tree(tmp_path), arrivals)
        for at in range(0, 1000, 100):
            tensor = Tensor(f"t{at}", "U8", (100,), "shard", at, at + 100)
            reader.read(whole(tensor))
            reader.done_with([tensor])
        assert given_back == [(at, 100) for at in range(0, 800, 100)]
        reader.close()


@pytest.mark.parametrize("name", CONVERTED)
def test_the_same_is_written_and_found_as_afterwards(name: str, tmp_path: Path) -> None:
    made = {}
    for jobs in ("1", "2", "5"):
        out = tmp_path / jobs / "out"
        assert convert(FIXTURES / name, out, *SMALL, "--jobs", jobs)[0] == 0
        made[jobs] = contents(out)
    assert made["2"] == made["1"] and made["5"] == made["1"]


def test_parts_are_checked_meanwhile_and_not_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `finish` publishes is what a whole conversion does; what a part compared, it does not compare again."""
    assert convert(MOE, tmp_path / "whole" / "out", *SMALL, "--jobs", "1")[0] == 0
    out, result, compared = tmp_path / "out", exactness._ModuleCheck.result, list[str]()

    def checked(self: Any) -> Any:
        compared.append(self._planned.conversion.name)
        return result(self)

    monkeypatch.setattr(exactness._ModuleCheck, "result", checked)
    for part in ("1/2", "2/2"):
        assert convert(MOE, out, *SMALL, "--jobs", "2", "--part", part)[0] == 0
    by_parts = list(compared)
    assert command("finish", str(MOE), str(out), "-q")[0] == 0
    assert by_parts and len(compared) == len(set(compared)) == len(_modules(out))
    assert contents(out) == contents(tmp_path / "whole" / "out")


def test_it_is_done_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module is compared before the last shard has been begun: nothing of that shard is made until it was."""
    compared = threading.Event()
    last = len(make_plan(LocalSource(MOE).checkpoint, Options(max_shard_size=20_000)).shards)
    result, make = exactness._ModuleCheck.result, shard_writer.ShardWriter.run
    order: list[str] = []

    def checked(self: Any) -> Any:
        found = result(self)
        compared.set()
        return found

    def made(self: Any) -> Any:
        order.append(self._shard.name)
        if len(order) == last:
            assert compared.wait(30)
        return make(self)

    monkeypatch.setattr(exactness._ModuleCheck, "result", checked)
    monkeypatch.setattr(shard_writer.ShardWriter, "run", made)
    assert convert(MOE, tmp_path / "out", *SMALL, "--jobs", "2")[0] == 0
    assert len(order) == last > 2 and compared.is_set()


def _flipped(data: bytearray, at: int) -> None:
    data[at] ^= 0x10


def _rolled(data: bytearray, at: int) -> None:
    data[:] = data[8:] + data[:8]


def _nothing(data: bytearray, at: int) -> None:
    data[:] = bytes(len(data))


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("spoil", [_flipped, _rolled, _nothing])
def test_what_the_disk_makes_of_it_is_found(
    spoil: Callable[[bytearray, int], None], jobs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever reaches the file instead of what was made and hashed: one bit, another place, nothing."""
    write = output_files._write
    spoilt: list[int] = []

    def other(fd: int, data: memoryview, offset: int) -> None:
        if not spoilt and offset > 0 and len(data) > 1024:
            spoilt.append(offset)
            changed = bytearray(data)
            spoil(changed, len(changed) // 2)
            data = memoryview(changed)
        write(fd, data, offset)

    monkeypatch.setattr(output_files, "_write", other)
    code, error = convert(MOE, tmp_path / "out", *SMALL, "--jobs", jobs)
    assert spoilt and code == 1, error
    assert error.startswith("error: verification failed: ") and error.count("\n") == 1
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.setattr(output_files, "_write", write)
    assert convert(MOE, tmp_path / "out", *SMALL, "--jobs", jobs)[0] == 0


def test_a_wrong_header_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared goes by the header that was meant to be written: so is what was."""
    write = output_files._write

    def other(fd: int, data: memoryview, offset: int) -> None:
        changed = bytearray(data)
        if offset == 0:
            place = bytes(data).index(b"qweight")
            changed[place : place + 7] = b"qweighs"
        write(fd, memoryview(changed), offset)

    monkeypatch.setattr(output_files, "_write", other)
    code, error = convert(MOE, tmp_path / "out", "--jobs", "2")
    assert code == 1 and "its header is not the one that was written" in error, error


@pytest.mark.parametrize("nth", [1, 3])
@pytest.mark.parametrize("who", ["shard", "verify"])
def test_a_source_that_cannot_be_read_ends_it(
    who: str, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one line, whichever thread comes upon it, and the others do not wait for ever."""
    read, counted = LocalSource.read_into, [0]

    def broken(self: Any, *arguments: Any) -> None:
        if threading.current_thread().name.startswith(who):
            counted[0] += 1
            if counted[0] >= nth:
                raise EnvironmentFault("model.safetensors: cannot be read (Input/output error)")
        read(self, *arguments)

    monkeypatch.setattr(LocalSource, "read_into", broken)
    code, error = convert(MOE, tmp_path / "out", *SMALL, "--jobs", "2")
    assert counted[0] >= nth
    assert code == 4 and error == "error: model.safetensors: cannot be read (Input/output error)\n", error
    monkeypatch.setattr(LocalSource, "read_into", read)
    assert convert(MOE, tmp_path / "out", *SMALL, "--jobs", "2")[0] == 0


def test_a_full_disk_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, counted = output_files._write, [0]

    def full(fd: int, data: memoryview, offset: int) -> None:
        counted[0] += 1
        if counted[0] > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(fd, data, offset)

    monkeypatch.setattr(output_files, "_write", full)
    code, error = convert(MOE, tmp_path / "out", *SMALL, "--jobs", "2")
    assert code == 4 and "No space left on device" in error and error.count("\n") == 1


def test_what_was_finished_before_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of a run that was stopped arrive at once; the verdict is on all of them."""
    make, made = shard_writer.ShardWriter.run, list[str]()

    def some(self: Any) -> Any:
        if len(made) == 3:
            raise OSError(errno.EIO, "gone")
        made.append(self._shard.name)
        return make(self)

    monkeypatch.setattr(shard_writer.ShardWriter, "run", some)
    assert convert(MOE, tmp_path / "out", *SMALL, "--jobs", "2")[0] != 0
    monkeypatch.setattr(shard_writer.ShardWriter, "run", make)
    assert convert(MOE, tmp_path / "out", *SMALL, "--jobs", "2")[0] == 0
    assert convert(MOE, tmp_path / "whole" / "out", *SMALL, "--jobs", "1")[0] == 0
    assert _modules(tmp_path / "out") == _modules(tmp_path / "whole" / "out")


def _modules(out: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((out / "xpuquant.json").read_text())["modules"]
    assert all("rows_xxh3" in entry for entry in found.values())
    return found
