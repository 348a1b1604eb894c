"""Verdicts that a staging folder brings along are believed of this user's own runs alone: a folder may have come with a
clone, and its shards, journals and verdicts be anybody's."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import FIXTURES

from xpuquant.conversion.cli.app import run
from xpuquant.conversion.runs.parts import Part
from xpuquant.conversion.vouching import is_ours, mark_of

MOE = FIXTURES / "gptqmodel-qwen3moe-w4g32"
PARTS = ("1/2", "2/2")
Mark = Callable[[bytes, str | None], str | None]


def convert_parts(source: Path, out: Path) -> None:
    for part in PARTS:
        assert run(["convert", str(source), str(out), "--max-shard-size", "20kB", "--jobs", "1", "--part", part]) == 0


def notes_of(out: Path) -> list[Path]:
    return [out / ".xpuquant" / Part(index, 2).verified for index in (1, 2)]


def rewritten(out: Path, mark: Mark) -> None:
    """The last byte of each staged shard is another one, and every record beside them says what lies there now."""
    digests: dict[str, str] = {}
    for shard in (out / ".xpuquant" / "files").glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        before = hashlib.sha256(data).hexdigest()
        data[-1] ^= 1
        shard.write_bytes(data)
        digests[before] = hashlib.sha256(data).hexdigest()
    assert digests
    for journal in (out / ".xpuquant").glob("*.jsonl"):
        text = journal.read_text()
        for before, after in digests.items():
            text = text.replace(before, after)
        journal.write_text(text)
    for note in notes_of(out):
        said = json.loads(note.read_text())
        said["shards"] = {name: digests[sha256] for name, sha256 in said["shards"].items()}
        given = said.pop("mark")
        note.write_text(json.dumps({**said, "mark": mark(json.dumps(said, sort_keys=True).encode(), given)}))


def with_a_key_of_their_own(content: bytes, given: str | None) -> str | None:
    mine = os.environ["XDG_STATE_HOME"]
    os.environ["XDG_STATE_HOME"] = f"{mine}-theirs"
    try:
        return mark_of(content)
    finally:
        os.environ["XDG_STATE_HOME"] = mine


MARKS: dict[str, Mark] = {
    "none": lambda content, given: None,
    "as it was": lambda content, given: given,
    "empty": lambda content, given: "",
    "of another user": with_a_key_of_their_own,
    "plain sha256": lambda content, given: hashlib.sha256(content).hexdigest(),
}


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.mark.parametrize("mark", MARKS)
def test_verdicts_of_strangers_are_not_believed(mark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    convert_parts(MOE, out)
    rewritten(out, MARKS[mark])
    capsys.readouterr()
    assert run(["finish", str(MOE), str(out)]) == 1
    error = capsys.readouterr().err
    assert "verification failed:" in error
    assert not (out / "config.json").exists()


def test_a_verdict_on_another_conversion_is_none_on_this(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The user's own, true of what it is on: of another model, whose shards have the same names."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    shutil.copytree(MOE, theirs / "source")
    weights = theirs / "source" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    length = int.from_bytes(data[:8], "little")
    data[8 + length + json.loads(data[8 : 8 + length])["model.norm.weight"]["data_offsets"][0]] ^= 1
    weights.write_bytes(data)
    convert_parts(theirs / "source", theirs / "out")
    convert_parts(MOE, ours)
    plan = json.loads((ours / ".xpuquant" / Part(1, 2).journal).read_text().splitlines()[0])["plan"]
    for index in (1, 2):
        journal = theirs / "out" / ".xpuquant" / Part(index, 2).journal
        first, *rest = journal.read_text().splitlines()
        rest = [line for line in rest if "host" not in line]
        journal.write_text("\n".join([json.dumps({**json.loads(first), "plan": plan}), *rest]) + "\n")
    capsys.readouterr()
    assert run(["finish", str(MOE), str(theirs / "out")]) == 1
    assert "model.norm.weight: bytes differ from the source's" in capsys.readouterr().err


def no_folder(state: Path) -> None:
    state.write_text("x")


def a_link(state: Path) -> None:
    (state / "xpuquant").mkdir(parents=True)
    (state / "xpuquant" / "key").symlink_to("/dev/zero")


def a_pipe(state: Path) -> None:
    (state / "xpuquant").mkdir(parents=True)
    os.mkfifo(state / "xpuquant" / "key")


def a_stump(state: Path) -> None:
    (state / "xpuquant").mkdir(parents=True)
    (state / "xpuquant" / "key").write_bytes(b"short")


@pytest.mark.parametrize("spoil", [no_folder, a_link, a_pipe, a_stump])
def test_without_a_key_everything_is_compared_again(spoil: Callable[[Path], None], state: Path, tmp_path: Path) -> None:
    spoil(state)
    assert mark_of(b"x") is None and not is_ours(b"x", None) and not is_ours(b"x", "")
    convert_parts(MOE, tmp_path / "out")
    assert run(["finish", str(MOE), str(tmp_path / "out")]) == 0
    assert run(["verify", str(tmp_path / "out"), "--backend", "reference"]) == 0


def test_a_relative_home_is_no_place_for_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    for home in ("relative", ""):
        monkeypatch.setenv("HOME", home)
        assert mark_of(b"x") is None


def test_the_key_is_made_once_and_is_the_user_s_alone(state: Path) -> None:
    mark = mark_of(b"x")
    key = state / "xpuquant" / "key"
    assert mark is not None and is_ours(b"x", mark) and not is_ours(b"y", mark)
    assert key.stat().st_mode & 0o777 == 0o600 and key.stat().st_size == 32
    assert mark_of(b"x") == mark
