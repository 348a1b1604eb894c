"""Disks, kernels and people that fail. After each: the source untouched, OUT complete or not loadable, and the same
command again finishes with the same bytes."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import FIXTURES
from support.fuzz.case import command, digests
from support.fuzz.faulty import READS, Dead, Faults
from support.fuzz.tally import count

from xpuquant.conversion.write import resumption, shard_writer

pytest_plugins = "support.fuzz.fixtures"

MOE = FIXTURES / "gptqmodel-qwen3moe-w4g32"
ROUNDS = int(os.environ.get("XPUQUANT_TRUST_ROUNDS", "3"))
"""Random moments per signal; scripts/lanes/trust takes more."""
LONG = ROUNDS > 3
NOBODY = 65534
CHUNK_BYTES, NOTED_BYTES = 8192, 20_000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint with other files, one in a folder."""
    folder = Path(shutil.copytree(MOE, tmp_path / "source"))
    (folder / "templates").mkdir()
    (folder / "templates" / "tool.jinja").write_text("x" * 10_000)
    return folder


OPTIONS: list[str] = []
"""Of every conversion of a test; see `TestEveryOperation.through_or_past_the_page_cache`."""


def arguments(source: Path, out: Path) -> list[str]:
    return ["convert", str(source), str(out), "--jobs", "1", "--max-shard-size", "60kB", "--json", *OPTIONS]


def complete(folder: Path) -> dict[str, str]:
    """What OUT holds, but for the card, which names the command."""
    return {name: digest for name, digest in digests(folder).items() if name != "README.md"}


def loadable(out: Path) -> bool:
    return (out / "config.json").exists()


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> dict[str, str]:
    """The output of an undisturbed run."""
    assert command(*arguments(source, tmp_path / "expected" / "out"))[0] == 0
    return complete(tmp_path / "expected" / "out")


def finishes(source: Path, out: Path, expected: dict[str, str], *options: str) -> None:
    """What is there is whole, or cannot be loaded; and the same command again ends with the expected bytes."""
    if loadable(out):
        held = {name: digest for name, digest in complete(out).items() if not name.startswith(".xpuquant/")}
        assert held == expected, "loadable, but not whole"
    count("faults: runs repeated until whole")
    count(
        "faults: bytes compared with an undisturbed run",
        sum(p.stat().st_size for p in out.rglob("*") if p.is_file()),
    )
    code, _, error = command(*arguments(source, out), *options)
    assert code == 0 or (code == 2 and "already holds a converted model" in error and loadable(out)), error
    assert complete(out) == expected


def operations(source: Path, room: Path) -> int:
    with Faults().injected() as faults:
        assert command(*arguments(source, room / "counted"))[0] == 0
    return faults.count


class TestEveryOperation:
    @pytest.fixture(autouse=True, params=[[], ["--no-verify"]], ids=["cached", "direct"])
    def through_or_past_the_page_cache(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is not read again is written in another way."""
        monkeypatch.setattr(sys.modules[__name__], "OPTIONS", request.param)
        # Notes inside a shard, of which there would be none in so small ones.
        monkeypatch.setattr(shard_writer, "CHUNK_BYTES", CHUNK_BYTES)
        monkeypatch.setattr(resumption, "NOTED_BYTES", NOTED_BYTES)

    @pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
    def test_failing_once(self, error: int, source: Path, expected: dict[str, str], room: Path) -> None:
        """Every operation that changes the disk fails once, each in a run of its own."""
        total, before = operations(source, room), digests(source)
        step = 1 if LONG else 5
        for at in range(1, total + 1, step):
            out = room / str(at) / "out"
            with Faults(at, error).injected() as faults:
                code, _, text = command(*arguments(source, out))
            assert faults.failed, f"operation {at} of {total} did not happen"
            assert code == 4 or (code == 0 and loadable(out)), (at, faults.failed, code, text)
            assert text.count("\n") == (code != 0) and "internal error" not in text, text
            count("faults: disk operations failed")
            assert digests(source) == before
            finishes(source, out, expected)
            shutil.rmtree(out)

    def test_stopping_dead(self, source: Path, expected: dict[str, str], room: Path) -> None:
        """A kill -9 or a power cut exactly before every operation."""
        total, before = operations(source, room), digests(source)
        for at in range(1, total + 1, 1 if LONG else 3):
            out = room / str(at) / "out"
            with Faults(at, dead=True).injected() as faults, contextlib.suppress(Dead):
                command(*arguments(source, out))
            assert faults.failed
            count("faults: disk operations died at")
            assert digests(source) == before
            finishes(source, out, expected)
            shutil.rmtree(out)

    def test_stopping_dead_again_and_again(self, source: Path, expected: dict[str, str], room: Path) -> None:
        moments, out = random.Random(8), room / "out"
        for _ in range(40 if LONG else 10):
            with Faults(moments.randrange(1, 60), dead=True).injected(), contextlib.suppress(Dead):
                command(*arguments(source, out))
        finishes(source, out, expected)

    @pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
    def test_reads_failing_once(self, error: int, source: Path, expected: dict[str, str], room: Path) -> None:
        with Faults(calls=READS).injected() as counted:
            assert command(*arguments(source, room / "counted"))[0] == 0
        for at in range(1, counted.count + 1, 1 if LONG else max(1, counted.count // 12)):
            out = room / str(at) / "out"
            with Faults(at, error, calls=READS).injected():
                code, _, text = command(*arguments(source, out))
            assert code == 4 and "cannot be read" in text and text.count("\n") == 1, (at, code, text)
            count("faults: reads failed")
            finishes(source, out, expected)
            shutil.rmtree(out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many kilobytes."""
    mounted: list[Path] = []

    def mount(kilobytes: int) -> Path:
        folder = tmp_path / f"disk{kilobytes}"
        folder.mkdir()
        options = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(options, capture_output=True, check=False).returncode:
            pytest.skip("mounting needs root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class TestDisks:
    def test_really_full_at_every_size(
        self,
        source: Path,
        expected: dict[str, str],
        small_disk: Callable[[int], Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from xpuquant.conversion.runs import local as conversion

        # It would be refused before the first byte; another program may take the space after that.
        monkeypatch.setattr(conversion, "check_disk", lambda out, needed: None)
        need = sum(path.stat().st_size for path in (tmp_path / "expected" / "out").rglob("*")) // 1024
        finished = 0
        for kilobytes in range(8, need + 96, 8 if LONG else 48):
            disk = small_disk(kilobytes)
            code, _, error = command(*arguments(source, disk / "out"))
            assert code in (0, 4) and error.count("\n") == (code != 0), error
            finished += code == 0
            count("faults: disks really full", code != 0)
            assert loadable(disk / "out") == (code == 0)
            if code:
                assert "No space left" in error or "cannot be written" in error, error
                subprocess.run(["mount", "-o", f"remount,size={need * 4 + 512}k", str(disk)], check=True)
                finishes(source, disk / "out", expected)
        assert finished

    def test_refused_before_the_first_byte(self, source: Path, small_disk: Callable[[int], Path]) -> None:
        disk = small_disk(100)
        code, _, error = command(*arguments(source, disk / "out"))
        assert code == 4 and "free" in error and error.count("\n") == 1
        assert not loadable(disk / "out")

    def test_read_only(self, source: Path, small_disk: Callable[[int], Path]) -> None:
        disk = small_disk(1000)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        code, _, error = command(*arguments(source, disk / "out"))
        assert code == 4 and "Read-only file system" in error and error.count("\n") == 1

    def test_source_and_output_on_different_ones(
        self, source: Path, expected: dict[str, str], small_disk: Callable[[int], Path], tmp_path: Path
    ) -> None:
        disk = small_disk(200_000)
        (tmp_path / "link").symlink_to(disk)
        assert command(*arguments(source, tmp_path / "link" / "a" / "out"))[0] == 0
        assert complete(disk / "a" / "out") == expected
        shutil.copytree(source, disk / "source")
        assert command(*arguments(disk / "source", tmp_path / "back"))[0] == 0
        assert complete(tmp_path / "back").keys() == expected.keys()


@contextlib.contextmanager
def somebody_else() -> Iterator[None]:
    if os.geteuid() != 0:
        yield  # not root already: permissions count
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


class TestPermissions:
    @pytest.fixture(autouse=True)
    def passable(self, tmp_path: Path, source: Path, expected: dict[str, str]) -> None:
        """Folders above are others' to pass, and everything is imported, as root may and nobody may not."""
        for folder in (tmp_path, *tmp_path.parents):
            if folder.owner() == tmp_path.owner() and folder != Path("/"):
                folder.chmod(folder.stat().st_mode | 0o055)
        for path in (source, *source.rglob("*")):
            path.chmod(path.stat().st_mode | 0o044 | 0o011 * path.is_dir())

    def test_output_in_a_folder_of_others(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "theirs").mkdir(mode=0o555)
        with somebody_else():
            code, _, error = command(*arguments(source, tmp_path / "theirs" / "out"))
        assert code == 4 and "Permission denied" in error and error.count("\n") == 1
        assert not (tmp_path / "theirs" / "out").exists()

    def test_output_that_cannot_be_written(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir(mode=0o555)
        with somebody_else():
            code, _, error = command(*arguments(source, tmp_path / "out"))
        assert code == 4 and "Permission denied" in error and error.count("\n") == 1

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "templates/tool.jinja", "templates", "."])
    def test_source_that_cannot_be_read(self, name: str, source: Path, tmp_path: Path) -> None:
        """Said before the work, even for a file that is only copied at its end."""
        (source / name).chmod(0)
        (tmp_path / "room").mkdir()
        (tmp_path / "room").chmod(0o777)
        with somebody_else():
            code, _, error = command(*arguments(source, tmp_path / "room" / "out"))
        assert code in (2, 4) and "Permission denied" in error and error.count("\n") == 1, error
        assert not (tmp_path / "room" / "out").exists()


def change_in_place(shard: Path) -> None:
    """Other bytes, the same size, and the time set back."""
    stat = shard.stat()
    with shard.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\xa5" * 100)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replace(shard: Path) -> None:
    stat = shard.stat()
    other = shard.with_name("other")
    other.write_bytes(shard.read_bytes()[:-100] + b"\xa5" * 100)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.rename(shard)


def cut(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


def append(shard: Path) -> None:
    with shard.open("ab") as file:
        file.write(b"more")


CHANGES = [change_in_place, replace, cut, append, Path.unlink]


class TestSource:
    @pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
    @pytest.mark.parametrize("when", [1, 20, -1])
    def test_changed_while_it_is_read(
        self,
        change: Callable[[Path], None],
        when: int,
        source: Path,
        expected: dict[str, str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from xpuquant.conversion.sources.folder import LocalSource

        shard = source / "model.safetensors"
        kept = tmp_path / "kept"
        shutil.copy2(shard, kept)
        read, calls = LocalSource.read_into, 0
        total = 10**9

        def reading(self: LocalSource, part: Any, out: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == (when if when > 0 else total):
                change(shard)
            read(self, part, out)

        with monkeypatch.context() as patched:
            patched.setattr(LocalSource, "read_into", reading)
            if when < 0:
                assert command(*arguments(source, tmp_path / "counted"))[0] == 0
                total, calls = calls - 1, 0
            code, _, error = command(*arguments(source, tmp_path / "out"))
        assert code in (3, 4) and error.count("\n") == 1, (code, error)
        assert not loadable(tmp_path / "out")
        count("faults: sources changed while read")
        # Size and time are as they were, but nobody can know the bytes to be: not mixed with what was made before.
        shutil.copy2(kept, shard)
        code, _, error = command(*arguments(source, tmp_path / "out"))
        assert code == 2 and "model.safetensors of the source changed since the conversion was begun" in error
        assert not loadable(tmp_path / "out")
        finishes(source, tmp_path / "out", expected, "--force")

    @pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "config.json"])
    def test_a_copied_file_that_changes_is_named(
        self, name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In place, with its time set back: all that a copy shows is in the inode."""
        from xpuquant.conversion.sources.folder import LocalSource

        read = LocalSource.read_into

        def reading(self: LocalSource, part: Any, out: Any) -> None:
            path = source / name
            status = path.stat()
            path.write_bytes(path.read_bytes()[:-1] + b" ")
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
            read(self, part, out)

        with monkeypatch.context() as patched:
            patched.setattr(LocalSource, "read_into", reading)
            code, _, error = command(*arguments(source, tmp_path / "out"))
        assert code == 3 and f"{name} changed while it was being read (time of the inode)" in error
        assert not loadable(tmp_path / "out")

    @pytest.mark.parametrize("when", [0, 1, 2**33, -(2**31)])
    def test_files_of_any_time(self, when: int, source: Path, expected: dict[str, str], tmp_path: Path) -> None:
        """A clock that was wrong, or will be."""
        for path in source.rglob("*"):
            os.utime(path, (when, when))
        assert command(*arguments(source, tmp_path / "out"))[0] == 0
        assert complete(tmp_path / "out") == expected

    def test_a_clock_that_jumps(
        self, source: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        jumps = random.Random(0)
        for name in ("time", "time_ns"):
            monkeypatch.setattr(time, name, lambda: jumps.randrange(-(2**40), 2**40))
        assert command(*arguments(source, tmp_path / "out"))[0] == 0
        assert complete(tmp_path / "out") == expected

    def test_a_config_edited_between_two_runs(self, source: Path, tmp_path: Path) -> None:
        """Shards made under one config are not mixed with those made under another."""
        out = tmp_path / "out"
        with Faults(30, dead=True).injected(), contextlib.suppress(Dead):
            command(*arguments(source, out))
        assert (out / ".xpuquant" / "journal.jsonl").exists()
        text = (source / "config.json").read_text()
        (source / "config.json").write_text(text.replace('"sym": true', '"sym": false'))
        code, _, error = command(*arguments(source, out))
        assert code == 2 and "unfinished conversion of another source" in error
        assert command(*arguments(source, out), "--force")[0] == 0


NOTING = f"""
import runpy
from xpuquant.conversion.write import resumption, shard_writer
shard_writer.CHUNK_BYTES, resumption.NOTED_BYTES = {CHUNK_BYTES}, {NOTED_BYTES}
runpy.run_module("xpuquant", run_name="__main__", alter_sys=True)
"""
"""The program, noting inside of small shards."""


def start(source: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", NOTING, *arguments(source, out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def works(pid: int, out: Path) -> bool:
    """Whether it holds the lock of OUT. Before, a signal may find it in the imports of others, which swallow it."""
    with contextlib.suppress(OSError):
        return any(str(fd.readlink()).startswith(str(out)) for fd in Path(f"/proc/{pid}/fd").iterdir())
    return False


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGHUP])
    def test_at_random_moments(
        self, number: signal.Signals, source: Path, expected: dict[str, str], tmp_path: Path
    ) -> None:
        out, moments, before = tmp_path / "out", random.Random(number), digests(source)
        span = 0.3
        for _ in range(ROUNDS):
            process = start(source, out)
            while process.poll() is None and not works(process.pid, out):
                time.sleep(0.002)
            began = time.monotonic()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(0, span))
            process.send_signal(number)
            _, error = process.communicate(timeout=60)
            span = max(span, min(1.0, (time.monotonic() - began) * 0.8)) if process.returncode == 0 else span
            assert "Traceback" not in error and "internal error" not in error, error
            count("faults: signals at random moments")
            if number in (signal.SIGTERM, signal.SIGINT) and process.returncode == 130:
                assert "resume" in error or "interrupted" in error
            # An interrupt inside `exec` makes the interpreter end by SIGINT, though it was handled.
            handled = -signal.SIGINT if "interrupted" in error else 0
            assert process.returncode in (0, 130, -number, 2, handled), (process.returncode, error)
            assert digests(source) == before
            if loadable(out):
                shutil.rmtree(out)
        finishes(source, out, expected)

    def test_two_at_once(self, source: Path, expected: dict[str, str], tmp_path: Path) -> None:
        for i in range(max(2, ROUNDS // 3)):
            out = tmp_path / str(i) / "out"
            both = [start(source, out) for _ in range(3)]
            ends = [(process.communicate()[1], process.returncode) for process in both]
            assert sorted(code for _, code in ends)[0] == 0, ends
            assert all(code == 0 or (code == 2 and error.count("\n") == 1) for error, code in ends), ends
            assert complete(out) == expected

    @pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
    @pytest.mark.parametrize("words", ["--version", "inspect SRC", "inspect SRC --json"])
    def test_a_standard_stream_is_closed(self, closed: str, words: str, source: Path) -> None:
        """What would be said there is nobody's; the command does its work."""
        said = " ".join(str(source) if word == "SRC" else word for word in words.split())
        line = f'exec "$0" -P -m xpuquant {said} {closed}'
        done = subprocess.run(["bash", "-c", line, sys.executable], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert bool(done.stdout) == ("1>" not in closed)

    def test_nobody_listens(self, source: Path, tmp_path: Path) -> None:
        """Standard output closed (`| head`): the conversion is complete, and nothing else is said."""
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "xpuquant", *arguments(source, tmp_path / "out")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        error = process.stderr.read()
        process.wait()
        assert loadable(tmp_path / "out")
        assert "Traceback" not in error and "Exception ignored" not in error, error
        assert process.returncode in (0, 4) and error.count("\n") <= 1, error
