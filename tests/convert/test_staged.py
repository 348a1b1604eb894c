"""Shards are checked while others are written: with the same results, whatever is wrong, and whoever stops."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
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

import xpuquant
from xpuquant.conversion import open_files
from xpuquant.conversion.cli.output import Lines
from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.conversion.repo.staging import Staging
from xpuquant.conversion.sources.folder import LocalSource
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.verify import exactness
from xpuquant.conversion.write import arrivals as arriving
from xpuquant.conversion.write import output_files, read_back, shard_writer
from xpuquant.conversion.write.arrivals import Arrivals
from xpuquant.conversion.write.output_files import CachedFile
from xpuquant.conversion.write.read_ahead import Stopped
from xpuquant.conversion.write.read_back import ReadBack
from xpuquant.errors import DamagedError, EnvironmentFault
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

    def test_those_that_write_wait_for_those_that_check(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Until somebody has begun with what is there, or reads on where nothing is yet, or all is stopped."""
        monkeypatch.setattr(arriving, "_QUEUED_BYTES", 10)
        arrivals, done = Arrivals(), list[str]()

        def told(nbytes: int) -> threading.Thread:
            def run() -> None:
                try:
                    arrivals.tell("a", nbytes)
                    done.append(f"told {nbytes}")
                except Stopped:
                    done.append("stopped")

            thread = threading.Thread(target=run)
            thread.start()
            return thread

        told(5).join(10)
        arrivals.queued(20)
        writer = told(8)
        time.sleep(0.05)
        assert done == ["told 5"]
        arrivals.queued(-20)
        writer.join(10)
        assert done == ["told 5", "told 8"]
        arrivals.queued(20)
        writer = told(9)
        reader = threading.Thread(target=lambda: arrivals.wait("a", 12))
        time.sleep(0.05)
        assert len(done) == 2
        reader.start()
        writer.join(10)
        told(12).join(10)
        reader.join(10)
        assert not reader.is_alive() and done[2:] == ["told 9", "told 12"]
        writer = told(13)
        time.sleep(0.05)
        assert len(done) == 4
        arrivals.stop(Stopped())
        writer.join(10)
        assert done[4:] == ["stopped"]


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
        monkeypatch.setattr(read_back, "_SOON_BYTES", 250)
        monkeypatch.setattr(read_back, "_KEPT_BYTES", 150)
        monkeypatch.setattr(os, "posix_fadvise", lambda fd, begin, nbytes, _: given_back.append((begin, nbytes)))
        (tmp_path / "shard").write_bytes(bytes(1000))
        arrivals = Arrivals()
        arrivals.tell("shard", 1000)
        reader = ReadBack(Tree(tmp_path), arrivals)
        for at in range(0, 1000, 100):
            tensor = Tensor(f"t{at}", "U8", (100,), "shard", at, at + 100)
            reader.read(whole(tensor))
            reader.done_with([tensor])
        soon = [pages for n, pages in enumerate(given_back) if pages not in given_back[:n]]
        again = [pages for n, pages in enumerate(given_back) if pages in given_back[:n]]
        assert soon == [(at, 100) for at in range(0, 800, 100)]
        assert again == [(at, 100) for at in range(0, 700, 100)], "what was not on the disk yet"
        reader.close()

    def test_a_file_system_that_takes_no_hint(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuses(*of: object) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

        monkeypatch.setattr(read_back, "_SOON_BYTES", 0)
        for change in (
            lambda: monkeypatch.setattr(os, "posix_fadvise", refuses),
            lambda: monkeypatch.delattr(os, "posix_fadvise"),
        ):
            change()
            out = tmp_path / f"out-{hasattr(os, 'posix_fadvise')}"
            assert convert(MOE, out, *SMALL, "--jobs", "2") == (0, "")

    @pytest.mark.parametrize("kept", [0, 1])
    def test_another_file_under_the_name_is_noticed(
        self, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At the next read where the descriptor is not kept, at the end where it is."""
        monkeypatch.setattr(open_files, "most_kept", lambda: kept)
        (tmp_path / "shard").write_bytes(bytes(1000))
        (tmp_path / "other").write_bytes(bytes(1000))
        arrivals, tensor = Arrivals(), Tensor("t", "U8", (100,), "shard", 0, 100)
        arrivals.tell("shard", 1000)
        reader = ReadBack(Tree(tmp_path), arrivals)
        reader.read(whole(tensor))
        reader.check_unchanged()
        (tmp_path / "other").rename(tmp_path / "shard")
        with pytest.raises(DamagedError, match="shard was exchanged while it was being made"):
            reader.read(whole(tensor))
            reader.check_unchanged()
        (tmp_path / "shard").unlink()
        with pytest.raises(EnvironmentFault, match="cannot be read"):
            reader.check_unchanged()
        reader.close()


@pytest.mark.parametrize("name", CONVERTED)
def test_the_same_is_written_and_found_as_afterwards(name: str, tmp_path: Path) -> None:
    made = {}
    for jobs in ("1", "2", "5"):
        out = tmp_path / jobs / "out"
        assert convert(FIXTURES / name, out, *SMALL, "--jobs", jobs)[0] == 0
        made[jobs] = contents(out)
    assert made["2"] == made["1"] and made["5"] == made["1"]


def test_the_first_shard_is_opened_before_what_verifies_is_imported(tmp_path: Path) -> None:
    text = f"""
import sys
from xpuquant.conversion.write import shard_writer
create = shard_writer.create
def first(*arguments):
    shard_writer.create = create
    print([name for name in sys.modules if name.startswith("xpuquant.conversion.verify")], flush=True)
    return create(*arguments)
shard_writer.create = first
from xpuquant.conversion.cli.app import run
sys.exit(run(["convert", {str(MOE)!r}, {str(tmp_path / "out")!r}, "-q", "--jobs", "2"]))
"""
    ran = subprocess.run([sys.executable, "-P", "-c", text], capture_output=True, text=True, check=True, timeout=100)
    assert ran.stdout.startswith("[]\n")


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
@pytest.mark.parametrize("who", [("shard", "ahead"), ("verify",)], ids=lambda who: who[0])
def test_a_source_that_cannot_be_read_ends_it(
    who: tuple[str, ...], nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


@pytest.mark.parametrize("nth", [1, 4])
@pytest.mark.parametrize("moment", ["before it is noted", "after it was noted"])
def test_a_shard_exchanged_while_others_are_written(
    moment: str, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program puts a file of the same size and header in the place of a shard whose modules have been read:
    what it compared is gone, and what lies there nobody compared."""
    finish, read = Staging.finish, ReadBack.read
    finished: list[str] = []
    were_read: dict[str, threading.Event] = {}

    def told(self: ReadBack, box: Any) -> Any:
        array = read(self, box)
        were_read.setdefault(box.tensor.file, threading.Event()).set()
        return array

    def exchanged(self: Staging, shard: str, result: Any) -> None:
        finished.append(shard)
        if len(finished) != nth:
            finish(self, shard, result)
            return
        if moment == "after it was noted":
            finish(self, shard, result)
        # Enough of it has been told for its last module to be read.
        arrivals[0].tell(shard, result.nbytes)
        assert were_read.setdefault(shard, threading.Event()).wait(30)
        path = self.files.path / shard
        data = bytearray(path.read_bytes())
        data[-100:] = bytes(byte ^ 0x11 for byte in data[-100:])
        shutil.copyfile(path, path.with_name("other"))
        path.with_name("other").write_bytes(data)
        path.with_name("other").rename(path)
        if moment == "before it is noted":
            finish(self, shard, result)

    arrivals = list[Arrivals]()
    begun = Arrivals.__init__

    def noted(self: Arrivals) -> None:
        begun(self)
        arrivals.append(self)

    monkeypatch.setattr(Arrivals, "__init__", noted)
    monkeypatch.setattr(ReadBack, "read", told)
    monkeypatch.setattr(Staging, "finish", exchanged)
    code, error = convert(MOE, tmp_path / "out", *SMALL, "--jobs", "2")
    assert code in (1, 3) and error.count("\n") == 1, error
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.setattr(Staging, "finish", finish)
    assert convert(MOE, tmp_path / "out", *SMALL, "--jobs", "2")[0] == 0
    assert command("verify", str(tmp_path / "out"), "-q")[0] == 0


def test_an_interruption_while_the_check_is_behind_is_heeded_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is written, and modules wait to be compared: they are not."""
    source = FIXTURES / "gptqmodel-qwen3-w4g32"
    written, begun = threading.Event(), list[float]()
    result, phase = exactness._ModuleCheck.result, Lines.phase
    modules = len(make_plan(LocalSource(source).checkpoint, Options()).modules)

    def checked(self: Any) -> Any:
        assert written.wait(30)
        begun.append(time.monotonic())
        if len(begun) == 1:
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.2)
        return result(self)

    def begins(self: Any, name: str, total: int, before: int = 0) -> None:
        phase(self, name, total, before)
        if name == "verify":
            threading.Timer(0.1, written.set).start()

    monkeypatch.setattr(exactness._ModuleCheck, "result", checked)
    monkeypatch.setattr(Lines, "phase", begins)
    code, error = convert(source, tmp_path / "out", "--jobs", "2")
    assert code == 130 and error.count("\n") <= 1, error
    assert len(begun) < modules / 2
    monkeypatch.setattr(exactness._ModuleCheck, "result", result)
    assert convert(source, tmp_path / "out", "--jobs", "2")[0] == 0


@pytest.mark.parametrize("phase", ["convert", "verify"])
@pytest.mark.parametrize("nth", [1, 2, 5])
def test_whoever_watches_may_stop_it(phase: str, nth: int, tmp_path: Path) -> None:
    """An exception of theirs, from whatever thread tells them, is the one that is raised, and nothing waits."""
    counted = [0]

    def stops(name: str, done: int, total: int) -> None:
        assert 0 <= done <= total and total > 0
        counted[0] += name == phase
        if counted[0] == nth:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        xpuquant.convert(MOE, tmp_path / "out", max_shard_size="20kB", jobs=2, progress=stops)
        assert counted[0] < nth  # the phase had less to tell
        raise LookupError("enough")
    assert not (tmp_path / "out" / "config.json").exists() or counted[0] < nth


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
