"""`convert --from FILE`: several sources, one of which may fail, and a table at the end."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import FIXTURES

from xpuquant.conversion.cli.app import run
from xpuquant.conversion.sources.folder import LocalSource

GPTQ, REFUSED = FIXTURES / "gptqmodel-qwen3-w4g32", FIXTURES / "llmcompressor-llama-fp8-block-ragged"


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models: `good`, `refused`, `with space`, and one that is damaged."""
    for name, fixture in (("good", GPTQ), ("refused", REFUSED), ("with space", GPTQ), ("damaged", GPTQ)):
        shutil.copytree(fixture, tmp_path / name)
    (tmp_path / "damaged" / "config.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(room: Path, *lines: str) -> list[str]:
    (room / "models.txt").write_text("\n".join(lines) + "\n")
    return ["convert", "--from", "models.txt", "--no-verify"]


def test_one_that_fails_stops_none_of_the_others(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = listing(room, "# ours", "refused  # K = 192", "", "good", "'with space' here/other", "nowhere", "damaged")
    assert run(words) == 2, "as the first that failed would have ended alone"
    said = capsys.readouterr()
    assert (room / "good-xpu" / "config.json").exists() and (room / "here" / "other" / "config.json").exists()
    assert not (room / "refused-xpu").exists() and not (room / "damaged-xpu").exists()
    rows = re.findall(r"^(refused|good|with space|nowhere|damaged)  .*$", said.out, re.MULTILINE)
    assert rows == ["refused", "good", "with space", "nowhere", "damaged"]
    assert "2 of 5 sources are converted" in said.out and "no exact XPU layout" in said.out
    assert "3 of 5 failed; the first: refused: 1 module has no exact XPU layout" in said.err
    assert "2 of 5: good" in said.err
    # Run again: what is finished is known, and the rest tried again.
    assert run(words) == 2
    assert capsys.readouterr().out.count("was finished before") == 2


@pytest.mark.parametrize(("first", "code"), [("damaged", 3), ("nowhere", 2), ("refused", 2)])
def test_the_exit_code_is_the_first_ones(first: str, code: int, room: Path) -> None:
    assert run([*listing(room, "good", first, "refused"), "--dry-run"]) == code


def test_all_of_them_well(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*listing(room, "good", "'with space'"), "-o", "all"]
    assert run([*words, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "2 of 2 sources convert" in said.out and "all/good-xpu" in said.out and not (room / "all").exists()
    assert run([*words, "-q"]) == 0
    said = capsys.readouterr()
    assert said.out == "2 of 2 sources are converted\n" and said.err == ""
    assert sorted(path.name for path in (room / "all").iterdir()) == ["good-xpu", "with space-xpu"]


def test_for_a_program(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*listing(room, "good", "damaged"), "--json"]) == 3
    one, other = json.loads(capsys.readouterr().out)["results"]
    assert one["exit_code"] == 0 and one["error"] is None and len(one["conversion"]["modules"]) == 7
    assert one["out"] == "good-xpu" and one["conversion"]["proof"]["verdict"] == "not verified"
    assert other["exit_code"] == 3 and "config.json" in other["error"] and other["conversion"] is None
    assert run([*listing(room, "good", "refused"), "--json", "--dry-run", "--on-unsupported", "dequantize"]) == 0
    assert [one["conversion"]["out"] for one in json.loads(capsys.readouterr().out)["results"]] == [
        "good-xpu",
        "refused-xpu",
    ]


def test_from_standard_input(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"good\n")))
    assert run(["convert", "--from", "-", "--no-verify"]) == 0
    assert (room / "good-xpu").is_dir()


NO_THREAD = RuntimeError("can't start new thread")
FAILS = [OSError(28, "No space left on device", "x"), MemoryError(), NO_THREAD, RuntimeError("odd")]


@pytest.mark.parametrize("error", FAILS, ids=str)
def test_whatever_one_fails_of(
    error: Exception, room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also what nobody foresaw; but an interrupt ends all."""
    read = LocalSource.read_into

    def failing(self: LocalSource, box: Any, out: Any) -> None:
        if self.name == "good":
            raise error
        read(self, box, out)

    monkeypatch.setattr(LocalSource, "read_into", failing)
    words = listing(room, "good", "'with space'")
    assert run(words) == (70 if str(error) == "odd" else 4)
    assert (room / "with space-xpu").is_dir() and not (room / "good-xpu" / "config.json").exists()
    assert "1 of 2 failed; the first: good: " in capsys.readouterr().err


def test_an_interrupt_ends_all(room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(self: LocalSource, box: Any, out: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalSource, "read_into", interrupted)
    assert run(listing(room, "good", "'with space'")) == 130
    assert not (room / "with space-xpu").exists() and "resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "lists no source"),
        (b"# nothing\n\n", "lists no source"),
        (b"good out more\n", "line 1: want SRC, or SRC OUT"),
        (b"good\n'with space\n", "line 2: a quote is not closed"),
        (b"good ''\n", "line 1: want SRC, or SRC OUT"),
        (b"good\ngood\n", "would both be written to good-xpu"),
        (b"good a\nrefused ./b/../a\n", "would both be written to"),
        (b"\xff\xfe\n", "not text"),
        (b"x" * (2 << 20), "more than 1 MiB"),
        (None, "No such file"),
    ],
)
def test_what_is_no_list(content: bytes | None, said: str, room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything is converted."""
    if content is not None:
        (room / "models.txt").write_bytes(content)
    assert run(["convert", "--from", "models.txt"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (room / "good-xpu").exists()


@pytest.mark.parametrize(
    "words",
    [["good"], ["--part", "1/2"], ["--revision", "main"], ["--push-to", "me/x"], ["--base-model", "a/b"]],
    ids=lambda words: words[0],
)
def test_what_is_of_one_source_does_not_go_with_several(
    words: list[str], room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*listing(room, "good"), *words]) == 2
    error = capsys.readouterr().err
    assert "--from does not go with " in error and error.count("\n") == 1


def test_nothing_to_convert(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert"]) == 2
    assert "give SRC, or a list of sources with --from" in capsys.readouterr().err
