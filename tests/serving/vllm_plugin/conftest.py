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
    return {report["model"]: {**report, "log": done.stderr} for report in reports}


@pytest.fixture(scope="session")
def generate() -> Callable[..., Reports]:
    return run_models
