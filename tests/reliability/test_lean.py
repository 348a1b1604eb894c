"""What the lean install does without torch: everything up to serving, and one line where torch or a library is missing.

Run where there is no torch (scripts/lanes/lean); elsewhere there is nothing to see.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from xpuquant.conversion.cli.app import run
from xpuquant.kernels import backends

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHECKPOINTS = ("gptqmodel-qwen3moe-w4g32", "llmcompressor-llama-fp8-block", "llmcompressor-llama-mxfp4")
REALS = sorted(backends().keys() - {"reference"})

pytestmark = pytest.mark.skipif(find_spec("torch") is not None, reason="torch is here")


@pytest.mark.parametrize("layout", ["xpu", "compressed-tensors"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_command_of_a_conversion(
    name: str, layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = str(FIXTURES / name), str(tmp_path / "out")
    for arguments in (
        ["inspect", source],
        ["convert", source, out, "--dry-run", "--layout", layout],
        ["convert", source, out, "--layout", layout],
        ["verify", out, "--source", source, "--report", str(tmp_path / "report")],
        ["diff", out, out],
        ["doctor"],
    ):
        assert run(arguments) == 0, capsys.readouterr().err
    assert "Traceback" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("backend", REALS)
def test_a_backend_that_is_asked_for_is_run_or_refused(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Never passed over: exit code 4 and one line with what to install."""
    source, out = str(FIXTURES / CHECKPOINTS[0]), str(tmp_path / "out")
    assert run(["convert", source, out, "--no-verify"]) == 0
    missing = backends()[backend].unavailable()
    capsys.readouterr()
    assert run(["verify", out, "--source", source, "--backend", backend]) == (0 if missing is None else 4)
    if missing is not None:
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and backend in lines[0]
        assert "pip install" in lines[0], lines


def test_a_conversion_says_what_would_have_checked_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", str(FIXTURES / CHECKPOINTS[0]), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    if backends()["onednn"].unavailable() is None:
        assert "computed by oneDNN" in said or "onednn" in said
    else:
        assert "computed by no real kernel where this was checked (onednn is not installed: " in said
        assert "pip install 'xpuquant[onednn]')" in said


@pytest.mark.parametrize("module", ["xpuquant.transformers", "xpuquant.layers"])
def test_serving_without_torch_is_one_line(module: str) -> None:
    done = subprocess.run([sys.executable, "-P", "-c", f"import {module}"], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "torch" in last and "pip install" in last, last


def test_json_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert run(["convert", str(FIXTURES / CHECKPOINTS[0]), out]) == 0
    capsys.readouterr()
    assert run(["verify", out, "--json"]) == 0
    missing = json.loads(capsys.readouterr().out)["kernels"]["not_available"]
    assert {name for name in REALS if backends()[name].unavailable() is not None} == missing.keys()
