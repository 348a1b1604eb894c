"""The package as it is installed: one import package, light start, no stray top-level names."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email import message_from_string
from importlib.metadata import version
from pathlib import Path

import pytest

from xpuquant import __version__
from xpuquant.conversion.cli.app import built

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


def test_a_command_waits_for_no_other() -> None:
    """To build all of them is a twentieth of the time to a conversion's first byte."""
    code = "from xpuquant.conversion.cli import app; app.run(['convert', '--help']); print(app.built.cache_info())"
    assert "misses=1" in python(code).stdout
    assert list(built("convert").commands) == ["convert"]


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


def test_looking_at_a_checkpoint_loads_nothing_that_checks_one() -> None:
    """`inspect` feels instant: kernels, reports and compiled loops are for those who use them."""
    source = ROOT / "tests" / "fixtures" / "gptqmodel-qwen3-w4g32"
    code = f"import sys; from xpuquant.conversion.cli.app import run; run(['inspect', {str(source)!r}, '-q'])"
    loaded = set(python(f"{code}; print(*sys.modules, sep='\\n')").stdout.splitlines())
    heavy = (
        "xpuquant.kernels",
        "xpuquant.conversion.report",
        "xpuquant.formats.packing.convert_loops",
        "numba",
        "torch",
    )
    assert "xpuquant.conversion.inspection" in loaded
    assert not [name for name in loaded if name.startswith(heavy)]


UNTIL_A_SHARD_IS_OPENED = """
import os, sys
def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".safetensors") and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        os.write(1, "\\n".join(sys.modules).encode())
        os._exit(0)
sys.addaudithook(hook)
from xpuquant.conversion.cli.app import run
"""


def test_the_first_byte_waits_for_nothing_that_comes_later(tmp_path: Path) -> None:
    """What only some conversions need, what verifies, and what tells of the result, is imported when it is needed."""
    source = ROOT / "tests" / "fixtures" / "gptqmodel-qwen3-w4g32"
    done = python(f"{UNTIL_A_SHARD_IS_OPENED}run(['convert', {str(source)!r}, {str(tmp_path / 'out')!r}])")
    loaded = set(done.stdout.splitlines())
    assert "xpuquant.conversion.write.execute" in loaded, done.stderr
    later = (
        "xpuquant.ark_releases",
        "xpuquant.conversion.cli.answers",
        *(f"xpuquant.conversion.hub.{name}" for name in ("blobs", "client", "publish", "target")),
        "xpuquant.conversion.report",
        "xpuquant.conversion.results",
        "xpuquant.conversion.runs.parts",
        "xpuquant.conversion.verify",
        *(f"xpuquant.formats.layouts.compressed_tensors.{name}" for name in ("fp8", "ints", "modules", "mx", "stored")),
        "xpuquant.formats.packing.convert_loops",
        "xpuquant.served_families",
        "xpuquant.xpu_releases",
        *("huggingface_hub", "importlib.metadata", "jinja2", "ml_dtypes", "numba", "pydantic", "rich", "yaml"),
    )
    assert not [name for name in sorted(loaded) if name.startswith(later)]


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


def test_the_metadata_is_what_an_index_shows(wheel: Path) -> None:
    """The page of the package: README as Markdown, the licence and its text, the Python versions; no torch."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(archive.read(name).decode())
        assert f"{name.rpartition('/')[0]}/licenses/LICENSE" in archive.namelist()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    classifiers = metadata.get_all("Classifier") or []
    assert not [one for one in classifiers if one.startswith("License ::")], (
        "the expression says it; an index refuses both"
    )
    least = metadata["Requires-Python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {least}" in classifiers
    required = [one for one in metadata.get_all("Requires-Dist") or [] if "extra ==" not in one]
    assert required and not [one for one in required if one.startswith("torch")]


def test_nothing_that_is_said_names_a_file_of_the_repository() -> None:
    """An installed package has no scripts, tests and docs: what a message names as the fix has to be there."""
    said = [
        (path.relative_to(ROOT), line, text)
        for folder in ("xpuquant", "convert", "formats", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        for line, text in spoken(ast.parse(path.read_text()))
    ]
    assert len(said) > 1000
    assert not [one for one in said if re.search(r"\b(scripts|tests|docs)/", one[2])]


def spoken(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every text of a module that is no docstring."""
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and not isinstance(parent, ast.Expr):
                yield node.lineno, node.value
