"""Every command in a real terminal of 80 and of 120 columns, against what it says into a pipe: nothing is lost, no word
is cut, no row is wider than the terminal, and commands stay in one piece."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from functools import cache
from pathlib import Path

import pytest
import typer
from support.checkpoints import FIXTURES

from xpuquant.conversion.cli.app import COMMANDS

DENSE, MOE = FIXTURES / "gptqmodel-qwen3-w4g32-asym-v1", FIXTURES / "gptqmodel-qwen3moe-w4g32"
REFUSED = FIXTURES / "llmcompressor-llama-fp8-block-ragged"

DAY = [
    ("inspect", "dense"),
    ("inspect", "a-model-with-experts-and-a-rather-long-name"),
    ("inspect", "refused"),
    ("convert", "dense", "--dry-run"),
    ("convert", "dense", "-o", "out"),
    ("convert", "a-model-with-experts-and-a-rather-long-name"),
    ("convert", "--from", "models.txt", "--dry-run"),
    ("inspect", "out"),
    ("verify", "out", "--source", "dense", "--backend", "reference"),
    ("diff", "dense", "out"),
    ("diff", "dense", "a-model-with-experts-and-a-rather-long-name"),
    ("explain", "dense", "model.layers.0.mlp.down_proj"),
    ("formats",),
    ("doctor",),
    ("push", "out", "noslash"),
    ("finish", "dense", "nowhere"),
    ("help",),
    ("--help",),
]
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_COMMAND = re.compile(r"(?:xpuquant (?!\d)[a-z]+ \S|vllm serve \S|\w+\.from_pretrained\()")
_JOINTS = "./,:=_-"
"""Where a name longer than its column may be broken."""


_TIME = re.compile(r"\d+(\.\d+)?(?= (s|min)\b)|[\d.]+ [kMG]?B/s")
"""Another one each time."""


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("room")
    shutil.copytree(DENSE, folder / "dense")
    shutil.copytree(MOE, folder / "a-model-with-experts-and-a-rather-long-name")
    shutil.copytree(REFUSED, folder / "refused")
    (folder / "models.txt").write_text("dense all/dense\nrefused\n")
    for words in DAY:
        if words[0] == "convert":  # from now on it says that it is finished
            in_a_pipe.__wrapped__(words, folder)
    return folder


def environment(columns: int | None) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    return kept | {"TERM": "xterm-256color", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}


def in_a_terminal(words: tuple[str, ...], room: Path, columns: int) -> str:
    """What a terminal of that many columns is sent."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "xpuquant", *words],
        cwd=room,
        env=environment(columns),
        stdin=there,
        stdout=there,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(there)
    data = b""
    while True:
        try:
            data += (read := os.read(here, 65536))
        except OSError:  # EIO: the other end is closed
            break
        if not read:
            break
    os.close(here)
    process.wait()
    return _TIME.sub("0", _ESCAPES.sub("", data.decode()).replace("\r\n", "\n"))


@cache
def in_a_pipe(words: tuple[str, ...], room: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "xpuquant", *words],
        cwd=room,
        env=environment(None),
        capture_output=True,
        text=True,
        check=False,
    )
    return _TIME.sub("0", done.stdout)


def is_a_piece(token: str, words: set[str]) -> bool:
    """Whether a token is a word, or the part of one between two joints."""
    if token in words:
        return True
    for word in words:
        at = word.find(token)
        while at >= 0:
            end = at + len(token)
            if (at == 0 or word[at - 1] in _JOINTS) and (end == len(word) or word[end - 1] in _JOINTS):
                return True
            at = word.find(token, at + 1)
    return False


def test_every_command_is_looked_at() -> None:
    group = typer.main.get_group(COMMANDS)
    assert {words[0] for words in DAY} >= set(group.commands)


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_shows_what_a_pipe_does(columns: int, room: Path) -> None:
    for words in DAY:
        plain = in_a_pipe(words, room)
        shown = in_a_terminal(words, room, columns)
        where = f"xpuquant {' '.join(words)} at {columns} columns:\n{shown}"
        said = set(plain.split())
        for line in shown.splitlines():
            assert line == "" or line.strip(), f"a header without words, in {where}"
            if _COMMAND.search(line):
                assert any(line.strip() in other for other in plain.splitlines()), f"{line!r} is cut, in {where}"
            else:
                assert len(line) <= columns, f"{line!r} is too wide, in {where}"
            for token in line.split():
                assert is_a_piece(token, said) or token.startswith("-v"), f"{token!r} is cut, in {where}"
        missing = "".join(plain.split())
        found = "".join(shown.split())
        assert sorted(found.replace("-vprintsthemall", "")) == sorted(missing.replace("-vprintsthemall", "")), where
