"""The package as it is installed: one import package, light start, no stray top-level names."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from xpuquant import __version__

ROOT = Path(__file__).parents[2]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONSAFEPATH": "1"} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd="/")


@pytest.mark.parametrize("name", ["convert", "formats", "kernels"])
def test_folders_are_not_importable_by_their_bare_names(name: str) -> None:
    run = python(f"import xpuquant; import {name}")
    assert run.returncode == 1
    assert f"No module named '{name}'" in run.stderr


def test_start_is_light() -> None:
    """`--help` in half a second: what costs more is imported by the command that needs it."""
    code = "import sys; from xpuquant.conversion.cli.app import run; run(['--help']); print(*sys.modules, sep='\\n')"
    loaded = set(python(code).stdout.splitlines())
    assert not loaded & {"torch", "transformers", "vllm", "safetensors", "huggingface_hub", "numpy"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    """Serving engines import it in every process; its functions are loaded when they are named."""
    show = "print(*sys.modules, sep='\\n')"
    loaded = set(python(f"import sys; import xpuquant; xpuquant.UsageError; {show}").stdout.splitlines())
    assert "xpuquant.errors" in loaded and "xpuquant.api" not in loaded
    assert not loaded & {"numpy", "torch", "typer", "rich", "huggingface_hub"}
    loaded = set(python(f"import sys; import xpuquant; xpuquant.convert; {show}").stdout.splitlines())
    assert "xpuquant.api" in loaded
    assert not loaded & {"torch", "typer", "rich", "huggingface_hub", "xpuquant.conversion.cli"}


def test_conversion_needs_no_torch() -> None:
    """Importing torch takes longer than converting a gigabyte."""
    code = "import sys; import xpuquant.conversion.runs.local; print(*sys.modules, sep='\\n')"
    assert not set(python(code).stdout.splitlines()) & {"torch", "transformers", "huggingface_hub"}


def test_module_and_version() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "xpuquant", "--version"],
        capture_output=True,
        text=True,
        cwd="/",
        env=os.environ | {"PYTHONSAFEPATH": "1"},
    )
    assert (run.returncode, run.stdout) == (0, f"xpuquant {__version__}\n")
    assert version("xpuquant") == __version__


def test_wheel_holds_one_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    ours = (".py", "py.typed", ".html.j2", "_releases.json", "families.json")
    assert all(name.startswith("xpuquant/") and name.endswith(ours) for name in names)
    for module in (
        "conversion/cli/app.py",
        "conversion/report/page.html.j2",
        "formats/readers/gptq.py",
        "kernels/reference.py",
        "py.typed",
        "__main__.py",
    ):
        assert f"xpuquant/{module}" in names
