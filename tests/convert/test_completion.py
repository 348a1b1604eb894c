"""Shells complete commands, options and their choices; bash is asked itself, and so is fish where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def program(tmp_path: Path) -> dict[str, str]:
    """The environment of a shell that has `xpuquant`."""
    (tmp_path / "xpuquant").write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m xpuquant "$@"\n')
    (tmp_path / "xpuquant").chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


OFFERED = pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("con", {"convert"}),
        ("convert --lic", {"--license"}),
        ("convert --layout ", {"xpu", "compressed-tensors"}),
        ("convert --scale-dtype b", {"bfloat16"}),
        ("inspect --on-unsupported d", {"dequantize"}),
    ],
)


@OFFERED
def test_fish(typed: str, offered: set[str], program: dict[str, str]) -> None:
    if shutil.which("fish") is None:
        pytest.skip("no fish here")
    script = f"_XPUQUANT_COMPLETE=source_fish xpuquant | source; complete --do-complete 'xpuquant {typed}'"
    done = subprocess.run(["fish", "-c", script], env=program, capture_output=True, text=True, check=True)
    assert {line.partition("\t")[0] for line in done.stdout.splitlines()} == offered and done.stderr == ""


@OFFERED
def test_bash(typed: str, offered: set[str], program: dict[str, str]) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    words = ["xpuquant", *typed.split(" ")]
    script = f"""
        eval "$(_XPUQUANT_COMPLETE=source_bash xpuquant)"
        COMP_WORDS=({" ".join(word or "''" for word in words)}); COMP_CWORD={len(words) - 1}
        _xpuquant_completion xpuquant
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], env=program, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered and done.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_its_script(shell: str, program: dict[str, str]) -> None:
    asked = {**program, "_XPUQUANT_COMPLETE": f"source_{shell}"}
    done = subprocess.run(["xpuquant"], env=asked, capture_output=True, text=True, check=True)
    assert f"_XPUQUANT_COMPLETE=complete_{shell}" in done.stdout
