"""A shard that was stopped in the middle is gone on with: what is kept was found sound, and the bytes are the same."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import FIXTURES

import xpuquant
from xpuquant.conversion.cli.app import run
from xpuquant.conversion.sources.folder import LocalSource
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.write import output_files, resumption, shard_writer
from xpuquant.conversion.write.output_files import create

MOE = FIXTURES / "gptqmodel-qwen3moe-w4g32"
NOTED_BYTES = 4096
HALF = 60_000
"""Bytes of the source, of 120,000."""
WAYS = pytest.mark.parametrize("options", [[], ["--no-verify"]], ids=["cached", "direct"])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes, chunks and blocks of a size for small shards."""
    monkeypatch.setattr(shard_writer, "CHUNK_BYTES", 1024)
    monkeypatch.setattr(resumption, "NOTED_BYTES", NOTED_BYTES)
    monkeypatch.setattr(output_files, "_BLOCK_BYTES", 4096)


def convert(out: Path, *options: str) -> int:
    return run(["convert", str(MOE), str(out), "--jobs", "1", *options])


def digests(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The shards of an undisturbed run."""
    out = tmp_path_factory.mktemp("expected") / "out"
    xpuquant.convert(MOE, out, verify=False)
    return digests(out)


class Reads:
    """Bytes read of the source; an interrupt where they would become too many."""

    def __init__(self, most: float) -> None:
        self.nbytes, self.most = 0, most
        self._read = LocalSource.read_into

    def read_into(self, source: LocalSource, box: Any, out: Any) -> None:
        if self.nbytes + box.nbytes > self.most:
            raise KeyboardInterrupt
        self.nbytes += box.nbytes
        self._read(source, box, out)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Reads]:
    real = LocalSource.read_into

    def limit(most: float) -> Reads:
        monkeypatch.setattr(LocalSource, "read_into", real)
        reads = Reads(most)
        monkeypatch.setattr(LocalSource, "read_into", lambda *arguments: reads.read_into(*arguments))
        return reads

    return limit


@pytest.fixture
def stopped(tmp_path: Path, reading: Callable[[float], Reads]) -> Callable[..., Path]:
    """An output whose only shard was stopped in the middle."""

    def stop(*options: str) -> Path:
        out = tmp_path / "stopped" / "out"
        reading(HALF)
        assert convert(out, *options) == 130
        reading(float("inf"))
        return out

    return stop


def notes(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / ".xpuquant" / "journal.jsonl").read_text().splitlines()]
    return [line for line in lines if "reached" in line]


def staged(out: Path) -> Path:
    return out / ".xpuquant" / "files" / "model.safetensors"


def kept(text: str) -> str | None:
    """What was said of an unfinished shard."""
    match = re.search(r"^resumed: (\S+ kB) of model\.safetensors kept$", text, re.MULTILINE)
    return None if match is None else match[1]


def said(nbytes: int) -> str:
    return f"{nbytes / 1000:.1f} kB"


@WAYS
def test_the_rest_is_made_and_what_is_kept_is_said(
    options: list[str],
    stopped: Callable[..., Path],
    reading: Callable[[float], Reads],
    expected: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = stopped(*options)
    last, size = notes(out)[-1]["reached"], staged(out).stat().st_size
    assert len(notes(out)) > 2 and size / 4 < last < size
    assert hashlib.sha256(staged(out).read_bytes()[:last]).hexdigest() == notes(out)[-1]["sha256"]
    capsys.readouterr()
    reads = reading(float("inf"))
    assert convert(out, *options, "--no-verify") == 0
    assert kept(capsys.readouterr().err) == said(last)
    assert 0 < reads.nbytes < (size - last) * 1.3, "no more of the source is read than the rest needs"
    assert digests(out) == expected


@pytest.mark.parametrize("jobs", [1, 3])
def test_stopped_again_and_again(
    jobs: int, tmp_path: Path, reading: Callable[[float], Reads], expected: dict[str, str]
) -> None:
    """Each run reads a little; all of them together come to the end, which without notes none would."""
    out, code, runs = tmp_path / "out", 130, 0
    while code == 130:
        reading(HALF)
        code = run(["convert", str(MOE), str(out), "--jobs", str(jobs), "--no-verify"])
        runs += 1
        assert runs < 100
    assert code == 0 and runs > 1
    assert digests(out) == expected


def test_a_program_is_told(stopped: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = stopped()
    last = notes(out)[-1]["reached"]
    assert xpuquant.convert(MOE, out).kept == {"model.safetensors": last}
    shutil.rmtree(out)
    out = stopped()
    capsys.readouterr()
    assert convert(out, "--json") == 0
    answered = capsys.readouterr()
    assert json.loads(answered.out)["kept"] == {"model.safetensors": last} and answered.err == ""


def test_finished_shards_are_said_too(
    tmp_path: Path, reading: Callable[[float], Reads], capsys: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "out", ["--max-shard-size", "60kB"]
    reading(HALF)
    assert convert(out, *options) == 130
    reading(float("inf"))
    capsys.readouterr()
    assert convert(out, *options) == 0
    assert re.search(r"^resumed: \d+ finished shards? kept, [\d.]+ kB$", capsys.readouterr().err, re.MULTILINE)


def test_parts_go_on_as_well(
    tmp_path: Path, reading: Callable[[float], Reads], expected: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["convert", str(MOE), str(out), "--jobs", "1", "--part", "1/1"]
    reading(HALF)
    assert run(words) == 130
    reading(float("inf"))
    capsys.readouterr()
    assert run(words) == 0
    assert kept(capsys.readouterr().err)
    assert run(["finish", str(MOE), str(out)]) == 0
    assert digests(out) == expected


@WAYS
@pytest.mark.parametrize("place", ["before the first note", "before the last", "after the last", "in the header"])
def test_a_flipped_byte_is_not_kept(
    place: str,
    options: list[str],
    stopped: Callable[..., Path],
    expected: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What comes before the note before it is: a disk may have lost some of what it was handed."""
    out = stopped(*options)
    reached = [note["reached"] for note in notes(out)]
    position, sound = {
        "before the first note": (reached[0] - 1, None),
        "before the last": (reached[-1] - 1, reached[-2]),
        "after the last": (reached[-1], reached[-1]),
        "in the header": (12, None),
    }[place]
    content = bytearray(staged(out).read_bytes())
    content[position] ^= 1
    staged(out).write_bytes(content)
    capsys.readouterr()
    assert convert(out, *options) == 0
    assert kept(capsys.readouterr().err) == (None if sound is None else said(sound))
    assert digests(out) == expected


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 8)


def lengthened(path: Path) -> None:
    os.truncate(path, 1 << 40)


def linked(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to("../elsewhere")


def with_a_second_name(path: Path) -> None:
    (path.parent.parent / "elsewhere").hardlink_to(path)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    path.unlink()
    here = Path.cwd()
    os.chdir(path.parent)  # such names are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


@WAYS
@pytest.mark.parametrize(
    "change", [cut, lengthened, Path.unlink, linked, with_a_second_name, a_pipe, a_socket], ids=lambda c: c.__name__
)
def test_whatever_became_of_the_file(
    change: Callable[[Path], None],
    options: list[str],
    stopped: Callable[..., Path],
    expected: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = stopped(*options)
    change(staged(out))
    elsewhere = out / ".xpuquant" / "elsewhere"
    before = elsewhere.read_bytes() if elsewhere.exists() else None
    capsys.readouterr()
    if before is not None:
        (out.parent / "kept").hardlink_to(elsewhere)
    assert convert(out, *options) == 0
    assert (kept(capsys.readouterr().err) is None) == (change is not lengthened)
    assert digests(out) == expected
    if before is not None:
        assert (out.parent / "kept").read_bytes() == before, "nothing is written through another name"


def line(**fields: object) -> bytes:
    return json.dumps({"shard": "model.safetensors", "sha256": "0" * 64, "reached": 100_000} | fields).encode() + b"\n"


SOUND_LINES = [
    line(),
    line(reached=0, sha256=hashlib.sha256().hexdigest()),
    line(reached=10**30),
    line(reached=4096 + 1),
    line(shard="config.json"),
    line(shard="model-00009-of-00009.safetensors"),
    line() * 2000,
]
"""A line may be sound and untrue."""
UNSOUND_LINES = [
    line(reached=-1),
    line(reached=True),
    line(reached=1.5),
    line(reached="100000"),
    line(sha256="0" * 63),
    line(sha256=None),
    line(shard="../x"),
    line(shard="/etc/passwd"),
    line(shard=["model.safetensors"]),
    b'{"shard": "model.safetensors", "reached": 1',
]


@pytest.mark.parametrize("lines", [*SOUND_LINES, *UNSOUND_LINES], ids=range(len(SOUND_LINES + UNSOUND_LINES)))
@pytest.mark.parametrize("place", ["first", "last"])
def test_notes_of_strangers(
    lines: bytes,
    place: str,
    stopped: Callable[..., Path],
    expected: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """None is believed; what is not sound ends the journal."""
    out = stopped("--no-verify")
    path = out / ".xpuquant" / "journal.jsonl"
    opening, rest = path.read_bytes().split(b'{"shard"', 1)
    rest = b'{"shard"' + rest
    last = notes(out)[-1]["reached"]
    path.write_bytes(opening + lines + rest if place == "first" else opening + rest + lines)
    capsys.readouterr()
    assert convert(out, "--no-verify") == 0
    kept_all = place == "last" or lines in SOUND_LINES
    assert kept(capsys.readouterr().err) == (said(last) if kept_all else None)
    assert digests(out) == expected


def test_a_forged_shard_with_a_note_that_fits_fails_the_verification(
    stopped: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = stopped()
    last = notes(out)[-1]["reached"]
    content = bytearray(staged(out).read_bytes())
    content[last - 1] ^= 1
    staged(out).write_bytes(content)
    with (out / ".xpuquant" / "journal.jsonl").open("ab") as journal:
        journal.write(line(reached=last, sha256=hashlib.sha256(content[:last]).hexdigest()))
    capsys.readouterr()
    assert convert(out) == 1
    assert "verification failed" in capsys.readouterr().err and not (out / "config.json").exists()


def test_another_source_or_other_options_keep_nothing(
    stopped: Callable[..., Path], capsys: pytest.CaptureFixture[str], expected: dict[str, str]
) -> None:
    out = stopped()
    capsys.readouterr()
    assert convert(out, "--scale-dtype", "float32") == 2
    assert convert(out, "--scale-dtype", "float32", "--force") == 0
    assert kept(capsys.readouterr().err) is None
    assert digests(out) != expected


@pytest.mark.parametrize("read_again", [True, False], ids=["cached", "direct"])
def test_a_file_is_gone_on_with_at_any_byte(read_again: bool, tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, 40_001, np.uint8)
    for begin in (1, 4095, 4096, 4097, 8192, 20_000, 36_864, 40_000, 40_001):
        (tmp_path / "shard").write_bytes(data[:begin].tobytes() + b"\xee" * 50_000)
        with create(Tree(tmp_path), "shard", data.size, read_again, begin) as file:
            assert file.handed == begin
            for start in range(begin, data.size, 3000):
                file.append(data[start : start + 3000].copy())
            assert begin <= file.handed <= data.size
        assert (tmp_path / "shard").read_bytes() == data.tobytes()


def test_the_disk_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes cost no flush: there are as many of those as without."""
    synced: list[int] = []
    real = os.fsync

    def counted(fd: int) -> None:
        synced.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fsync", counted)
    assert convert(tmp_path / "noted", "--no-verify") == 0
    with_notes = len(synced)
    monkeypatch.setattr(resumption, "NOTED_BYTES", 1 << 40)
    assert convert(tmp_path / "plain", "--no-verify") == 0
    assert len(synced) == 2 * with_notes
