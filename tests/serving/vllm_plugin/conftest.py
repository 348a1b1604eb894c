"""These tests need vLLM: scripts/lanes/vllm makes an environment that has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

try:
    version("vllm")
except PackageNotFoundError:
    collect_ignore_glob = ["*"]

HERE = Path(__file__).parent
Reports = dict[str, dict[str, Any]]


def run_models(models: list[Path], **job: Any) -> Reports:
    """What each model says under vLLM, by folder; one child process for all."""
    binding = "0|1" if job.get("tp", 1) == 2 else "0-1"
    if (os.cpu_count() or 1) < 2:
        binding = "nobind"
    done = subprocess.run(
        [sys.executable, str(HERE / "generate.py"), json.dumps({"models": [str(m) for m in models], **job})],
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": binding},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    reports = [json.loads(line.removeprefix("REPORT ")) for line in lines]
    assert len(reports) == len(models), f"vLLM ended early:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return {report["model"]: {**report, "log": done.stdout + done.stderr} for report in reports}


@pytest.fixture(scope="session")
def generate() -> Callable[..., Reports]:
    return run_models


@pytest.fixture(scope="module")
def asked(request: pytest.FixtureRequest) -> set[str]:
    """The `name`s that the selected tests of this module are parametrized with: for no others a model is run."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return {name for item in items if (name := item.callspec.params.get("name")) is not None}


@pytest.fixture(scope="session")
def stock_int4() -> str | None:
    """Why stock vLLM cannot compute int4 linears here, or None: its CPU build has the operator for some processors."""
    asked = "import vllm._custom_ops, torch, sys; sys.exit(0 if hasattr(torch.ops._C, 'cpu_gemm_wna16') else 3)"
    code = subprocess.run([sys.executable, "-c", asked], capture_output=True, check=False).returncode
    assert code in (0, 3), "vLLM cannot be asked"
    return "stock vLLM's CPU build has no int4 operator (cpu_gemm_wna16) for this processor" if code else None
